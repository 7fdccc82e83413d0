"""The one error that a user sees: what is wrong, where, and the fix."""

from __future__ import annotations


class TercetError(Exception):
    """A mistake in the input.  The command line prints its message as one line and exits with status 2."""

    def __str__(self) -> str:
        """The message, with control characters of file names escaped so that it stays one line."""
        message = super().__str__()
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in message)
