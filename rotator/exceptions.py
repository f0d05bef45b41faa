"""The errors that a rotation raises. No message contains a value of the rotated column."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from signal import Signals

from rotator.ranges import KeyInterval


class RotatorError(Exception):
    """The base class of the errors, whose text is for the user: what is wrong, and what to do.

    Attributes:
        exit_status: The exit status of a command that fails with this error.
    """

    exit_status = 1


class TargetError(RotatorError):
    """The target cannot be rotated; nothing was changed."""


class NoDefaultError(TargetError):
    """A field has no default that makes values, and no generator was given; nothing was changed.

    Attributes:
        generator: The path of a callable whose values fit; empty where the user has to write one; None where
            plain new values would be of no use, as in a column of hashes.
    """

    def __init__(self, message: str, *, generator: str | None) -> None:
        super().__init__(message)
        self.generator = generator


class MissingPrivilegesError(TargetError):
    """The role lacks privileges that the rotation needs; nothing was changed."""

    def __init__(self, grants: Sequence[str]) -> None:
        super().__init__(f"This role lacks a privilege that the rotation needs. Run: {' '.join(grants)}")


class OptionError(RotatorError):
    """An option is not valid here; nothing was changed."""


class RotationRepeatedError(OptionError):
    """A completed rotation had the same fields, rows and values; nothing was changed."""

    def __init__(self, rotation: int, target: str, finished_at: datetime) -> None:
        super().__init__(
            f"Rotation {rotation} of {target} completed at {finished_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} "
            "UTC. To rotate the same rows again, use --restart (restart=True in Python)."
        )


class RevisionError(RotatorError):
    """A change was based on an older revision of the control row; nothing was changed."""

    def __init__(self, rotation: int, seen: int, present: int, changed_by: str) -> None:
        by = f", by {changed_by}" if changed_by else ""
        super().__init__(
            f"Rotation {rotation} was changed since revision {seen}: its revision is {present}{by}. Look at "
            f"it with rotations {rotation}, then repeat the change with --revision {present}."
        )


class OwnedElsewhereError(RotatorError):
    """A living process owns the rotation; nothing was changed."""


class SupersededError(RotatorError):
    """Another process has taken the rotation over, so this one can no longer write."""


class RotationFinishedError(RotatorError):
    """The rotation to resume is completed or abandoned; nothing was changed."""


class ServerLostError(RotatorError):
    """The connection to the server was lost; transactions in flight may have been committed."""


class ServerRefusedError(RotatorError):
    """The server rejects the transaction, and a retry would not help; the range was rolled back."""


class RowsLockedError(RotatorError):
    """Another session has locked rows of a range; nothing was written, and a later retry can succeed."""


class RangeRejectedError(RotatorError):
    """The server rejected a range and rolled it back.

    Attributes:
        condition: The server's name of the error, with the constraint's name if there is one.
        retryable: Whether a retry of the same range can succeed.
    """

    def __init__(self, condition: str, *, retryable: bool = True) -> None:
        super().__init__(f"The server rejected a range: {condition}.")
        self.condition = condition
        self.retryable = retryable


class RangeTooSlowError(RangeRejectedError):
    """A range took longer than its time limit; smaller ones can succeed."""


class EveryRowRejectedError(RotatorError):
    """The server rejected several rows one after the other, in different ranges."""

    def __init__(self, rows: int, condition: str) -> None:
        super().__init__(
            f"The server rejected the last {rows} rows that were tried, and rotated none in between: "
            f"{condition}. They keep their values. Remove the cause, then run the same command again."
        )


class ValuesReplacedError(RotatorError):
    """Rows of a range had their old values, or the same value, after the update; it was rolled back."""

    def __init__(self, where: str, triggers: tuple[str, ...], *, are_equal: bool) -> None:
        have, does = "still have their old values", "restores them"
        if are_equal:
            have, does = "have the same value", "stores it"
        named = f" ({', '.join(triggers)})" if triggers else ""
        cause = f"One of the triggers that an update fires{named} {does}"
        if not triggers and not are_equal:
            cause = "The server restores them, although the table has no trigger that could"
        super().__init__(
            f"Rows {where} {have} after the update, which was rolled back. {cause}. Disable the cause during "
            "the rotation, or let it accept new values. Then run the same command again."
        )


class ValuesError(RotatorError):
    """The new values are not valid."""

    def of(self, key_range: KeyInterval) -> "ValuesError":
        """Return the same error, with the range of the values."""
        return ValuesError(
            f"{str(self).rstrip('.')}. The range {key_range} was not changed. Fix the values, then run the "
            "same command again."
        )


class BrokerError(RotatorError):
    """The broker of a distributed rotation cannot be reached."""


class StoppedBeforeStartError(RotatorError):
    """A signal stopped the run before its first change."""

    def __init__(self, signal: Signals | None) -> None:
        super().__init__("Stopped before anything was changed.")
        self.exit_status = 1 if signal is None else 128 + signal


@contextmanager
def unwrap_group() -> Iterator[None]:
    """Raise the first error of a task group instead of its exception group; the others follow from it."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group
