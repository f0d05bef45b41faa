"""Measure the page of a rotation with many checkpoints: the time of its JSON view, and its size."""

import argparse
import os
import time
from typing import Final

import django
from django.db import connection
from harness import Server, add_numbers, at_least_one, parser_for, run_script
from presenting import Machine, Spread, write_json

LIMIT_SECONDS: Final = 0.2
LIMIT_BYTES: Final = 100_000
_MILLISECONDS: Final = 1000
_KILOBYTE: Final = 1000
_USER: Final = "page-benchmark"


def main() -> None:
    """Read the options and run."""
    parser = parser_for(
        "Measure the page of a rotation that has many checkpoints and has run for long: the time of its JSON "
        "view, in the process that measures, and the size of both answers.",
        repetitions=20,
        rows=None,
    )
    add_numbers(
        parser,
        at_least_one,
        ("checkpoints", 500_000, "N", "the number of checkpoints"),
        ("hours", 168, "N", "the time of the rotation, measured every 5 s"),
    )
    options = parser.parse_args()
    run_script(lambda server: _compare(server, options), server=options.server)


def _compare(server: Server, options: argparse.Namespace) -> bool:
    machine = Machine.of(server)
    print(machine)
    os.environ["DATABASE_URL"] = server.tickets(1).url
    django.setup()
    times, state_bytes, page_bytes = measure(options)
    connection.close()
    seconds = Spread.of(times)
    print(
        f"{options.checkpoints:,} checkpoints, {options.hours} h of measurements: the JSON view has "
        f"{state_bytes / _KILOBYTE:.0f} kB, the page {page_bytes / _KILOBYTE:.0f} kB"
    )
    checks = (
        ("the JSON view, ms", seconds.median * _MILLISECONDS, LIMIT_SECONDS * _MILLISECONDS),
        ("the page, kB", page_bytes / _KILOBYTE, LIMIT_BYTES / _KILOBYTE),
    )
    for name, found, limit in checks:
        print(f"{name}: {found:.0f}, limit {limit:.0f}: {'holds' if found <= limit else 'does not hold'}")
    write_json(options.json, machine, seconds=times, state_bytes=state_bytes, page_bytes=page_bytes)
    return all(found <= limit for _, found, limit in checks)


def measure(options: argparse.Namespace) -> tuple[list[float], int, int]:
    """Return the seconds of each answer of the JSON view, its bytes, and the bytes of the page."""
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
    return times, len(found.content), len(page.content)


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
    main()
