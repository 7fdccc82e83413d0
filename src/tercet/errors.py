"""The one error that a user sees: what is wrong, where, and the mend."""

from __future__ import annotations


class TercetError(Exception):
    """A mistake in the input.  The command line prints its message as one line and exits with status 2."""

    def __str__(self) -> str:
        """The message; what a name of a file holds of line breaks and other control characters is written out."""
        message = super().__str__()
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in message)
