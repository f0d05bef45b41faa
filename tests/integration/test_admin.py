"""The pages of rotations in Django's admin."""

import json
import re
from dataclasses import asdict
from datetime import timedelta

import pytest
from django.conf import settings
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext, override_settings
from django.urls import reverse
from django.utils import timezone

from rotator import views
from rotator.events import ActionKind, Findings, Sample, ServerFindings, TableFindings
from rotator.management.page import page_state
from rotator.management.rotation import facts_of, find_rotations
from rotator.models import Action, CompletedRange, Control, Ledger, Measurement, Rotation, Verification
from rotator.options import RunOptions, Selection

pytestmark = pytest.mark.django_db

KEY = 48_151_623


@pytest.fixture
def rotation() -> Rotation:
    return Rotation.objects.create(
        target="shop.Order.api_key",
        table_name="public.shop_order",
        database="default",
        started_xid=1,
        version="0",
        bound=[90_000],
        rows_done=12_000,
        rows_total=34_000,
        owner_user="app",
        owner_host="db1",
        owner_pid=42,
        options={"concurrency": 4, "batch": 500},
    )


@pytest.fixture(autouse=True)
def always_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "KEPT_SECONDS", 0.0)
    monkeypatch.setattr(views, "_viewers", {})


@pytest.fixture
def admin(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("admin"))
    return client


def viewer(*permissions: str) -> Client:
    user = User.objects.create_user("viewer", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client()
    client.force_login(user)
    return client


def page_of(client: Client, rotation: Rotation) -> str:
    response = client.get(reverse("admin:rotator_rotation_change", args=[rotation.pk]))
    assert response.status_code == 200
    return response.content.decode()


def state_of(client: Client, rotation: Rotation) -> dict[str, object]:
    response = client.get(reverse("admin:rotator_rotation_state", args=[rotation.pk]))
    assert response.status_code == 200
    found = response.json()
    assert isinstance(found, dict)
    return found


def headline_of(client: Client, rotation: Rotation) -> str:
    text = state_of(client, rotation)["text"]
    assert isinstance(text, dict)
    return f"{text['headline']} | {text['ends']} | {text['command']}"


def press(client: Client, rotation: Rotation, request: str, **values: object) -> str:
    """Press a button, and return the page that follows, which shows what became of it."""
    url = reverse("admin:rotator_rotation_control", args=[rotation.pk])
    shown = {"revision": 0, "request": request, **values}
    response = client.post(url, shown, follow=True)
    assert response.status_code == 200
    return response.content.decode()


def change(rotation: Rotation, **values: object) -> None:
    Rotation.objects.filter(pk=rotation.pk).update(**values)


def test_the_list_shows_how_far_each_is(admin: Client, rotation: Rotation) -> None:
    page = admin.get(reverse("admin:rotator_rotation_changelist"), {"q": "api_key"}).content.decode()
    for fact in (str(rotation.pk), "shop.Order.api_key", "12,000 of 34,000", "app on db1 (pid 42)", "UTC"):
        assert fact in page


def test_one_is_shown_and_not_changed(admin: Client, rotation: Rotation) -> None:
    page = page_of(admin, rotation)
    assert "shop.Order.api_key" in page
    assert ">12,000 of 34,000<" in page
    assert 'name="_save"' not in page
    url = reverse("admin:rotator_rotation_change", args=[rotation.pk])
    assert admin.post(url, {"target": "other"}).status_code == 403
    assert admin.get(reverse("admin:rotator_rotation_add")).status_code == 403
    assert admin.post(reverse("admin:rotator_rotation_delete", args=[rotation.pk])).status_code == 403
    assert admin.get(reverse("admin:rotator_rotation_change", args=[rotation.pk + 1])).status_code == 404


def test_nothing_is_inline(admin: Client, rotation: Rotation) -> None:
    page = page_of(admin, rotation)
    assert " style=" not in page
    assert "<style" not in page
    assert " on" not in page.replace("aria-", "").split("<body")[0]
    assert "<script>" not in page


def test_a_rotation_without_heartbeat_is_not_moving(admin: Client, rotation: Rotation) -> None:
    change(rotation, updated_at=timezone.now() - timedelta(seconds=22))
    shown = headline_of(admin, rotation)
    assert "Not moving: no heartbeat for 22 s" in shown
    assert "async_rotate shop.Order.api_key --database default --batch 500" in shown
    page = press(admin, rotation, "pause")
    assert "No process works on this rotation" in page
    assert not Control.objects.exists()


def test_page_and_commands_show_the_same_command(
    admin: Client, rotation: Rotation, capsys: pytest.CaptureFixture[str]
) -> None:
    options = RunOptions.checked(concurrency=1, lock_timeout="250ms", outage_budget="1h", prove=True)
    change(
        rotation,
        updated_at=timezone.now() - timedelta(hours=2),
        options=options.to_json(),
        selection=Selection(filters=(f"id__lt={KEY}",)).to_json(),
    )
    command = (
        f"python manage.py async_rotate shop.Order.api_key --database default --filter id__lt={KEY} "
        "--concurrency 1 --lock-timeout 250ms --outage-budget 1h --prove"
    )
    number = str(rotation.pk)
    assert headline_of(admin, rotation).endswith(f" | {command}")
    call_command("rotations", number)
    assert f"  resume     {command}\n" in capsys.readouterr().out
    with pytest.raises(CommandError, match=re.escape(f"Resume with: {command}")):
        call_command("rotations", number, "--follow")
    change(rotation, selection=Selection(leaked="list.txt").to_json())
    assert "--leaked list.txt --lock-timeout 250ms" in headline_of(admin, rotation)
    for status, finished_at in (("queued", None), ("completed", timezone.now())):
        change(rotation, status=status, finished_at=finished_at)
        assert headline_of(admin, rotation).endswith(" | ")
        call_command("rotations", number)
        assert "async_rotate" not in capsys.readouterr().out


def test_the_reason_of_a_throttle_is_shown(admin: Client, rotation: Rotation) -> None:
    reason = "replica lag of r1 14 s > 10 s; ends below 8.0 s"
    change(rotation, throttle_reason=reason, throttled_since=timezone.now() - timedelta(seconds=65))
    text = state_of(admin, rotation)["text"]
    assert isinstance(text, dict)
    assert reason in text["headline"]
    assert "(1 min 05 s)" in text["since"]
    assert (text["rate"], text["eta"]) == ("0 rows/s", "unknown")


def test_the_rate_is_that_of_the_checkpoints(admin: Client, rotation: Rotation) -> None:
    now = timezone.now()
    change(rotation, updated_at=now, owned_since=now - timedelta(seconds=11))
    # Before its owner, another one had it.
    CompletedRange.objects.create(
        rotation=rotation, through=[0], rows=500, seconds=0.1, committed_at=now - timedelta(hours=1)
    )
    for number in range(40):
        CompletedRange.objects.create(
            rotation=rotation,
            after=[number],
            through=[number + 1],
            rows=500,
            seconds=0.1,
            committed_at=now - timedelta(seconds=(39 - number) / 4),
        )
    found = state_of(admin, rotation)
    facts, text = found["facts"], found["text"]
    assert isinstance(facts, dict)
    assert isinstance(text, dict)
    assert facts["rows_per_second"] == pytest.approx(2000, rel=0.1)
    assert facts["eta_seconds"] == pytest.approx(11, rel=0.2)
    assert text["headline"].startswith("Moving: ")


def test_many_small_ranges_have_a_rate(admin: Client, rotation: Rotation) -> None:
    """A fast server commits about a thousand of the smallest ranges in a second, and a rate needs two."""
    change(rotation, owned_since=timezone.now() - timedelta(hours=1))
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO rotator_completedrange (rotation_id, after, through, rows, seconds, committed_at)"
            " SELECT %s, to_jsonb(ARRAY[i]), to_jsonb(ARRAY[i + 1]), 10, 0.001,"
            " statement_timestamp() - (5000 - i) * interval '1 ms' FROM generate_series(1, 5000) AS i",
            (rotation.pk,),
        )
    facts = state_of(admin, rotation)["facts"]
    assert isinstance(facts, dict)
    assert facts["rows_per_second"] == pytest.approx(10_000, rel=0.1)


def test_it_never_shows_more_than_all(admin: Client, rotation: Rotation) -> None:
    change(rotation, rows_done=70_000)
    found = state_of(admin, rotation)
    assert found["percent"] == 100
    assert "34,000 of 34,000" in str(found["text"])


def test_a_chart_is_drawn_of_what_was_measured(admin: Client, rotation: Rotation) -> None:
    began = timezone.now() - timedelta(seconds=300)
    for number in range(60):
        is_held = 20 <= number < 30
        Measurement.objects.create(
            rotation=rotation,
            at=began + timedelta(seconds=5 * number),
            rows_done=1000 * (number - max(0, min(number, 30) - 20)),
            state="throttled" if is_held else "rotating",
            held_by="replica lag of r1" if is_held else "",
            is_change=number in (0, 20, 30),
            workers=4,
            commit_seconds=0.004,
            baseline_seconds=0.002,
        )
    chart = state_of(admin, rotation)["chart"]
    assert isinstance(chart, dict)
    assert chart["rows_top"] == "200 rows/s"
    assert chart["latency_top"] == "5 ms"
    assert chart["rows"].count("M") == 1
    ((band),) = chart["bands"]
    assert "for 50 s: replica lag of r1" in band["text"]
    assert float(band["x"].rstrip("%")) == pytest.approx(33.9, abs=0.5)


def test_a_line_ends_where_a_figure_was_not_measured(admin: Client, rotation: Rotation) -> None:
    for number in range(20):
        Measurement.objects.create(
            rotation=rotation,
            at=timezone.now() + timedelta(seconds=5 * number),
            rows_done=100 * number,
            state="rotating",
            workers=4,
            commit_seconds=0.004 if number in (2, 10, 11) else None,
        )
    chart = state_of(admin, rotation)["chart"]
    assert isinstance(chart, dict)
    assert chart["commits"].count("M") == 2
    assert chart["rows"].count("M") == 1


def test_a_label_does_not_cover_the_next_band(admin: Client, rotation: Rotation) -> None:
    began = timezone.now() - timedelta(seconds=200)
    # Two bands next to each other, and one with space after it.
    for number, held in enumerate(["", "a", "", "b", "", "", "", "", "", "", "", ""]):
        Measurement.objects.create(
            rotation=rotation,
            at=began + timedelta(seconds=6 * number),
            rows_done=0,
            state="rotating",
            held_by=held,
            is_change=number < 5,
            workers=4,
        )
    chart = state_of(admin, rotation)["chart"]
    assert isinstance(chart, dict)
    assert [band["label"] for band in chart["bands"]] == ["a", "b"]
    Measurement.objects.create(
        rotation=rotation, at=began + timedelta(seconds=600), rows_done=0, state="rotating", workers=4
    )
    chart = state_of(admin, rotation)["chart"]
    assert isinstance(chart, dict)
    assert [band["label"] for band in chart["bands"]] == ["", "b"]


def test_a_chart_is_read_again_only_after_another_measurement(rotation: Rotation) -> None:
    def measure(rows_done: int) -> None:
        Measurement.objects.create(rotation=rotation, rows_done=rows_done, state="rotating", workers=4)

    def queries_of_chart() -> int:
        with CaptureQueriesContext(connection) as queries:
            summary = page_state(find_rotations("default").get())["chart"]["summary"]  # type: ignore[index] # a dictionary
        summaries.append(summary)
        return sum("generate_series" in each["sql"] for each in queries.captured_queries)

    summaries = list[str]()
    measure(0)
    assert [queries_of_chart(), queries_of_chart()] == [1, 0]
    measure(5_000)
    assert [queries_of_chart(), queries_of_chart()] == [1, 0]
    assert summaries[0] == summaries[1] != summaries[2] == summaries[3]


def test_pause_is_requested_logged_and_shown(
    admin: Client, rotation: Rotation, capsys: pytest.CaptureFixture[str]
) -> None:
    page = press(admin, rotation, "pause")
    assert "Requested: pause (revision 1)" in page
    assert "requested, not applied yet" in page
    assert "Not moving: paused by admin" in page
    assert Control.objects.get().paused
    assert Action.objects.get().by == "admin"
    assert "pause" in LogEntry.objects.get().get_change_message()
    change(rotation, applied_revision=1, applied_at=timezone.now())
    text = state_of(admin, rotation)["text"]
    assert isinstance(text, dict)
    assert re.fullmatch(r"paused: revision 1 by admin at \d{4}-.* UTC, applied", text["requested"])
    call_command("rotations", str(rotation.pk))
    assert f"  control    {text['requested']}\n" in capsys.readouterr().out
    assert "Requested: resume (revision 2)" in press(admin, rotation, "resume", revision=1)
    assert not Control.objects.get().paused


def test_limits_are_set(admin: Client, rotation: Rotation) -> None:
    assert "set pace gentle, concurrency 2" in press(
        admin, rotation, "set", pace="gentle", concurrency="2", batch=""
    )
    found = Control.objects.get()
    assert (found.pace, found.concurrency, found.batch) == ("gentle", 2, None)
    assert "Not requested." in press(admin, rotation, "set", revision=1, concurrency="9")
    assert "Not requested." in press(admin, rotation, "set", revision=1)
    assert Control.objects.get().revision == 1


def test_the_older_of_two_tabs_is_refused(admin: Client, rotation: Rotation) -> None:
    Control.change(rotation, ActionKind.PAUSED, {"paused": True}, by="bob")
    page = press(admin, rotation, "set", concurrency="2", revision=0)
    assert "bob has changed this rotation since you have seen it" in page
    assert Control.objects.get().concurrency is None


def test_cancel_needs_the_name_of_the_target(admin: Client, rotation: Rotation) -> None:
    assert "Not requested." in press(admin, rotation, "cancel", target="shop.Order")
    assert not Control.objects.exists()
    press(admin, rotation, "cancel", target="shop.Order.api_key")
    assert Control.objects.get().cancel_revision == 1


def test_permissions_are_separate(rotation: Rotation) -> None:
    client = viewer("view_rotation")
    page = page_of(client, rotation)
    assert "You have no permission to control rotations." in page
    assert 'value="pause"' not in page
    for name, numbers in (("rotator_rotation_control", [rotation.pk]), ("rotator_rotation_control_all", [])):
        assert client.post(reverse(f"admin:{name}", args=numbers), {"request": "pause"}).status_code == 403
    assert not Control.objects.exists()


def test_users_without_permission_see_nothing(client: Client, rotation: Rotation) -> None:
    for name in ("change", "state"):
        response = client.get(reverse(f"admin:rotator_rotation_{name}", args=[rotation.pk]))
        assert response.status_code == 302
    stranger = viewer("view_user")
    for name in ("change", "state"):
        response = stranger.get(reverse(f"admin:rotator_rotation_{name}", args=[rotation.pk]))
        assert response.status_code == 403


def test_a_form_of_another_site_is_refused(rotation: Rotation) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("admin"))
    url = reverse("admin:rotator_rotation_control", args=[rotation.pk])
    assert client.post(url, {"request": "pause", "revision": 0}).status_code == 403
    assert not Control.objects.exists()


@pytest.mark.usefixtures("rotation")
def test_all_are_paused_and_resumed(admin: Client) -> None:
    Rotation.objects.create(
        target="shop.Order.other", started_xid=1, version="0", database="default", status="interrupted"
    )
    url = reverse("admin:rotator_rotation_control_all")
    assert (
        "Requested for 1 rotation: pause."
        in admin.post(url, {"request": "pause"}, follow=True).content.decode()
    )
    assert Control.objects.get().paused
    admin.post(url, {"request": "resume"})
    assert not Control.objects.get().paused


def test_findings_vacuums_and_survivors_are_shown(admin: Client, rotation: Rotation) -> None:
    found = state_of(admin, rotation)
    assert (found["preflight"], found["proof"]) == ([], [])
    assert dict(found["server"])["VACUUM"] == "no run"  # type: ignore[call-overload] # pairs
    findings = Findings(
        target="shop.Order.api_key",
        database="default",
        server_name="app@db1:5432/shop",
        table_name="public.shop_order",
        concurrency=4,
        rows_left=34_000,
        unfinished=None,
        table=TableFindings(
            rows=34_000, rows_is_exact=True, heap_bytes=8192, indexes=(), triggers=("audit",), kept=None
        ),
        server=ServerFindings(
            max_wal_size_bytes=2**30,
            checkpoint_timeout_seconds=300,
            full_page_writes=True,
            archiving="",
            replicas=("r1, 2 s behind",),
            slots=(),
            holders=(),
            log_settings=(),
        ),
        sample=Sample(),
        bypassed=(),
        selection=f"--filter id__lt={KEY}",
    )
    # Of an older version, which has not saved what this one needs.
    change(rotation, findings={name: value for name, value in asdict(findings).items() if name != "table"})
    assert state_of(admin, rotation)["preflight"] == []
    change(rotation, findings=asdict(findings) | {"of_a_newer_version": 1})
    for seconds in (1.0, 2.0):
        Action.objects.create(rotation=rotation, kind="vacuumed", by="app", detail=f"{seconds} s")
    Ledger.objects.create(rotation=rotation, salt=b"salt", started_xid=1, state="ready", entries=34_000)
    search = Verification.objects.create(
        rotation=rotation, rows=20_000, survivors=2, survivor_keys=[f"[{KEY}]"]
    )
    found = state_of(admin, rotation)
    shown = {**dict(found["preflight"]), **dict(found["server"]), **dict(found["proof"])}  # type: ignore[call-overload] # pairs
    assert shown["triggers"] == "each update fires audit"
    assert shown["replicas"] == "r1, 2 s behind"
    assert str(KEY) not in str(found["preflight"])
    assert shown["VACUUM"].startswith("2 runs, the latest ")
    Action.objects.bulk_create(Action(rotation=rotation, kind="paused") for _ in range(60))
    found_later = dict(state_of(admin, rotation)["server"])  # type: ignore[call-overload] # pairs
    # The log that is shown has none of them any more.
    assert found_later["VACUUM"] == shown["VACUUM"]
    assert shown["ledger"] == "ready, 34,000 entries"
    assert shown["guard"] == "no guard"
    assert shown["survivors"].startswith("2 in 20,000 rows so far, since ")
    Verification.objects.filter(pk=search.pk).update(
        rows=34_000, finished_at=timezone.now(), result={"survivors": None, "controls": None}
    )
    page = page_of(admin, rotation)
    assert "<dt>survivors</dt><dd>unknown, " in page
    assert str(KEY) not in page.partition("<dt>survivors</dt>")[2]
    result = {"is_verified": False, "survivors": 2, "controls": {"have_passed": True}}
    Verification.objects.filter(pk=search.pk).update(result=result)
    page = page_of(admin, rotation)
    assert "2 in 34,000 rows, " in page
    assert "<dt>verified</dt><dd>no</dd>" in page
    assert f"<dt>first survivors</dt><dd>[{KEY}]</dd>" in page


def test_the_ledger_costs_no_query_of_its_own(rotation: Rotation) -> None:
    Ledger.objects.create(rotation=rotation, salt=b"salt", started_xid=1)
    rotations = list(find_rotations("default"))
    with CaptureQueriesContext(connection) as queries:
        facts = [facts_of(each) for each in rotations]
    assert [each["ledger"] for each in facts] == ["loading"]
    assert len(queries) == 0


def test_viewers_share_what_is_read_in_one_transaction_without_a_commit(
    admin: Client, rotation: Rotation, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = reverse("admin:rotator_rotation_state", args=[rotation.pk])
    with CaptureQueriesContext(connection) as first:
        admin.get(url)
    statements = [each["sql"] for each in first.captured_queries]
    # Django reads the session and the user inside, too.
    assert statements[0].startswith("SAVEPOINT")
    assert statements[-2].startswith("ROLLBACK TO SAVEPOINT")
    monkeypatch.setattr(views, "KEPT_SECONDS", 3600.0)
    admin.get(url)
    change(rotation, rows_done=13_000)
    with CaptureQueriesContext(connection) as following:
        assert state_of(admin, rotation)["facts"]["rows"] == 12_000  # type: ignore[index] # a dictionary
    assert len(following) == len(["begin", "session", "user", "roll back", "release"])
    monkeypatch.setattr(views, "KEPT_SECONDS", 0.0)
    assert state_of(admin, rotation)["facts"]["rows"] == 13_000  # type: ignore[index] # a dictionary
    # One without permission gets nothing of what others have read.
    monkeypatch.setattr(views, "KEPT_SECONDS", 3600.0)
    assert viewer("view_user").get(url).status_code == 403


@pytest.mark.parametrize(("viewers", "every_seconds"), [(1, 2.0), (8, 2.0), (20, 5.0)])
def test_many_viewers_read_less_often(
    admin: Client, rotation: Rotation, viewers: int, every_seconds: float
) -> None:
    change(rotation, status="running")
    url = reverse("admin:rotator_rotation_state", args=[rotation.pk])
    answers = [admin.get(url, {"viewer": read % viewers}) for read in range(2 * viewers)]

    assert answers[-1].json()["every_seconds"] == every_seconds


def test_viewers_of_another_rotation_do_not_count(admin: Client, rotation: Rotation) -> None:
    change(rotation, status="running")
    other = Rotation.objects.create(target="shop.Order.webhook_secret", database="default", started_xid=2)
    for read in range(20):
        admin.get(reverse("admin:rotator_rotation_state", args=[other.pk]), {"viewer": read})
    url = reverse("admin:rotator_rotation_state", args=[rotation.pk])

    assert admin.get(url, {"viewer": 1}).json()["every_seconds"] == 2.0


def test_a_session_lasts_while_the_secret_key_is_rotated(admin: Client, rotation: Rotation) -> None:
    first = admin.session.session_key
    with override_settings(SECRET_KEY=settings.SECRET_KEY[::-1], SECRET_KEY_FALLBACKS=[settings.SECRET_KEY]):
        assert state_of(admin, rotation)["facts"]
        assert admin.session.session_key != first
        assert state_of(admin, rotation)["facts"]


def test_atomic_requests_do_not_commit_what_is_read(
    admin: Client, rotation: Rotation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connection.settings_dict, name="ATOMIC_REQUESTS", value=True)
    with CaptureQueriesContext(connection) as queries:
        state_of(admin, rotation)
    assert sum(each["sql"].startswith("SAVEPOINT") for each in queries.captured_queries) == 1


def test_keys_can_be_hidden(
    admin: Client, rotation: Rotation, settings: object, capsys: pytest.CaptureFixture[str]
) -> None:
    Ledger.objects.create(rotation=rotation, salt=b"salt", started_xid=1)
    Verification.objects.create(rotation=rotation, survivors=1, survivor_keys=[f"[{KEY}]"])
    change(
        rotation,
        status="failed",
        error=f"The range ({KEY}, {KEY}] was not changed.",
        bound=[KEY],
        selection={"filters": [f"id__lt={KEY}"]},
        rejected_keys=[[f"[{KEY}]", "check_violation"]],
    )
    Action.objects.create(rotation=rotation, kind="stopped", by="app", detail=f"row {KEY} is rejected")
    CompletedRange.objects.create(rotation=rotation, after=None, through=[KEY], rows=1, seconds=0)
    assert str(KEY) in page_of(admin, rotation)
    assert state_of(admin, rotation)["rejected"] == [[f"[{KEY}]", "check_violation"]]
    log = ("rotations", str(rotation.pk), "--log")
    call_command(*log)
    assert str(KEY) in capsys.readouterr().out
    settings.ROTATOR = {"HIDE_KEYS": True}  # type: ignore[attr-defined]
    assert str(KEY) not in page_of(admin, rotation)
    assert str(KEY) not in json.dumps(state_of(admin, rotation))
    assert state_of(admin, rotation)["rejected"] == [["1 row", "check_violation"]]
    for options in ((), ("--json",)):
        call_command(*log, *options)
        shown = capsys.readouterr().out
        assert str(KEY) not in shown
        assert "hidden: it can contain keys" in shown


def test_the_page_works_without_a_script(admin: Client, rotation: Rotation) -> None:
    url = reverse("admin:rotator_rotation_change", args=[rotation.pk])
    assert 'http-equiv="refresh"' in admin.get(url).content.decode()
    assert 'http-equiv="refresh"' not in admin.get(f"{url}?still").content.decode()
