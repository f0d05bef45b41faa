"""Every error that a rotation raises, under one root.

Messages are for the person at the terminal: what is wrong, and what to do next. None carries a value
of the rotated column.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from signal import Signals

from rotator.ranges import KeyInterval


class RotatorError(Exception):
    """The root of all errors of this package; its text is one sentence for the user.

    Attributes:
        exit_status: What a command that fails with it exits with.
    """

    exit_status = 1


class TargetError(RotatorError):
    """The target cannot be rotated as asked; nothing was changed."""


class MissingPrivilegesError(TargetError):
    """The role lacks privileges that the rotation needs; nothing was changed."""

    def __init__(self, grants: Sequence[str]) -> None:
        super().__init__(f"This role lacks a privilege that the rotation needs. Run: {' '.join(grants)}")


class OptionError(RotatorError):
    """An option makes no sense here; nothing was changed."""


class RotationRepeatedError(OptionError):
    """A completed rotation had the same fields, rows and values; nothing was changed.

    Attributes:
        rotation: The id of the completed rotation.
    """

    def __init__(self, rotation: int, target: str, finished_at: datetime) -> None:
        super().__init__(
            f"Rotation {rotation} of {target} completed at {finished_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} "
            "UTC. To rotate the same rows again, use --restart (restart=True in Python)."
        )
        self.rotation = rotation


class OwnedElsewhereError(RotatorError):
    """Another process is alive and owns the rotation; nothing was changed."""


class SupersededError(RotatorError):
    """Another process has taken the rotation over; this one must not write any more."""


class RotationFinishedError(RotatorError):
    """The rotation that was to be gone on with is not unfinished any more; nothing was changed."""


class ServerLostError(RotatorError):
    """The connection to the server is gone; what was in flight may or may not have been committed."""


class ServerRefusedError(RotatorError):
    """The server refuses for a reason that trying again does not mend; the range was rolled back."""


class RowsLockedError(RotatorError):
    """Somebody else holds rows of a range; nothing was written, and it can be tried again later."""


class RangeRejectedError(RotatorError):
    """The server refused a range and rolled it back.

    Attributes:
        condition: The server's name for it, with the constraint's where there is one; never a value.
        retryable: Whether the same range may well succeed when it is tried again.
    """

    def __init__(self, condition: str, *, retryable: bool) -> None:
        super().__init__(f"The server refused a range: {condition}.")
        self.condition = condition
        self.retryable = retryable


class RangeTooSlowError(RangeRejectedError):
    """A range took longer than it may hold the application up; smaller ones will not."""

    def __init__(self, condition: str) -> None:
        super().__init__(condition, retryable=True)


class EveryRowRejectedError(RotatorError):
    """The server refused every row that was tried; none was changed."""

    def __init__(self, rows: int, condition: str) -> None:
        super().__init__(
            f"The server refused each of the {rows} rows that were tried, in different ranges: {condition}. "
            "No row was changed: remove the cause, and run the same command again."
        )


class OldValuesKeptError(RotatorError):
    """Rows of a range still had their old values after the update; the range was rolled back."""

    def __init__(self, where: str, triggers: tuple[str, ...]) -> None:
        cause = (
            f"One of the triggers that an update fires ({', '.join(triggers)}) puts them back"
            if triggers
            else "The server puts them back, although no trigger of the table was found that does"
        )
        super().__init__(
            f"Rows {where} still have their old values after the update, which was rolled back. "
            f"{cause}: disable it during the rotation, or let it accept new values, and run the same command "
            "again."
        )


class ValuesError(RotatorError):
    """Something is wrong with the new values; never says what they are."""

    def of(self, key_range: KeyInterval) -> "ValuesError":
        """Return the same error, with the range that the values were for."""
        said = str(self).rstrip(".")
        return ValuesError(
            f"{said}; that was for the range {key_range}, which was left as it is: mend it, and the same "
            "command goes on."
        )


class BrokerError(RotatorError):
    """The broker of a distributed rotation cannot be reached; the database is what counts."""


class StoppedBeforeStartError(RotatorError):
    """A signal came before anything was changed."""

    def __init__(self, signal: Signals | None) -> None:
        super().__init__("Stopped before anything was changed.")
        self.exit_status = 1 if signal is None else 128 + signal
