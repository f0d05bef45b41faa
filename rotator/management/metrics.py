"""Metrics of rotations for Prometheus, read from the database at each scrape.

So they are right with several web processes, with Celery, and after the owner has died.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from django.db.models.functions import Now
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import InfoMetricFamily as Info
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from rotator.management.rotation import cursor_of, find_rotations, stored
from rotator.models import CompletedRange, Helper, Measurement, Rotation, Verification
from rotator.postgres.control import GAP_SECONDS, HELD_SECONDS

# A rotation is exported for this long after its end: otherwise the number of series would only grow.
FINISHED_FOR: Final = timedelta(hours=24)


def metrics(database: str) -> bytes:
    """Return the metrics of the unfinished rotations and of those that finished in the last day."""
    found, scrape = find_rotations(database), _Scrape()
    finished_lately = found.filter(finished_at__gt=Now() - FINISHED_FOR)
    for rotation in found.filter(status__in=Rotation.UNFINISHED) | finished_lately:
        scrape.add(rotation)
    return generate_latest(scrape)


class _Scrape(Collector):
    """The metrics of one scrape, in the order in which they are exported."""

    def __init__(self) -> None:
        of = ["rotation"]
        self.info = Info("rotator", "A rotation, its status and its latest owner.", labels=of)
        self.rows = Counter("rotator_rotated_rows", "Completed rows.", labels=of)
        self.planned = Gauge("rotator_planned_rows", "Rows up to the bound.", labels=of)
        ranges = "Ranges that were completed, deferred or retried."
        self.ranges = Counter("rotator_ranges", ranges, labels=[*of, "outcome"])
        workers = "Workers that may write now; with Celery, tasks that help."
        self.workers = Gauge("rotator_workers", workers, labels=of)
        reasons = "1 for each reason that holds the rotation now."
        self.throttled = Gauge("rotator_throttled", reasons, labels=[*of, "reason"])
        held = "The time for which a reason held it."
        self.throttled_seconds = Counter("rotator_throttled_seconds", held, labels=[*of, "reason"])
        commits = "The 90th percentile of the time of a small commit, with and without the rotation."
        self.probes = Gauge("rotator_probe_duration_seconds", commits, labels=[*of, "kind"])
        self.lags = Gauge("rotator_replica_lag_seconds", "The lag of a replica.", labels=[*of, "replica"])
        survivors = "Rows with an old value, in the latest verification."
        self.survivors = Gauge("rotator_survivors", survivors, labels=of)
        heartbeat = "The time of the owner's latest heartbeat."
        self.heartbeat = Gauge("rotator_heartbeat_timestamp_seconds", heartbeat, labels=of)

    def collect(self) -> Iterator[Metric]:
        yield from vars(self).values()

    def add(self, rotation: Rotation) -> None:
        """Add one rotation to each of them."""
        number = str(rotation.pk)
        self.info.add_metric(
            [number],
            {
                "target": rotation.target,
                "database": rotation.database,
                "status": rotation.status,
                "host": rotation.owner_host,
                "version": rotation.version,
            },
        )
        self.rows.add_metric([number], rotation.rows_done)
        self.planned.add_metric([number], rotation.rows_total)
        self.heartbeat.add_metric([number], rotation.updated_at.timestamp())
        self.ranges.add_metric([number, "completed"], stored(CompletedRange, rotation).count())
        self.ranges.add_metric([number, "deferred"], rotation.deferrals)
        self.ranges.add_metric([number, "retried"], rotation.retries)
        with cursor_of(rotation) as cursor:
            cursor.execute(HELD_SECONDS, {"rotation": rotation.pk, "gap": GAP_SECONDS, "limit": None})
            for reason, seconds in cursor.fetchall():
                self.throttled_seconds.add_metric([number, reason], seconds)
        searches = stored(Verification, rotation).filter(finished_at__isnull=False, repairs=False)
        latest = searches.order_by("-pk").first()
        if rotation.ledger_row and latest and latest.proved_survivors is not None:
            self.survivors.add_metric([number], latest.proved_survivors)
        self._add_present(rotation, number)

    def _add_present(self, rotation: Rotation, number: str) -> None:
        """Add what only holds while a process works on the rotation."""
        is_worked_on = rotation.status == Rotation.Status.RUNNING and rotation.has_owner
        latest = stored(Measurement, rotation).order_by("-at", "-pk").first()
        if not is_worked_on or latest is None:
            self.workers.add_metric([number], 0)
            return
        helpers = stored(Helper, rotation)
        alive = helpers.filter(expires_at__gt=Now()).count()
        self.workers.add_metric([number], alive if helpers.exists() else latest.workers)
        for reason in filter(None, latest.held_by.split("\n")):
            self.throttled.add_metric([number, reason], 1)
        for kind, value in (("commit", latest.commit_seconds), ("baseline", latest.baseline_seconds)):
            if value is not None:
                self.probes.add_metric([number, kind], value)
        for replica, lag in latest.replica_lags.items():
            self.lags.add_metric([number, replica], lag)
