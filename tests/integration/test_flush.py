"""The tests' own ``flush``, which clears the tables after each test that commits."""

import pytest
from django.contrib.auth.models import Group, Permission, User
from django.core.management import call_command
from django.db import connection, transaction

from tickets.models import Ticket


def _files() -> dict[str, int]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT relname, relfilenode FROM pg_class WHERE relkind = 'r' AND relname !~ '^pg_'")
        return dict(cursor.fetchall())


def _flush() -> set[str]:
    """Return the tables that it has truncated."""
    before = _files()
    call_command("flush", verbosity=0, interactive=False, reset_sequences=False)
    return {table for table, file in _files().items() if file != before[table]}


@pytest.mark.django_db(transaction=True)
def test_it_truncates_what_was_written_and_nothing_else() -> None:
    _flush()
    assert _flush() == set()

    Ticket.objects.create()
    with transaction.atomic():
        Group.objects.create(name="rolled back")
        transaction.set_rollback(True)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE django_session")
    # The other tables refer to groups.
    assert _flush() == {
        "tickets_ticket",
        "auth_group",
        "auth_group_permissions",
        "auth_user_groups",
        "django_session",
    }
    assert not Ticket.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_permissions_stay() -> None:
    User.objects.create(username="a").user_permissions.set(Permission.objects.all())
    assert "auth_user_user_permissions" in _flush()
    assert Permission.objects.filter(codename="change_ticket").exists()
