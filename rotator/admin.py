"""Rotations in the admin, read-only."""

from typing import TYPE_CHECKING, ClassVar

from django.contrib import admin
from django.http import HttpRequest

from rotator.models import Rotation
from rotator.progress.text import done_of_total

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Rotation]
else:
    # It is generic only for the type checker.
    _ModelAdmin = admin.ModelAdmin


@admin.register(Rotation)
class RotationAdmin(_ModelAdmin):
    """Shows the progress of each rotation."""

    list_display = (
        "id",
        "target",
        "database",
        "status",
        "progress",
        "late_rows",
        "deferrals",
        "retries",
        "throttle_reason",
        "unconfirmed_rows",
        "owner",
        "started_at",
        "updated_at",
    )
    list_filter = ("status", "database")
    search_fields = ("target",)
    ordering: ClassVar = ["-id"]

    @admin.display(description="rows done")
    def progress(self, rotation: Rotation) -> str:
        """Return the rows done and the total."""
        return done_of_total(rotation.rows_done, rotation.rows_total, is_exact=rotation.rows_total_is_exact)

    @admin.display(description="owner")
    def owner(self, rotation: Rotation) -> str:
        """Return the process that owns the rotation, or the last one that did."""
        return f"{rotation.owner_user or 'unknown'} on {rotation.owner_host} (pid {rotation.owner_pid})"

    def has_add_permission(self, request: HttpRequest) -> bool:  # noqa: ARG002 - Django's signature
        """Return False: only the command adds rotations."""
        return False

    def has_change_permission(
        self,
        request: HttpRequest,  # noqa: ARG002 - Django's signature
        obj: Rotation | None = None,  # noqa: ARG002 - Django's signature
    ) -> bool:
        """Return False: only the command changes rotations."""
        return False

    def has_delete_permission(
        self,
        request: HttpRequest,  # noqa: ARG002 - Django's signature
        obj: Rotation | None = None,  # noqa: ARG002 - Django's signature
    ) -> bool:
        """Return False: the checkpoints record which rows are rotated."""
        return False
