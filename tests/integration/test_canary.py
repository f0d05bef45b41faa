"""No value, old or new, and with HIDE_KEYS no key, is on the page, in its JSON, in metrics, or in logs."""

import json
import logging
import re

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.test import Client, override_settings
from django.urls import reverse

from rotator.models import Measurement, Rotation
from rotator.progress.lines import LogObserver
from tests.integration.outcomes import rotate_tickets
from tests.integration.rotation_tables import Database

pytest.importorskip("prometheus_client", reason="The extra metrics is not installed.")

pytestmark = pytest.mark.django_db(transaction=True)

REFUSED = 48_151_623


@pytest.mark.parametrize("hides_keys", [False, True])
def test_only_keys_are_shown_and_only_if_they_may_be(
    database: Database,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    *,
    hides_keys: bool,
) -> None:
    database.make_tickets(REFUSED - 50, REFUSED + 50)
    database.before_update(
        f"IF OLD.id = {REFUSED} THEN RAISE EXCEPTION 'no % for %', NEW.token, OLD.token; END IF; RETURN NEW;"
    )
    values = set(map(str, database.values().values()))
    with override_settings(ROTATOR={"HIDE_KEYS": hides_keys}), caplog.at_level(logging.DEBUG):
        stopped = rotate_tickets(LogObserver(hides_keys=hides_keys), batch=10, prove=True, preflight=True)
        assert stopped.status == "failed"
        values |= set(map(str, database.values().values()))
        rotation = Rotation.objects.get()
        client = Client()
        client.force_login(User.objects.create_superuser("admin"))
        shown = {
            name: client.get(reverse(f"admin:rotator_rotation_{name}", args=[rotation.pk])).content.decode()
            for name in ("change", "state")
        }
        shown["list"] = client.get(reverse("admin:rotator_rotation_changelist")).content.decode()
        shown["metrics"] = client.get("/rotator/metrics").content.decode()
        call_command("rotations", str(rotation.pk), "--log")
        shown["--log"] = capsys.readouterr().out
        shown["records"] = "".join(
            json.dumps(vars(record), default=str) + record.getMessage()
            for record in caplog.records
            if record.name == "rotator"
        )
    assert len(values) == 201
    assert Measurement.objects.exists()
    assert "is rejected: raise_exception" in shown["records"]
    assert shown["metrics"].startswith("# HELP ")
    leaked = {
        name: [value for value in values if value in text or value.replace("-", "") in text]
        for name, text in shown.items()
    }
    assert leaked == {name: [] for name in shown}
    keys = {name for name, text in shown.items() if re.search(rf"(?<!\d){REFUSED}(?!\d)", text)}
    assert keys == (set() if hides_keys else {"change", "state", "records"})
