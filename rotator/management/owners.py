"""A rotation and its owner, as the database shows them to other processes."""

from typing import Final

from django.db.models import DurationField, ExpressionWrapper, F, QuerySet
from django.db.models.functions import Now

from rotator.models import Control, Rotation
from rotator.options import RunOptions
from rotator.postgres.owner import Owner

# A heartbeat comes each second.
SILENT_SECONDS: Final = 10.0
_JUST_ENDED_SECONDS: Final = 3.0


def find_rotations(database: str) -> QuerySet[Rotation]:
    """Return the rotations of a database, the latest first, for the functions of this module."""
    silence = ExpressionWrapper(Now() - F("updated_at"), output_field=DurationField())
    rotations = Rotation.objects.using(database).select_related("control")
    return rotations.annotate(silence=silence).order_by("-pk")


def control_of(rotation: Rotation) -> Control:
    """Return the control row of a rotation; an empty one where no user has changed it."""
    return getattr(rotation, "control", None) or Control(rotation=rotation)


def owner_of(rotation: Rotation) -> Owner:
    """Return the process that owns a rotation, or the last one that did."""
    return Owner(
        host=rotation.owner_host,
        pid=rotation.owner_pid or 0,
        process=rotation.owner_process,
        user=rotation.owner_user,
        version=rotation.version,
    )


def silent_seconds(rotation: Rotation) -> float:
    """Return the time since the last heartbeat, on the database's clock."""
    return max(0.0, float(vars(rotation)["silence"].total_seconds()))


def is_silent(rotation: Rotation) -> bool:
    """Return whether the owner of a running rotation sends no heartbeat."""
    return rotation.status == Rotation.Status.RUNNING and silent_seconds(rotation) > SILENT_SECONDS


def is_dead(rotation: Rotation) -> bool:
    """Return whether the owner of a running rotation has ended, or is silent for too long."""
    # A process that has just ended may have completed the rotation after it was read.
    if rotation.status != Rotation.Status.RUNNING or silent_seconds(rotation) < _JUST_ENDED_SECONDS:
        return False
    budget_seconds = RunOptions.from_json(rotation.options).outage_budget_seconds
    return owner_of(rotation).is_gone() or silent_seconds(rotation) > budget_seconds + SILENT_SECONDS
