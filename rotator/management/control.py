"""Requests of a user to the owner of a running rotation: pause, resume, cancel, set."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from django.db.models.functions import Now

from rotator.events import ActionKind, StopReason
from rotator.exceptions import OptionError, RotatorError
from rotator.management.rotation import find_rotations
from rotator.models import Control, Rotation
from rotator.options import SETTINGS, RunOptions, check_batch, read_setting
from rotator.progress.text import duration

_KINDS: Final = {
    "pause": ActionKind.PAUSED,
    "resume": ActionKind.PAUSE_ENDED,
    "cancel": ActionKind.CANCELLED,
    "set": ActionKind.CHANGED,
}
VERBS: Final = tuple(_KINDS)
# The owner reads the control row once a second.
ANSWER_SECONDS: Final = 5.0
# The ranges in flight are committed first.
DRAIN_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """A change of the control row: one of ``VERBS``, and the new values by the fields of the row."""

    verb: str
    values: dict[str, object]

    @property
    def kind(self) -> ActionKind:
        """The kind of the action, for the log."""
        return _KINDS[self.verb]

    @property
    def is_cancel(self) -> bool:
        """Whether the owner is asked to stop."""
        return self.verb == "cancel"

    def __str__(self) -> str:
        settings = " ".join(
            f"{name}={'default' if value in (None, '') else value}" for name, value in self.values.items()
        )
        return {"pause": "is paused", "resume": "is not paused", "cancel": "is cancelled"}.get(
            self.verb, f"has {settings}"
        )


def read_request(words: Sequence[str]) -> Request:
    """Return the request of a command line, e.g. ``set concurrency=2 pace=gentle``.

    Raises:
        OptionError: It is not valid.
    """
    verb, *rest = words
    if verb not in VERBS:
        raise OptionError(f"'{verb}' is not a request. The requests are {', '.join(VERBS)}.")
    if verb != "set":
        if rest:
            raise OptionError(f"{verb} takes no value: leave out {' '.join(rest)}.")
        return Request(verb, {} if verb == "cancel" else {"paused": verb == "pause"})
    if not rest:
        raise OptionError(f"set needs one or more of {', '.join(SETTINGS)}, e.g. set concurrency=2.")
    settings = dict[str, object]()
    for word in rest:
        name, is_given, value = word.partition("=")
        if name not in SETTINGS or not is_given:
            raise OptionError(f"'{word}' is not NAME=VALUE with one of the names {', '.join(SETTINGS)}.")
        settings[name] = read_setting(name, value)
    return Request(verb, settings)


def send(rotation: Rotation, request: Request, *, by: str, revision: int | None) -> Control:
    """Store a request for the owner of a rotation, and return the changed control row.

    Raises:
        RotatorError: The rotation cannot do what is requested.
        RevisionError: Another user has changed the control row since that revision.
    """
    name = f"Rotation {rotation.pk} of {rotation.target}"
    if not rotation.is_unfinished:
        raise RotatorError(f"{name} is {rotation.status}, so it cannot be changed.")
    if request.is_cancel and not rotation.is_active:
        raise RotatorError(f"{name} is {rotation.status}: no process works on it, so nothing is cancelled.")
    options, present = RunOptions.from_json(rotation.options), rotation.control_row
    settings = {"batch": present.batch, "pace": present.pace} | request.values
    check_batch(int(str(settings["batch"] or options.batch)), str(settings["pace"] or options.pace))
    workers = options.concurrency
    wanted = request.values.get("concurrency")
    if rotation.is_active and isinstance(wanted, int) and wanted > workers:
        raise RotatorError(
            f"{name} runs with --concurrency {workers}, and no more workers can be added while it runs. Use "
            "a lower value, or cancel it and resume it with a higher --concurrency."
        )
    control = Control.change(rotation, request.kind, request.values, by=by, revision=revision)
    if request.is_cancel:
        rotations = Rotation.objects.using(rotation._state.db)
        queued = rotations.filter(pk=rotation.pk, status=Rotation.Status.QUEUED)
        # No process owns it. A Celery task that begins to own it at this moment reads the control row.
        queued.update(status=Rotation.Status.INTERRUPTED, stop_reason=StopReason.CANCEL, updated_at=Now())
    return control


@dataclass(frozen=True, slots=True)
class Answer:
    """Sentences for the user, and whether the request was applied.

    ``is_applied`` is false where a process owns the rotation, or did, and has not applied it.
    """

    text: str
    is_applied: bool


def await_answer(control: Control, request: Request, database: str) -> Answer:
    """Wait for some seconds until the owner has applied a request."""
    until = time.monotonic() + (DRAIN_SECONDS if request.is_cancel else ANSWER_SECONDS)
    while True:
        rotation = find_rotations(database).get(pk=control.pk)
        stored = f"Rotation {rotation.pk}: the request is stored as revision {control.revision}."
        answer = _answer(rotation, control, request, stored)
        if answer is not None:
            return answer
        if time.monotonic() >= until:
            text = f"{stored} Its owner, {rotation.owner}, has not applied it yet."
            return Answer(text, is_applied=False)
        time.sleep(_POLL_SECONDS)


def _answer(rotation: Rotation, control: Control, request: Request, stored: str) -> Answer | None:
    """Return the answer as far as it is known now; None where the owner can still apply the request."""
    name, owner = f"Rotation {rotation.pk}", rotation.owner
    is_running = rotation.status == Rotation.Status.RUNNING
    if request.is_cancel and not is_running:
        if rotation.status in (Rotation.Status.INTERRUPTED, Rotation.Status.FAILED):
            return Answer(f"{name} {request}. The same command resumes it.", is_applied=True)
        return Answer(f"{name} is {rotation.status}.", is_applied=True)
    if not request.is_cancel and rotation.applied_revision >= control.revision:
        text = f"{name} {request} (revision {control.revision}): applied by its owner, {owner}."
        if request.verb == "resume" and rotation.throttle_reason:
            text += f" It is still held: {rotation.throttle_reason}."
        return Answer(text, is_applied=True)
    if not is_running:
        return Answer(
            f"{stored} The rotation is {rotation.status}, so no process answers. The request applies when "
            "the rotation is resumed.",
            is_applied=True,
        )
    if not rotation.has_owner or owner.is_gone():
        return Answer(
            f"{stored} The owner, {owner}, does not answer: the last heartbeat was "
            f"{duration(rotation.silent_seconds)} ago. The request applies when the rotation is resumed.",
            is_applied=False,
        )
    return None
