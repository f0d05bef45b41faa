"""Every error that a rotation raises, under one root.

Messages are for the person at the terminal: what is wrong, and what to do next. None carries a value
of the rotated column.
"""


class RotatorError(Exception):
    """The root of all errors of this package; its text is one sentence for the user."""


class TargetError(RotatorError):
    """The target cannot be rotated as asked; nothing was changed."""


class RowsLockedError(RotatorError):
    """Somebody else holds rows of a range; nothing was written, and it can be tried again later."""
