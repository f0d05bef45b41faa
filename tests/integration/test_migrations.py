"""Migrations that carry over what older versions have written."""

from collections.abc import Iterator

import pytest
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

from tests.integration.rotation_tables import COMMITTING

pytestmark = COMMITTING

BEFORE = [("rotator", "0005_last_writers")]
AFTER = [("rotator", "0006_stop_reasons")]


@pytest.fixture
def older_schema() -> Iterator[None]:
    """The tables of the version before stop reasons; the newest ones afterwards."""
    newest = [key for key in MigrationExecutor(connection).loader.graph.leaf_nodes() if key[0] == "rotator"]
    MigrationExecutor(connection).migrate(BEFORE)
    yield
    MigrationExecutor(connection).migrate(newest)


@pytest.mark.usefixtures("older_schema")
def test_sentences_become_the_status_and_the_reason() -> None:
    older = MigrationExecutor(connection).loader.project_state(BEFORE).apps.get_model("rotator", "Rotation")
    sentences = {
        "queued": ("interrupted", "Left to the workers."),
        "option": ("interrupted", "Stopped by --stop-after."),
        "signal": ("interrupted", "Stopped by SIGTERM."),
        "cancelled": ("interrupted", "Cancelled by the program that it ran in."),
        "lost": ("interrupted", "The server cannot be reached: it is gone."),
        "failed": ("failed", "Rows were refused."),
    }
    for target, (status, error) in sentences.items():
        older.objects.create(target=target, database="default", started_xid=3, status=status, error=error)

    MigrationExecutor(connection).migrate(AFTER)

    with connection.cursor() as cursor:
        cursor.execute("SELECT target, status, stop_reason, error FROM rotator_rotation")
        found = {target: rest for target, *rest in cursor.fetchall()}
        cursor.execute("DELETE FROM rotator_rotation")
    assert found == {
        "queued": ["queued", "", ""],
        "option": ["interrupted", "--stop-after", ""],
        "signal": ["interrupted", "SIGTERM", ""],
        "cancelled": ["interrupted", "cancellation by the calling program", ""],
        "lost": ["interrupted", "", "The server cannot be reached: it is gone."],
        "failed": ["failed", "", "Rows were refused."],
    }
