"""The one error that a user sees: what is wrong, where, and the mend."""

from __future__ import annotations


class TercetError(Exception):
    """A mistake in the input.  The command line prints its message as one line and exits with status 2."""
