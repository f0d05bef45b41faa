"""The database itself refuses rows that the protocol rules out."""

from datetime import UTC, datetime

import pytest
from django.core.management import call_command
from django.db import IntegrityError, transaction

from rotator.models import CompletedRange
from tests.integration.outcomes import make_rotation

pytestmark = pytest.mark.django_db


def test_migrations_match_the_models() -> None:
    call_command("makemigrations", "--check", "--dry-run", verbosity=0)


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_a_target_has_one_unfinished_rotation(status: str) -> None:
    make_rotation(status=status)
    with pytest.raises(IntegrityError, match="rotator_one_unfinished_rotation"):
        make_rotation()


def test_finished_rotations_do_not_stand_in_the_way() -> None:
    make_rotation(status="completed", finished_at=datetime.now(UTC))
    make_rotation(status="abandoned", finished_at=datetime.now(UTC))
    make_rotation()


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"status": "paused"}, "rotator_rotation_"),
        ({"status": "completed"}, "rotator_rotation_finished_at_its_end"),
        ({"finished_at": datetime(2026, 11, 1, tzinfo=UTC)}, "rotator_rotation_finished_at_its_end"),
        ({"rows_done": -1}, "rotator_rotation_figures_not_negative"),
        ({"generation": 0}, "rotator_rotation_figures_not_negative"),
    ],
)
def test_impossible_rotations_are_refused(fields: dict[str, object], constraint: str) -> None:
    with pytest.raises(IntegrityError, match=constraint):
        make_rotation(**fields)


@pytest.mark.parametrize(
    ("after", "through", "rows", "constraint"),
    [
        (None, [25], 1, "rotator_range_begins_once"),
        ([5], [10], 1, "rotator_range_ends_once"),
        ([30], [30], 1, "rotator_range_not_empty"),
        ([30], [40], -1, "rotator_range_figures_not_negative"),
    ],
)
def test_impossible_checkpoints_are_refused(
    after: list[int] | None, through: list[int], rows: int, constraint: str
) -> None:
    rotation = make_rotation()
    CompletedRange.objects.create(rotation=rotation, after=None, through=[10], rows=10, seconds=0.1)
    CompletedRange.objects.create(rotation=rotation, after=[10], through=[20], rows=10, seconds=0.1)
    with pytest.raises(IntegrityError, match=constraint), transaction.atomic():
        CompletedRange.objects.create(rotation=rotation, after=after, through=through, rows=rows, seconds=0.1)
