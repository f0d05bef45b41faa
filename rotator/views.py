"""The pages of a rotation in Django's admin, their buttons, and the metrics."""

import math
import secrets
import time
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from django.contrib import messages
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.db import connections, router, transaction
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.shortcuts import render
from django.urls import reverse

from rotator.exceptions import RevisionError, RotatorError
from rotator.management.control import read_request, send
from rotator.management.page import page_state
from rotator.management.rotation import find_rotations
from rotator.models import Rotation
from rotator.options import PACES, SETTINGS, RunOptions, is_id

if TYPE_CHECKING:
    from django.contrib.admin import ModelAdmin

    _Admin = ModelAdmin[Rotation]

CONTROL: Final = "rotator.control_rotation"
# The viewers of a rotation share what is read.
KEPT_SECONDS = 1.0
_recent: dict[tuple[str, str], tuple[float, bytes]] = {}

EVERY_SECONDS: Final = 2.0
# Where no process works on it, the figures do not change until a user resumes the rotation.
EVERY_WITHOUT_OWNER_SECONDS: Final = 5.0
EVERY_WHEN_FINISHED_SECONDS: Final = 30.0
# Each answer takes processor time from a rotation on the same host.
MOST_ANSWERS_PER_SECOND: Final = 4
MOST_EVERY_SECONDS: Final = 60.0
# Longer than the longest wait of the script.
_VIEWING_SECONDS: Final = 65.0
_VIEWER_LENGTH: Final = 8
# When each viewer of a rotation has read it last from this process.
_viewers: dict[tuple[str, str], float] = {}

View = Callable[..., HttpResponse]


def _without_transaction(view: View) -> View:
    """Keep ``ATOMIC_REQUESTS`` from committing what the view rolls back."""
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return view


def without_commits(view: View) -> View:
    """Roll back a read that is repeated, because the pace counts commits as an application's work."""

    @wraps(view)
    def rolled_back(request: HttpRequest, *args: object, **kwargs: object) -> HttpResponse:
        database = router.db_for_write(Rotation)
        with transaction.atomic(using=database):
            # Reads the session and the user, which stores a new session while SECRET_KEY is rotated.
            _ = request.user.is_authenticated
            if not request.session.modified:
                response = view(request, *args, **kwargs)
                transaction.set_rollback(True, using=database)
                return response
        return view(request, *args, **kwargs)

    return _without_transaction(rolled_back)


def find(number: str) -> Rotation:
    """Return a rotation of the database that the project's routers choose, or answer with status 404."""
    rotations = find_rotations(router.db_for_write(Rotation))
    found = rotations.filter(pk=number).first() if is_id(number) else None
    if found is None:
        raise Http404(f"There is no rotation {number}.")
    return found


def show(admin: "_Admin", request: HttpRequest, number: str) -> HttpResponse:
    """Show the page of one rotation."""
    if not admin.has_view_permission(request):
        raise PermissionDenied
    rotation = find(number)
    control, options = rotation.control_row, RunOptions.from_json(rotation.options)
    context: dict[str, Any] = {
        **admin.admin_site.each_context(request),
        "title": f"Rotation {rotation.pk} of {rotation.target}",
        "opts": Rotation._meta,
        "rotation": rotation,
        "state": page_state(rotation),
        "state_url": reverse(
            "admin:rotator_rotation_state",
            args=[rotation.pk],
            query={"viewer": secrets.token_hex(_VIEWER_LENGTH // 2)},
        ),
        "may_control": request.user.has_perm(CONTROL),
        "paces": tuple(PACES),
        "limits": {
            "pace": control.pace or options.pace,
            "concurrency": control.concurrency or options.concurrency,
            "batch": control.batch or options.batch,
            "most_workers": options.concurrency,
        },
        "reloads": "still" not in request.GET,
    }
    return render(request, "rotator/rotation.html", context)


def state(admin: "_Admin", request: HttpRequest, number: str) -> HttpResponse:
    """Return what the page shows of one rotation as JSON, which its script reads again and again."""
    if not admin.has_view_permission(request):
        raise PermissionDenied
    key, now = (router.db_for_write(Rotation), number), time.monotonic()
    read_at, content = _recent.get(key, (-math.inf, b""))
    viewers = _count_viewers(number, request.GET.get("viewer", ""), now)
    if now - read_at >= KEPT_SECONDS:
        rotation = find(number)
        every_seconds = max(_every_seconds(rotation), viewers / MOST_ANSWERS_PER_SECOND)
        every_seconds = min(every_seconds, MOST_EVERY_SECONDS)
        content = JsonResponse(page_state(rotation) | {"every_seconds": every_seconds}).content
        # Keep only the rotations that are viewed now.
        for other in [each for each, (at, _) in list(_recent.items()) if now - at >= KEPT_SECONDS]:
            _recent.pop(other, None)
        _recent[key] = now, content
    return HttpResponse(content, content_type="application/json")


def _every_seconds(rotation: Rotation) -> float:
    """Return the time between two reads of one viewer."""
    if not rotation.is_unfinished:
        return EVERY_WHEN_FINISHED_SECONDS
    return EVERY_SECONDS if rotation.has_owner else EVERY_WITHOUT_OWNER_SECONDS


def _count_viewers(number: str, viewer: str, now: float) -> int:
    """Note that a viewer reads a rotation, and return the number of those that read it from this process."""
    for other in [each for each, at in list(_viewers.items()) if now - at >= _VIEWING_SECONDS]:
        _viewers.pop(other, None)
    _viewers[number, viewer[:_VIEWER_LENGTH]] = now
    return sum(of == number for of, _ in list(_viewers))


def control(admin: "_Admin", request: HttpRequest, number: str) -> HttpResponse:
    """Store the request of a button for the owner of a rotation, and return to its page."""
    _check_control(request)
    rotation = find(number)
    try:
        text = _request(admin, request, rotation)
    except RotatorError as error:
        messages.error(request, f"Not requested. {error}")
    else:
        messages.success(request, text)
    return HttpResponseRedirect(reverse("admin:rotator_rotation_change", args=[rotation.pk]))


def control_all(admin: "_Admin", request: HttpRequest) -> HttpResponse:
    """Pause or resume each rotation that a process works on, and return to the list."""
    _check_control(request)
    verb = request.POST.get("request", "")
    if verb not in ("pause", "resume"):
        raise PermissionDenied
    asked = read_request([verb])
    number = 0
    for rotation in find_rotations(router.db_for_write(Rotation)).filter(status__in=Rotation.UNFINISHED):
        if not rotation.has_owner or rotation.control_row.paused == (verb == "pause"):
            continue
        send(rotation, asked, by=request.user.get_username(), revision=None)
        admin.log_change(request, rotation, f"Requested: {verb}.")
        number += 1
    messages.success(request, f"Requested for {number} rotation{'s' * (number != 1)}: {verb}.")
    return HttpResponseRedirect(reverse("admin:rotator_rotation_changelist"))


@_without_transaction
def metrics(request: HttpRequest) -> HttpResponse:
    """Return the metrics of rotations in Prometheus's text format."""
    if request.method != "GET":
        raise PermissionDenied
    try:
        from rotator.management import metrics as found  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise ImproperlyConfigured(
            "The metrics need prometheus-client. Run: pip install 'prometheus-client>=0.20'"
        ) from error
    database = router.db_for_write(Rotation)
    with transaction.atomic(using=database):
        text = found.metrics(database)
        # A scrape is repeated too: see without_commits().
        transaction.set_rollback(True, using=database)
    return HttpResponse(text, content_type="text/plain; version=0.0.4; charset=utf-8")


def _request(admin: "_Admin", request: HttpRequest, rotation: Rotation) -> str:
    """Store the request, and return the sentence for the user."""
    asked = read_request(_words(request))
    if asked.is_cancel and request.POST.get("target", "").strip() != rotation.target:
        raise RotatorError(f"To cancel it, type the name of its target: {rotation.target}.")
    if not rotation.has_owner:
        raise RotatorError("No process works on this rotation, so the request would have no effect.")
    revision = request.POST.get("revision", "")
    if not is_id(revision):
        raise RotatorError("The form has no revision. Reload the page.")
    try:
        changed = send(rotation, asked, by=request.user.get_username(), revision=int(revision))
    except RevisionError as error:
        present = find(str(rotation.pk)).control_row
        raise RotatorError(
            f"{present.changed_by} has changed this rotation since you have seen it: revision {revision} was "
            f"shown, and {present.revision} is the present one. Look at it, then repeat your request."
        ) from error
    settings = ", ".join(f"{name} {value or 'default'}" for name, value in asked.values.items())
    described = f"set {settings}" if asked.verb == "set" else asked.verb
    text = f"Requested: {described} (revision {changed.revision})."
    admin.log_change(request, rotation, text)
    return f"{text} This page shows when it is applied."


def _words(request: HttpRequest) -> list[str]:
    """Return the request of a form as words of the command ``rotations``."""
    verb = request.POST.get("request", "")
    settings = {name: request.POST.get(name, "").strip() for name in SETTINGS} if verb == "set" else {}
    return [verb, *(f"{name}={value}" for name, value in settings.items() if value)]


def _check_control(request: HttpRequest) -> None:
    if request.method != "POST" or not request.user.has_perm(CONTROL):
        raise PermissionDenied
