"""Rotations in Django's admin: a list, and a page for each with buttons that control it."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db import router
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern, path

from rotator.management.rotation import age_of, find_rotations, rows_of, status_of
from rotator.models import Rotation
from rotator.progress.text import moment

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Rotation]
else:
    # It is generic only for the type checker.
    _ModelAdmin = admin.ModelAdmin


@admin.register(Rotation)
class RotationAdmin(_ModelAdmin):
    """Shows the progress of rotations, and controls them."""

    change_list_template = "rotator/rotations.html"
    list_display = ("rotation", "shown_status", "percent", "rows", "owner", "heartbeat", "started")
    list_filter = ("status", "database")
    search_fields = ("target",)
    ordering: ClassVar = ["-id"]
    actions = ()

    def get_queryset(self, request: HttpRequest) -> QuerySet[Rotation]:  # noqa: ARG002 - Django's interface
        # Not from a replica, where heartbeats arrive late.
        return find_rotations(router.db_for_write(Rotation))

    @admin.display(description="rotation", ordering="id")
    def rotation(self, rotation: Rotation) -> str:
        return f"{rotation.pk}: {rotation.target}"

    @admin.display(description="status", ordering="status")
    def shown_status(self, rotation: Rotation) -> str:
        return status_of(rotation)

    @admin.display(description="%")
    def percent(self, rotation: Rotation) -> str:
        return f"{rotation.percent}%"

    @admin.display(description="rows done")
    def rows(self, rotation: Rotation) -> str:
        return rows_of(rotation)

    @admin.display(description="last heartbeat", ordering="updated_at")
    def heartbeat(self, rotation: Rotation) -> str:
        return age_of(rotation) if rotation.status == "running" else moment(rotation.updated_at)

    @admin.display(description="started", ordering="started_at")
    def started(self, rotation: Rotation) -> str:
        return moment(rotation.started_at)

    def get_urls(self) -> list[URLPattern]:
        # Imported here, so that commands do not import what only web processes need.
        from rotator import views  # noqa: PLC0415

        def wrapped(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
            return self.admin_site.admin_view(partial(view, self))

        return [
            path("control/", wrapped(views.control_all), name="rotator_rotation_control_all"),
            # The login is read inside, too.
            path(
                "<path:number>/state/",
                views.without_commits(wrapped(views.state)),
                name="rotator_rotation_state",
            ),
            path("<path:number>/control/", wrapped(views.control), name="rotator_rotation_control"),
            *super().get_urls(),
        ]

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",  # noqa: ARG002 - Django's signature
        extra_context: dict[str, Any] | None = None,  # noqa: ARG002 - Django's signature
    ) -> HttpResponse:
        from rotator import views  # noqa: PLC0415 - as above

        if request.method not in ("GET", "HEAD"):
            raise PermissionDenied
        return views.show(self, request, object_id)

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        may_control = request.user.has_perm("rotator.control_rotation")
        return super().changelist_view(request, {**(extra_context or {}), "may_control": may_control})

    def has_add_permission(self, request: HttpRequest, obj: Rotation | None = None) -> bool:  # noqa: ARG002
        """Return False: only the command adds and changes rotations. No user deletes checkpoints."""
        return False

    has_change_permission = has_delete_permission = has_add_permission
