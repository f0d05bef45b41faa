"""The metrics equal the database, for each kind of owner and each web process."""

import sys
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from django.db.models.functions import Now

from rotator.management.rotation import find_rotations
from rotator.models import Helper, Rotation
from rotator.postgres.owner import SILENT_SECONDS
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.celery_hosts import Hosts, running_hosts
from tests.acceptance.harness import Commands, checkpoints, wait_for_checkpoints, wait_until

parser = pytest.importorskip("prometheus_client.parser", reason="The extra metrics is not installed.")

pytestmark = pytest.mark.slow

ROWS = 4_000
ALWAYS = (
    "rotator_rotated_rows_total",
    "rotator_planned_rows",
    "rotator_ranges_total completed",
    "rotator_ranges_total deferred",
    "rotator_ranges_total retried",
    "rotator_heartbeat_timestamp_seconds",
)


class Site:
    """A web process."""

    def __init__(self, commands: Commands) -> None:
        process = commands.start(program=(sys.executable, "-m", "tests.acceptance.metrics_site"))
        wait_until(lambda: process.out.endswith("\n"), "the site has a port")
        self._address = f"http://127.0.0.1:{int(process.out)}/rotator/metrics"

    def text(self) -> str:
        with urlopen(self._address) as response:  # noqa: S310 - our own address
            return str(response.read().decode())

    def read(self) -> dict[str, float]:
        """Return each sample of the only rotation, by its name and its other labels."""
        return {
            " ".join(
                [sample.name, *(value for label, value in sample.labels.items() if label != "rotation")]
            ): sample.value
            for family in parser.text_string_to_metric_families(self.text())
            for sample in family.samples
            if sample.name != "rotator_info"
        }


@pytest.fixture
def sites(commands: Commands) -> tuple[Site, Site]:
    return Site(commands), Site(commands)


@pytest.fixture
def hosts(commands: Commands) -> Iterator[Hosts]:
    yield from running_hosts(commands)


def stored() -> dict[str, float]:
    rotation = Rotation.objects.get()
    values = (
        rotation.rows_done,
        rotation.rows_total,
        checkpoints(),
        rotation.deferrals,
        rotation.retries,
        rotation.updated_at.timestamp(),
    )
    return dict(zip(ALWAYS, values, strict=True))


def assert_between(sites: tuple[Site, Site]) -> None:
    """Compare both web processes with the database before and after: no figure ever decreases."""
    for site in sites:
        before = stored()
        found = site.read()
        after = stored()
        assert {name: before[name] <= found[name] + 1e-6 <= after[name] + 2e-6 for name in ALWAYS} == (
            dict.fromkeys(ALWAYS, True)
        )


def assert_equal(sites: tuple[Site, Site], **others: float) -> None:
    for site in sites:
        found = {
            name: value
            for name, value in site.read().items()
            if not name.startswith(("rotator_throttled_seconds", "rotator_probe"))
        }
        assert found == pytest.approx({**stored(), **others}, abs=1e-3, rel=0)


def test_locally_and_after_the_death_of_the_owner(commands: Commands, sites: tuple[Site, Site]) -> None:
    audited_tickets(ROWS)
    slow_down(0.05)
    # The reads of the sites count as an application at work.
    running = commands.start("--batch=20", "--concurrency=2", "--pace=full")
    for count in (20, 40, 60):
        wait_for_checkpoints(count)
        assert_between(sites)
    assert {site.read()["rotator_workers"] for site in sites} == {2}

    running.kill()
    wait_until(lambda: find_rotations("default").get().silent_seconds > SILENT_SECONDS, "the owner is silent")
    assert_equal(sites, rotator_workers=0)

    speed_up()
    assert commands.start("--batch=20").wait().status == 0
    assert_equal(sites, rotator_workers=0)
    assert sites[0].read()["rotator_rotated_rows_total"] == ROWS


def test_with_celery(hosts: Hosts, sites: tuple[Site, Site]) -> None:
    pytest.importorskip("celery")
    audited_tickets(ROWS)
    slow_down(0.05)
    hosts.worker()
    hosts.worker()
    coordinator = hosts.coordinator("--batch=20")
    for count in (20, 40, 60):
        wait_for_checkpoints(count)
        assert_between(sites)
    tasks = Helper.objects.filter(expires_at__gt=Now())
    wait_until(lambda: tasks.count() == 2, "both workers help")
    assert {site.read()["rotator_workers"] for site in sites} == {2}
    speed_up()
    assert coordinator.wait().status == 0
    assert_equal(sites, rotator_workers=0)
