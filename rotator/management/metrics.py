"""Metrics of rotations for Prometheus, read from the database at each scrape.

So they are right with several web processes, with Celery, and after the owner has died.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final

from django.db.models.functions import Now
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from rotator.management.rotation import (
    cursor_of,
    find_rotations,
    is_dead,
    is_silent,
    ledger_of,
    stored,
    survivors_of,
)
from rotator.models import CompletedRange, Helper, Measurement, Rotation, Verification
from rotator.postgres.measurements import GAP_SECONDS, HELD_SECONDS

# A rotation is exported for this long after its end: otherwise the number of series would only grow.
FINISHED_FOR: Final = timedelta(hours=24)


def metrics(database: str) -> bytes:
    """Return the metrics of the unfinished rotations and of those that finished in the last day.

    Args:
        database: Django's alias of the database with the rotator's tables.
    """
    # Without a registry, which would describe the collector at its registration: that reads the database.
    return generate_latest(RotationCollector(database))


class RotationCollector(Collector):
    """Reads the metrics of the rotations of one database."""

    def __init__(self, database: str) -> None:
        self._database = database

    def collect(self) -> Iterator[Metric]:
        """Read the metrics now."""
        families = _Families()
        found = find_rotations(self._database)
        finished_lately = found.filter(finished_at__gt=Now() - FINISHED_FOR)
        for rotation in found.filter(status__in=Rotation.UNFINISHED) | finished_lately:
            self._add(families, rotation)
        yield from families.all

    def _add(self, families: "_Families", rotation: Rotation) -> None:
        number = str(rotation.pk)
        families.info.add_metric(
            [number],
            {
                "target": rotation.target,
                "database": rotation.database,
                "status": rotation.status,
                "host": rotation.owner_host,
                "version": rotation.version,
            },
        )
        families.rows.add_metric([number], rotation.rows_done)
        families.planned.add_metric([number], rotation.rows_total)
        families.heartbeat.add_metric([number], rotation.updated_at.timestamp())
        ranges = stored(CompletedRange, rotation).count()
        for outcome, value in (
            ("completed", ranges),
            ("deferred", rotation.deferrals),
            ("retried", rotation.retries),
        ):
            families.ranges.add_metric([number, outcome], value)
        with cursor_of(rotation) as cursor:
            cursor.execute(HELD_SECONDS, {"rotation": rotation.pk, "gap": GAP_SECONDS, "limit": None})
            for reason, seconds in cursor.fetchall():
                families.throttled_seconds.add_metric([number, reason], seconds)
        searches = stored(Verification, rotation).filter(finished_at__isnull=False, repairs=False)
        if ledger_of(rotation) and (latest := searches.order_by("-pk").first()):
            survivors = survivors_of(latest)
            if survivors is not None:
                families.survivors.add_metric([number], survivors)
        self._add_present(families, rotation)

    def _add_present(self, families: "_Families", rotation: Rotation) -> None:
        """Add what only holds while a process works on the rotation."""
        number = str(rotation.pk)
        is_running = rotation.status == Rotation.Status.RUNNING
        latest = stored(Measurement, rotation).order_by("-at", "-pk").first()
        if not is_running or is_silent(rotation) or is_dead(rotation) or latest is None:
            families.workers.add_metric([number], 0)
            return
        helpers = stored(Helper, rotation)
        is_distributed = helpers.exists()
        alive = helpers.filter(expires_at__gt=Now()).count()
        families.workers.add_metric([number], alive if is_distributed else latest.workers)
        for reason in latest.held_by.split("\n") if latest.held_by else []:
            families.throttled.add_metric([number, reason], 1)
        for kind, value in (("commit", latest.commit_seconds), ("baseline", latest.baseline_seconds)):
            if value is not None:
                families.probes.add_metric([number, kind], value)
        for replica, lag in latest.replica_lags.items():
            families.lags.add_metric([number, replica], lag)


class _Families:
    """The metrics of one scrape."""

    def __init__(self) -> None:
        of = ["rotation"]
        self.info = InfoMetricFamily("rotator", "A rotation, its status and its latest owner.", labels=of)
        self.rows = CounterMetricFamily("rotator_rotated_rows", "Completed rows.", labels=of)
        self.planned = GaugeMetricFamily("rotator_planned_rows", "Rows up to the upper bound.", labels=of)
        self.ranges = CounterMetricFamily(
            "rotator_ranges", "Ranges that were completed, deferred or retried.", labels=[*of, "outcome"]
        )
        self.workers = GaugeMetricFamily(
            "rotator_workers", "Workers that may write now; with Celery, tasks that help.", labels=of
        )
        self.throttled = GaugeMetricFamily(
            "rotator_throttled", "1 for each reason that holds the rotation now.", labels=[*of, "reason"]
        )
        self.throttled_seconds = CounterMetricFamily(
            "rotator_throttled_seconds", "The time for which a reason held it.", labels=[*of, "reason"]
        )
        self.probes = GaugeMetricFamily(
            "rotator_probe_duration_seconds",
            "The 90th percentile of the time of a small commit, with and without the rotation.",
            labels=[*of, "kind"],
        )
        self.lags = GaugeMetricFamily(
            "rotator_replica_lag_seconds", "The lag of a replica.", labels=[*of, "replica"]
        )
        self.survivors = GaugeMetricFamily(
            "rotator_survivors", "Rows with an old value, in the latest verification.", labels=of
        )
        self.heartbeat = GaugeMetricFamily(
            "rotator_heartbeat_timestamp_seconds", "The time of the owner's latest heartbeat.", labels=of
        )

    @property
    def all(self) -> tuple[Metric, ...]:
        """All of them, in the order in which they are exported."""
        return tuple(vars(self).values())
