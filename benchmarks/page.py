"""Measure the page of a rotation with many checkpoints: the time of its JSON view, and its size."""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")

import django
from django.db import connection, transaction

LIMIT_SECONDS: Final = 0.2
LIMIT_BYTES: Final = 100_000
_USER: Final = "page-benchmark"


def main() -> int:
    """Print the figures, and return 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=500_000)
    parser.add_argument("--hours", type=int, default=168, help="the time of the rotation, measured every 5 s")
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    django.setup()
    # Everything is rolled back.
    with transaction.atomic():
        seconds, state_bytes, page_bytes = measure(options)
        transaction.set_rollback(True)
    is_met = seconds <= LIMIT_SECONDS and page_bytes <= LIMIT_BYTES
    print(
        f"{options.checkpoints:,} checkpoints, {options.hours} h of measurements: the JSON view takes"
        f" {seconds * 1000:.0f} ms (median of {options.repetitions}; limit {LIMIT_SECONDS * 1000:.0f} ms)"
        f" and has {state_bytes / 1000:.0f} kB; the page has {page_bytes / 1000:.0f} kB"
        f" (limit {LIMIT_BYTES / 1000:.0f} kB). {'Met.' if is_met else 'MISSED.'}"
    )
    return 0 if is_met else 1


def measure(options: argparse.Namespace) -> tuple[float, int, int]:
    """Return the median of the JSON view's seconds, its bytes, and the bytes of the page."""
    from django.conf import settings  # noqa: PLC0415 - after django.setup()
    from django.contrib.auth.models import User  # noqa: PLC0415
    from django.test import Client  # noqa: PLC0415
    from django.urls import reverse  # noqa: PLC0415

    from rotator import views  # noqa: PLC0415
    from rotator.models import Measurement, Rotation  # noqa: PLC0415

    # Each answer reads everything, and shares nothing with the one before.
    views.KEPT_SECONDS = 0.0
    settings.ALLOWED_HOSTS = ["testserver"]
    rotation = Rotation.objects.create(
        target="tickets.Ticket.token",
        table_name="public.benchmark",
        database="default",
        started_xid=1,
        version="0",
        bound=[1],
        rows_done=options.checkpoints,
        rows_total=2 * options.checkpoints,
    )
    fill(rotation.pk, options.checkpoints, options.hours * 3600)
    client = Client()
    client.force_login(User.objects.create_superuser(_USER))
    url = reverse("admin:rotator_rotation_state", args=[rotation.pk])
    times, found = [], client.get(url)
    for _ in range(options.repetitions):
        # The chart is read again after a new measurement only.
        Measurement.objects.create(rotation=rotation, rows_done=0, state="rotating", workers=4)
        began = time.perf_counter()
        found = client.get(url)
        times.append(time.perf_counter() - began)
    page = client.get(reverse("admin:rotator_rotation_change", args=[rotation.pk]))
    if (found.status_code, page.status_code) != (200, 200):
        raise SystemExit(f"The site answers with {found.status_code} and {page.status_code}.")
    return median(times), len(found.content), len(page.content)


def fill(rotation: int, checkpoints: int, seconds: int) -> None:
    """Insert checkpoints and measurements over these seconds until now."""
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO rotator_completedrange (rotation_id, after, through, rows, seconds, committed_at)"
            " SELECT %s, CASE WHEN n > 1 THEN jsonb_build_array(n - 1) END, jsonb_build_array(n), 2000, 0.05,"
            " clock_timestamp() - make_interval(secs => %s * (1 - n / %s::float8))"
            " FROM generate_series(1, %s) AS n",
            (rotation, seconds, checkpoints, checkpoints),
        )
        cursor.execute(
            "INSERT INTO rotator_measurement (rotation_id, at, rows_done, state, held_by, is_change, workers,"
            " commit_seconds, baseline_seconds, replica_lags, horizon_holders)"
            " SELECT %s, clock_timestamp() - make_interval(secs => %s - 5 * n), n * 1000, 'rotating',"
            " CASE WHEN n %% 200 < 10 THEN 'replica lag of r1' ELSE '' END, n %% 200 IN (0, 10), 4,"
            " 0.004, 0.002, '{}', '[]'"
            " FROM generate_series(0, %s / 5) AS n",
            (rotation, seconds, seconds),
        )
        cursor.execute("ANALYZE rotator_completedrange, rotator_measurement")


if __name__ == "__main__":
    sys.exit(main())
