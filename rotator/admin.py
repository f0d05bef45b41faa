"""Rotations in the admin, to be looked at: only the command changes them."""

from typing import TYPE_CHECKING, ClassVar

from django.contrib import admin
from django.http import HttpRequest

from rotator.models import Rotation

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Rotation]
else:
    # Generic for the type checker alone.
    _ModelAdmin = admin.ModelAdmin


@admin.register(Rotation)
class RotationAdmin(_ModelAdmin):
    """Shows how far each rotation is."""

    list_display = (
        "id",
        "target",
        "database",
        "status",
        "progress",
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
        """Return rows done of the total."""
        about = "" if rotation.rows_total_is_exact else "about "
        return f"{rotation.rows_done:,} of {about}{rotation.rows_total:,}"

    @admin.display(description="owner")
    def owner(self, rotation: Rotation) -> str:
        """Return who works on it, or did last."""
        return f"{rotation.owner_user}@{rotation.owner_host}, pid {rotation.owner_pid}"

    def has_add_permission(self, request: HttpRequest) -> bool:  # noqa: ARG002 - Django's signature
        """Nobody adds one by hand."""
        return False

    def has_change_permission(
        self,
        request: HttpRequest,  # noqa: ARG002 - Django's signature
        obj: Rotation | None = None,  # noqa: ARG002 - Django's signature
    ) -> bool:
        """Nobody changes one by hand."""
        return False

    def has_delete_permission(
        self,
        request: HttpRequest,  # noqa: ARG002 - Django's signature
        obj: Rotation | None = None,  # noqa: ARG002 - Django's signature
    ) -> bool:
        """Its checkpoints are the record of what was done."""
        return False
