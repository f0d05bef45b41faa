"""Requests of a user to the owner of a running rotation: pause, resume, cancel, set."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from django.db.models.functions import Now

from rotator.events import ActionKind, StopReason
from rotator.exceptions import OptionError, RequestError
from rotator.management.rotation import (
    control_of,
    find_rotations,
    is_dead,
    is_silent,
    owner_of,
    silent_seconds,
)
from rotator.models import Control, Rotation
from rotator.options import SETTINGS, RunOptions, check_batch, read_setting
from rotator.progress.text import duration

VERBS: Final = ("pause", "resume", "cancel", "set")
# The owner reads the control row once a second.
ANSWER_SECONDS: Final = 5.0
# The ranges in flight are committed first.
DRAIN_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A change of the control row.

    Attributes:
        verb: One of ``VERBS``.
        kind: The kind of the action, for the log.
        values: The new values of the control row, by its fields.
    """

    verb: str
    kind: ActionKind
    values: dict[str, object]

    def __str__(self) -> str:
        """Return what a rotation is or has after the change."""
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
        kinds = {
            "pause": (ActionKind.PAUSED, {"paused": True}),
            "resume": (ActionKind.PAUSE_ENDED, {"paused": False}),
            "cancel": (ActionKind.CANCELLED, {}),
        }
        kind, values = kinds[verb]
        return Request(verb=verb, kind=kind, values=dict[str, object](values))
    if not rest:
        raise OptionError(f"set needs one or more of {', '.join(SETTINGS)}, e.g. set concurrency=2.")
    settings = dict[str, object]()
    for word in rest:
        name, is_given, value = word.partition("=")
        if name not in SETTINGS or not is_given:
            raise OptionError(f"'{word}' is not NAME=VALUE with one of the names {', '.join(SETTINGS)}.")
        settings[name] = read_setting(name, value)
    return Request(verb="set", kind=ActionKind.CHANGED, values=settings)


def send(rotation: Rotation, request: Request, *, by: str, revision: int | None) -> Control:
    """Store a request for the owner of a rotation, and return the changed control row.

    Raises:
        RequestError: The rotation cannot do what is requested.
        RevisionError: Another user has changed the control row since that revision.
    """
    name = f"Rotation {rotation.pk} of {rotation.target}"
    if rotation.status not in Rotation.UNFINISHED:
        raise RequestError(f"{name} is {rotation.status}, so it cannot be changed.")
    is_owned = rotation.status in (Rotation.Status.RUNNING, Rotation.Status.QUEUED)
    if request.kind is ActionKind.CANCELLED and not is_owned:
        raise RequestError(f"{name} is {rotation.status}: no process works on it, so nothing is cancelled.")
    options, present = RunOptions.from_json(rotation.options), control_of(rotation)
    settings = {"batch": present.batch, "pace": present.pace} | request.values
    batch, pace = settings["batch"] or options.batch, settings["pace"] or options.pace
    check_batch(int(str(batch)), str(pace))
    workers = options.concurrency
    wanted = request.values.get("concurrency")
    if is_owned and isinstance(wanted, int) and wanted > workers:
        raise RequestError(
            f"{name} runs with --concurrency {workers}, and no more workers can be added while it runs. Use "
            "a lower value, or cancel it and resume it with a higher --concurrency."
        )
    control = Control.change(rotation, request.kind, request.values, by=by, revision=revision)
    if request.kind is ActionKind.CANCELLED:
        queued = Rotation.objects.using(rotation._state.db).filter(  # noqa: SLF001 - documented by Django
            pk=rotation.pk, status=Rotation.Status.QUEUED
        )
        # No process owns it. A Celery task that begins to own it at this moment reads the control row.
        queued.update(status=Rotation.Status.INTERRUPTED, stop_reason=StopReason.CANCEL, updated_at=Now())
    return control


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Whether a request was applied.

    Attributes:
        text: Sentences for the user.
        is_applied: False where a process owns the rotation and has not applied it in time.
    """

    text: str
    is_applied: bool


def await_answer(control: Control, request: Request, database: str) -> Answer:
    """Wait for some seconds until the owner has applied a request."""
    is_cancel = request.kind is ActionKind.CANCELLED
    until = time.monotonic() + (DRAIN_SECONDS if is_cancel else ANSWER_SECONDS)
    while True:
        rotation = find_rotations(database).get(pk=control.pk)
        answer = _answer(rotation, control, request)
        if answer is not None:
            return answer
        if time.monotonic() >= until:
            return Answer(
                text=f"{_stored(rotation, control)} Its owner, {owner_of(rotation)}, has not applied it yet.",
                is_applied=False,
            )
        time.sleep(_POLL_SECONDS)


def _answer(rotation: Rotation, control: Control, request: Request) -> Answer | None:
    """Return the answer as far as it is known now; None where the owner can still apply the request."""
    is_running = rotation.status == Rotation.Status.RUNNING
    if request.kind is ActionKind.CANCELLED and not is_running:
        text = f"Rotation {rotation.pk} {request}. The same command resumes it."
        if rotation.status not in (Rotation.Status.INTERRUPTED, Rotation.Status.FAILED):
            text = f"Rotation {rotation.pk} is {rotation.status}."
        return Answer(text=text, is_applied=True)
    if request.kind is not ActionKind.CANCELLED and rotation.applied_revision >= control.revision:
        held = f" It is still held: {rotation.throttle_reason}." if rotation.throttle_reason else ""
        return Answer(
            text=f"Rotation {rotation.pk} {request} (revision {control.revision}): applied by its owner, "
            f"{owner_of(rotation)}.{held if request.verb == 'resume' else ''}",
            is_applied=True,
        )
    if not is_running:
        return Answer(
            text=f"{_stored(rotation, control)} The rotation is {rotation.status}, so no process answers. "
            "The request applies when the rotation is resumed.",
            is_applied=True,
        )
    if is_silent(rotation) or is_dead(rotation) or owner_of(rotation).is_gone():
        return Answer(
            text=f"{_stored(rotation, control)} The owner, {owner_of(rotation)}, does not answer: the last "
            f"heartbeat was {duration(silent_seconds(rotation))} ago. The request applies when the rotation "
            "is resumed.",
            is_applied=False,
        )
    return None


def _stored(rotation: Rotation, control: Control) -> str:
    return f"Rotation {rotation.pk}: the request is stored as revision {control.revision}."
