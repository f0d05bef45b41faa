"""What cannot be done is said in one sentence, and changes nothing."""

import os
import re
import socket
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from psycopg import sql

from rotator.models import CompletedRange, Rotation
from tests.acceptance.audit import Audit, audited_tickets
from tests.acceptance.harness import COMMAND, MANAGE, Commands, Finished, backends, url_of


@pytest.fixture
def audit(commands: Commands) -> Audit:  # noqa: ARG001
    return audited_tickets(10)


def _assert_nothing_happened(audit: Audit, finished: Finished) -> None:
    assert "Traceback" not in finished.err
    assert not finished.out
    assert Rotation.objects.count() == 0
    assert CompletedRange.objects.count() == 0
    assert backends() == 0
    audit.assert_untouched()


BAD_INPUT = {
    "nope.Ticket.token": (
        "There is no model nope.Ticket. Check the name, and that 'nope' is in INSTALLED_APPS."
    ),
    "tickets.Nope.token": (
        "There is no model tickets.Nope. Check the name, and that 'tickets' is in INSTALLED_APPS."
    ),
    "tickets.Ticket.nope": (
        "tickets.Ticket has no field 'nope'. Its columns are created_at, id, title, token."
    ),
    "Ticket.token": (
        "'Ticket.token' is not a valid target. Write it as app.Model.field, e.g. shop.Order.api_key."
    ),
    "auth.Permission.content_type": (
        "auth.Permission.content_type refers to other rows. It holds no secret to rotate."
    ),
    "auth.User.groups": "auth.User.groups refers to other rows. It holds no secret to rotate.",
    "auth.Group.user": "auth.Group.user is not a column of the table, so it cannot be rotated.",
    "tickets.Ticket.id": (
        "tickets.Ticket.id is the primary key, which identifies the rows, so it cannot be rotated. Add "
        "another column for the secret, and rotate that. Or delete the rows, and let the application make "
        "new ones."
    ),
    "auth.Group.name": (
        "auth.Group.name has no default that makes a new value for each row. Name a callable that makes "
        "values with --generator, e.g. --generator secrets.token_hex."
    ),
    "auth.User.password": (
        "auth.User.password has no default that makes a new value for each row. It holds hashes of "
        "passwords, and no user could log in with a plain text in it. To make users set new passwords, name "
        "a callable with --generator that takes nothing and returns "
        "django.contrib.auth.hashers.make_password(None)."
    ),
    "--filter title": "--filter title is not a valid filter. Write it as field=value or field__lookup=value.",
    "--filter token=leaked": ("--filter token filters by token, which is rotated. Use only token__isnull."),
    "--filter title__regex=(": (
        "The server cannot use --filter 'title__regex=(': invalid_regular_expression (2201B): invalid "
        "regular expression: parentheses () not balanced. Correct the filter."
    ),
    "--dry-run --exclude title__iregex=*": (
        "The server cannot use --exclude 'title__iregex=*': invalid_regular_expression (2201B): invalid "
        "regular expression: quantifier operand invalid. Correct the filter."
    ),
    "--generator no.such.thing": (
        "The generator no.such.thing cannot be imported (ModuleNotFoundError). Write it as "
        "package.module.name, or package.module.Class.name for a method."
    ),
    "--batch 0": "--batch must be from 1 to 2,147,483,647, not 0.",
    "--concurrency 0": "--concurrency must be from 1 to 2,147,483,647, not 0.",
    "--batch 99999999999999999999": "--batch must be from 1 to 2,147,483,647, not 99999999999999999999.",
    "--stop-after soon": (
        "--stop-after must be a number of rows (5000) or a duration (90s, 30m, 2h), not 'soon'."
    ),
    "--stop-after 0": "--stop-after must be from 1 to 2,147,483,647, not 0.",
    "--detach": "--detach queues the rotation for Celery workers. Use it with --celery.",
    "--celery --detach --stop-after 5": (
        "--stop-after stops the run of this process, but with --detach it has no run. Leave one out."
    ),
    "--lock-timeout 5": "--lock-timeout must be a duration (100ms, 30s, 5m or 2h), not '5'.",
    "--lock-timeout 25h": "--lock-timeout must be from 1ms to 24h, not '25h'.",
}


def test_bad_input_is_refused(audit: Audit) -> None:
    for options, sentence in BAD_INPUT.items():
        with pytest.raises(CommandError) as caught:
            call_command(COMMAND, *options.split())
        assert (str(caught.value), caught.value.returncode) == (sentence, 1)
    assert Rotation.objects.count() == 0
    audit.assert_untouched()


@pytest.mark.parametrize("options", ["nope.Ticket.token", "--celery --detach --stop-after 5"])
def test_a_refusal_is_one_sentence(commands: Commands, audit: Audit, options: str) -> None:
    finished = commands.run(*options.split())

    assert (finished.complaint, finished.status) == (BAD_INPUT[options], 1)
    _assert_nothing_happened(audit, finished)


def test_more_workers_than_the_server_has_connections_for(commands: Commands, audit: Audit) -> None:
    finished = commands.run("--concurrency", "100000")

    assert finished.status == 1
    assert finished.complaint.startswith(
        "Cannot open 100004 connections for --concurrency 100000: the server allows "
    )
    assert "Use at most --concurrency " in finished.complaint
    _assert_nothing_happened(audit, finished)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--batch many", "argument --batch: invalid int value: 'many'"),
        # An unset shell variable; without the option, all rows would be rotated.
        ("--leaked=", "argument --leaked: the value is empty. Give one, or leave the option out."),
        # An abbreviation would be repeated in the advice on how to go on.
        ("--rest", "unrecognized arguments: --rest"),
    ],
)
def test_what_the_parser_refuses_ends_as_in_every_command(
    commands: Commands, audit: Audit, options: str, sentence: str
) -> None:
    finished = commands.run(*options.split())

    assert finished.status == 2
    usage, *_, last = finished.err.splitlines()
    assert usage.startswith("usage: manage.py async_rotate ")
    assert last == f"manage.py async_rotate: error: {sentence}"
    _assert_nothing_happened(audit, finished)


@pytest.mark.parametrize(
    ("path", "reason"), [("missing/report.json", "No such file or directory"), ("", "Is a directory")]
)
def test_a_report_that_cannot_be_written(
    commands: Commands, audit: Audit, tmp_path: Path, path: str, reason: str
) -> None:
    finished = commands.run("--report", str(tmp_path / path))

    assert finished.status == 1
    assert finished.complaint == (f"Cannot write to the file {tmp_path / path}: {reason}. Name another file.")
    _assert_nothing_happened(audit, finished)


def test_a_server_that_is_not_there(commands: Commands, audit: Audit) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        url = f"postgres://somebody:s3cret@127.0.0.1:{port}/nowhere"
        finished = commands.start_on(url, *MANAGE, COMMAND).wait()

    assert finished.status == 1
    assert finished.complaint == (
        "The database 'default' cannot be reached: connection failed: connection to server at "
        f'"127.0.0.1", port {port} failed: Connection refused. Check its settings and that the server runs.'
    )
    _assert_nothing_happened(audit, finished)


@pytest.fixture
def fresh_database(commands: Commands) -> Iterator[str]:  # noqa: ARG001
    """A database of the same server without the rotator's tables."""
    name = f"{connection.settings_dict['NAME']}_fresh"
    with psycopg.connect(url_of(), autocommit=True) as admin:
        drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        admin.execute(drop)
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield name
        admin.execute(drop)


def test_a_database_without_the_tables(commands: Commands, audit: Audit, fresh_database: str) -> None:
    finished = commands.start(database=fresh_database).wait()

    assert finished.status == 1
    assert finished.complaint == (
        "The rotator's tables are missing or out of date in the database 'default'. "
        "Run `manage.py migrate --database default` first."
    )
    _assert_nothing_happened(audit, finished)


def test_a_database_that_does_not_exist(commands: Commands, audit: Audit) -> None:
    finished = commands.start(database="nobody_made_this").wait()

    assert finished.status == 1
    assert finished.complaint.startswith("The database 'default' cannot be reached: ")
    assert 'database "nobody_made_this" does not exist' in finished.complaint
    password = urlsplit(os.environ.get("TEST_DATABASE_URL", "")).password
    assert not password or password not in finished.err
    _assert_nothing_happened(audit, finished)


@pytest.mark.skipif(find_spec("gevent") is None, reason="gevent is not installed.")
def test_a_monkey_patched_manage_py_is_refused(commands: Commands, audit: Audit) -> None:
    patched = (
        "from gevent import monkey; monkey.patch_all();"
        " import runpy, sys; sys.argv[0] = 'manage.py'; runpy.run_path('manage.py', run_name='__main__')"
    )
    program = ("env", "-u", "PYTHONWARNINGS", sys.executable, "-c", patched, COMMAND)
    finished = commands.start(program=program).wait(60)

    assert finished.status == 1
    assert re.fullmatch(
        r"gevent has monkey-patched the process \d+ on \S+, and asyncio does not work there\. Use a"
        r" manage\.py that does not patch, and Celery workers with --pool prefork\.",
        finished.complaint,
    )
    _assert_nothing_happened(audit, finished)
