"""UserCodeError: a function of the user, such as a reward, failed. Without other imports: the command line reads it first."""

from __future__ import annotations


class UserCodeError(ValueError):
    """A function that a recipe names raised, or returned what cannot be used. The message says where."""
