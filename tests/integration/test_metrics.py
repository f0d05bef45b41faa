"""The metrics of rotations, as Prometheus's own parser reads them."""

import shutil
import subprocess
from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from rotator.models import CompletedRange, Helper, Ledger, Measurement, Rotation, Verification

parser = pytest.importorskip("prometheus_client.parser", reason="The extra metrics is not installed.")
PROMTOOL = shutil.which("promtool")

pytestmark = pytest.mark.django_db


@pytest.fixture
def rotation() -> Rotation:
    found = Rotation.objects.create(
        target="shop.Order.api_key",
        database="default",
        started_xid=1,
        version="0",
        rows_done=12_000,
        rows_total=34_000,
        deferrals=3,
        retries=2,
        owner_host="db1",
        owner_pid=42,
    )
    for number in range(4):
        CompletedRange.objects.create(
            rotation=found, after=[number] if number else None, through=[number + 1], rows=3000, seconds=0.1
        )
    now = timezone.now()
    for seconds, held in (
        (20, "replica lag of r1"),
        (15, "replica lag of r1\npause"),
        (10, ""),
        (5, "pause"),
    ):
        Measurement.objects.create(
            rotation=found,
            at=now - timedelta(seconds=seconds),
            rows_done=0,
            state="rotating",
            held_by=held,
            is_change=True,
            workers=3,
            commit_seconds=0.004,
            baseline_seconds=0.002,
            replica_lags={"r1": 12.5},
        )
    return found


def searched(survivors: int) -> dict[str, object]:
    return {"survivors": survivors, "controls": {"have_passed": True}}


def scrape(client: Client) -> dict[tuple[str, ...], float]:
    response = client.get("/rotator/metrics")
    assert response.status_code == 200
    assert response["Content-Type"].startswith("text/plain; version=0.0.4")
    return {
        (
            sample.name,
            *(value for name, value in sorted(sample.labels.items()) if name != "rotation"),
        ): sample.value
        for family in parser.text_string_to_metric_families(response.content.decode())
        for sample in family.samples
    }


def test_they_equal_the_database(client: Client, rotation: Rotation) -> None:
    found = scrape(client)
    heartbeat = rotation.updated_at.timestamp()
    expected = {
        ("rotator_rotated_rows_total",): 12_000,
        ("rotator_planned_rows",): 34_000,
        ("rotator_ranges_total", "completed"): 4,
        ("rotator_ranges_total", "deferred"): 3,
        ("rotator_ranges_total", "retried"): 2,
        ("rotator_workers",): 3,
        ("rotator_throttled", "pause"): 1,
        ("rotator_throttled_seconds_total", "pause"): 5,
        ("rotator_throttled_seconds_total", "replica lag of r1"): 10,
        ("rotator_probe_duration_seconds", "commit"): 0.004,
        ("rotator_probe_duration_seconds", "baseline"): 0.002,
        ("rotator_replica_lag_seconds", "r1"): 12.5,
        ("rotator_heartbeat_timestamp_seconds",): pytest.approx(heartbeat, abs=0.001),
        ("rotator_info", "default", "db1", "running", "shop.Order.api_key", "0"): 1,
    }
    assert found == expected


@pytest.mark.skipif(not PROMTOOL, reason="There is no promtool: install Debian's package prometheus.")
def test_promtool_has_no_complaint(client: Client, rotation: Rotation) -> None:
    Ledger.objects.create(rotation=rotation, salt=b"salt", started_xid=1)
    Verification.objects.create(rotation=rotation, finished_at=timezone.now(), result=searched(0))
    text = client.get("/rotator/metrics").content
    assert b"rotator_survivors{" in text
    checked = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=text, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_a_dead_owner_has_no_workers(client: Client, rotation: Rotation) -> None:
    Rotation.objects.filter(pk=rotation.pk).update(updated_at=timezone.now() - timedelta(seconds=30))
    found = scrape(client)
    assert found["rotator_workers",] == 0
    assert not any(name == "rotator_throttled" for name, *_ in found)


def test_helpers_are_counted_with_celery(client: Client, rotation: Rotation) -> None:
    now = timezone.now()
    for expires_at in (None, now - timedelta(seconds=1), now + timedelta(seconds=60)):
        Helper.objects.create(rotation=rotation, expires_at=expires_at)
    assert scrape(client)["rotator_workers",] == 1


def test_survivors_are_those_of_the_latest_finished_search(client: Client, rotation: Rotation) -> None:
    assert ("rotator_survivors",) not in scrape(client)
    Ledger.objects.create(rotation=rotation, salt=b"salt", started_xid=1)
    for survivors, repairs, finished_at in (
        (7, False, timezone.now()),
        (3, False, timezone.now()),
        (5, True, timezone.now()),
        (1, False, None),
    ):
        Verification.objects.create(
            rotation=rotation,
            survivors=survivors,
            repairs=repairs,
            finished_at=finished_at,
            result=searched(survivors),
        )
    assert scrape(client)["rotator_survivors",] == 3


@pytest.mark.parametrize(
    "result", [{"survivors": None, "controls": None}, {"survivors": 0, "controls": {"have_passed": False}}]
)
def test_survivors_are_left_out_while_unknown(
    client: Client, rotation: Rotation, result: dict[str, object]
) -> None:
    Ledger.objects.create(rotation=rotation, salt=b"salt", started_xid=1)
    Verification.objects.create(rotation=rotation, finished_at=timezone.now(), result=result)
    assert ("rotator_survivors",) not in scrape(client)


@pytest.mark.usefixtures("rotation")
def test_atomic_requests_do_not_commit_a_scrape(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict, name="ATOMIC_REQUESTS", value=True)
    with CaptureQueriesContext(connection) as queries:
        scrape(client)
    statements = [each["sql"].partition(" ")[0] for each in queries.captured_queries]
    assert statements.count("SAVEPOINT") == 1
    assert statements[-2:] == ["ROLLBACK", "RELEASE"]


def test_old_rotations_are_left_out(client: Client, rotation: Rotation) -> None:
    finished = Rotation.objects.filter(pk=rotation.pk)
    finished.update(status="completed", finished_at=timezone.now() - timedelta(hours=1))
    assert scrape(client)["rotator_rotated_rows_total",] == 12_000
    finished.update(finished_at=timezone.now() - timedelta(hours=25))
    assert scrape(client) == {}


def test_no_key_is_a_label(client: Client, rotation: Rotation) -> None:
    Rotation.objects.filter(pk=rotation.pk).update(error="row [48151623] is rejected", bound=[48_151_623])
    assert b"48151623" not in client.get("/rotator/metrics").content
