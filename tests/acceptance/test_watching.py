"""The page, its JSON and the metrics of a real run: what its owner measures, and no value of the column."""

import json

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from rotator.events import ActionKind
from rotator.models import Control, Measurement, Rotation
from tests.acceptance.audit import audited_tickets, slow_down, speed_up
from tests.acceptance.harness import Commands, query, wait_for_checkpoints, wait_until

parser = pytest.importorskip("prometheus_client.parser", reason="The extra metrics is not installed.")

ROWS = 2_000


def tokens() -> set[str]:
    return {str(token) for (token,) in query("SELECT token::text FROM tickets_ticket")}


def shown(client: Client, rotation: Rotation) -> str:
    """Return everything that the site shows of the rotation."""
    pages = [
        client.get(reverse("admin:rotator_rotation_changelist")),
        client.get(reverse("admin:rotator_rotation_change", args=[rotation.pk])),
        client.get(reverse("admin:rotator_rotation_state", args=[rotation.pk])),
        client.get("/rotator/metrics"),
    ]
    assert [page.status_code for page in pages] == [200] * 4
    return "\n".join(page.content.decode() for page in pages)


def test_a_run_is_measured_and_shown_without_values(commands: Commands, client: Client) -> None:
    client.force_login(User.objects.create_superuser("alice"))
    audit = audited_tickets(ROWS)
    values = tokens()
    slow_down(0.2)
    running = commands.start("--batch=20", "--concurrency=2")
    wait_for_checkpoints(5)
    rotation = Rotation.objects.get()
    Control.change(rotation, ActionKind.PAUSED, {"paused": True}, by="alice")
    measured = Measurement.objects.filter(rotation=rotation)
    wait_until(lambda: measured.filter(held_by="pause").exists(), "the pause is measured")
    page = shown(client, rotation)
    assert "Not moving: paused by alice" in page
    assert f'rotator_throttled{{reason="pause",rotation="{rotation.pk}"}} 1.0' in page
    Control.change(rotation, ActionKind.PAUSE_ENDED, {"paused": False}, by="alice")
    latest = measured.order_by("-pk")
    wait_until(lambda: latest[0].held_by == "", "the end of the pause is measured")
    speed_up()
    assert running.wait().status == 0
    audit.assert_rotated()

    page = shown(client, rotation)
    assert f'rotator_rotated_rows_total{{rotation="{rotation.pk}"}} {float(ROWS)}' in page
    state = client.get(reverse("admin:rotator_rotation_state", args=[rotation.pk])).json()
    assert (state["tone"], state["percent"]) == ("done", 100)
    assert [band["text"].endswith("paused") for band in state["chart"]["bands"]] == [True]
    kept = json.dumps([[str(value) for value in row] for row in Measurement.objects.values_list()])
    assert {value for value in values | tokens() if value in page or value in kept} == set()
