"""Django's connections that a project sets up itself: their schema, their role."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import connection as django_connection
from django.db import connections
from psycopg.sql import SQL, Identifier

from rotator.exceptions import TargetError
from rotator.options import Selection
from rotator.postgres.connection import pooled
from tests.integration.outcomes import SHOP, EventRecorder, assert_unconfirmed, each_connection, rotate
from tests.integration.rotation_tables import SCHEMA, TARGET, Database

pytestmark = SHOP

ROWS = 20
TENANT = "rotator tests' tenant"
FROM_ROWS = Selection(generator="tests.shop.generators.uuid_for_row")
SELECTIONS = {"in bulk": Selection(), "from rows": FROM_ROWS}


def tokens(database: Database, schema: str) -> set[Any]:
    found = database.execute(SQL("SELECT token FROM {}").format(Identifier(schema, "tickets_ticket")))
    return {token for (token,) in found}


@pytest.fixture
def tenant(database: Database) -> Iterator[Database]:
    """The public tickets, and a tenant's of the same name."""
    database.make_tickets(1, ROWS)
    schema, table = Identifier(TENANT), Identifier(TENANT, "tickets_ticket")
    database.execute(SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(schema))
    database.execute(SQL("CREATE SCHEMA {}").format(schema))
    database.execute(SQL("CREATE TABLE {} (LIKE public.tickets_ticket INCLUDING ALL)").format(table))
    database.execute(
        SQL(
            "INSERT INTO {} (id, title, created_at, token) SELECT id, title, created_at, gen_random_uuid()"
            " FROM public.tickets_ticket"
        ).format(table)
    )
    yield database
    database.execute(SQL("DROP SCHEMA {} CASCADE").format(schema))


# --- Schemas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_the_table_that_django_sees_is_rotated(tenant: Database, selection: Selection) -> None:
    public, own = tokens(tenant, "public"), tokens(tenant, TENANT)
    with each_connection(f'SET search_path = "{TENANT}", public'):
        outcome = rotate(TARGET, selection=selection)
    assert_unconfirmed(outcome, 0)
    assert outcome.rows == ROWS
    assert tokens(tenant, "public") == public
    assert tokens(tenant, TENANT).isdisjoint(own)
    assert tenant.rotation("table_name") == f'"{TENANT}".tickets_ticket'


def test_the_rotations_of_two_tenants_are_different_ones(tenant: Database) -> None:
    public, own = tokens(tenant, "public"), tokens(tenant, TENANT)
    first = rotate(TARGET, stop_after_rows=10)
    with each_connection(f'SET search_path = "{TENANT}", public'):
        second = rotate(TARGET)
    assert_unconfirmed(second, 0)
    assert second.rotation != first.rotation
    assert tokens(tenant, TENANT).isdisjoint(own)
    assert len(tokens(tenant, "public") & public) == ROWS - 10
    third = rotate(TARGET)
    assert_unconfirmed(third, 0)
    assert third.rotation == first.rotation
    assert tokens(tenant, "public").isdisjoint(public)


def test_late_rows_of_a_tenant_are_its_own(tenant: Database) -> None:
    """The whole table is read under the name with its schema."""
    tenant.execute(
        SQL("CREATE TABLE {} (LIKE public.tickets_ticket INCLUDING ALL)").format(Identifier(TENANT, "copy"))
    )
    public = tokens(tenant, "public")
    recorder = EventRecorder()
    with each_connection(f'SET search_path = "{TENANT}", public'):
        rotate(TARGET, recorder, selection=Selection(filters=("id__lte=5",)))
    assert recorder.counted() == (5, 0)
    assert tokens(tenant, "public") == public


def test_a_search_path_of_the_main_thread_alone_rotates_no_other_table(tenant: Database) -> None:
    """Generators that take the row read it in another thread."""
    public, own = tokens(tenant, "public"), tokens(tenant, TENANT)
    with django_connection.cursor() as cursor:
        cursor.execute(f'SET search_path = "{TENANT}", public')
    try:
        # Found out by the trial of the generator, before anything is changed.
        with pytest.raises(TargetError, match="do not use the same table"):
            rotate(TARGET, selection=FROM_ROWS)
    finally:
        connections.close_all()
    assert tokens(tenant, "public") == public
    assert tokens(tenant, TENANT) == own


def test_a_search_path_of_the_main_thread_alone_is_followed_in_bulk(tenant: Database) -> None:
    public, own = tokens(tenant, "public"), tokens(tenant, TENANT)
    with django_connection.cursor() as cursor:
        cursor.execute(f'SET search_path = "{TENANT}", public')
    try:
        assert_unconfirmed(rotate(TARGET), 0)
    finally:
        connections.close_all()
    assert tokens(tenant, "public") == public
    assert tokens(tenant, TENANT).isdisjoint(own)


def test_a_schema_that_is_not_there_is_refused(tenant: Database) -> None:
    public, own = tokens(tenant, "public"), tokens(tenant, TENANT)
    with each_connection("SET search_path = nowhere"), pytest.raises(Exception, match="migrate"):
        rotate(TARGET)
    assert (tokens(tenant, "public"), tokens(tenant, TENANT)) == (public, own)


def test_a_tenant_with_rotations_of_its_own_is_rotated_or_refused(tenant: Database) -> None:
    """Whichever it is, no other tenant's row may change."""
    for name in (
        "rotation",
        "completedrange",
        "latetransaction",
        "span",
        "control",
        "action",
        "measurement",
        "ledger",
    ):
        tenant.execute(
            SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(
                Identifier(TENANT, f"rotator_{name}"), Identifier("public", f"rotator_{name}")
            )
        )
    public, own = tokens(tenant, "public"), tokens(tenant, TENANT)
    with each_connection(f'SET search_path = "{TENANT}", public'):
        outcome = rotate(TARGET)
    assert outcome.status == "completed"
    assert tokens(tenant, "public") == public
    assert tokens(tenant, TENANT).isdisjoint(own)


# --- Roles -----------------------------------------------------------------------------------------


@pytest.fixture
def role(database: Database) -> Iterator[str]:
    """A role that may do what the tests' own may; roles are the server's, so its name is this database's."""
    ((role,),) = database.execute("SELECT current_database() || ' tests'' role'")
    name = Identifier(role)
    try:
        database.execute(SQL("CREATE ROLE {} SUPERUSER").format(name))
    except psycopg.errors.InsufficientPrivilege:
        pytest.skip("this role may not make others")
    yield role
    database.execute(SQL("DROP ROLE {}").format(name))


@pytest.mark.parametrize("set_role", ["SET ROLE", "SET SESSION AUTHORIZATION"])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_another_role_of_django_is_refused(
    database: Database, role: str, selection: Selection, set_role: str
) -> None:
    database.make_tickets(1, ROWS)
    before = database.values()
    ((own,),) = database.execute("SELECT current_user")
    with (
        each_connection(f'{set_role} "{role}"'),
        pytest.raises(TargetError, match="the same role") as caught,
    ):
        rotate(TARGET, selection=selection)
    assert f"Django's has {role}" in str(caught.value)
    assert f"the rotator's has {own}" in str(caught.value)
    assert database.values() == before
    assert database.checkpoints() == []


def test_a_role_in_the_settings_is_followed(database: Database, role: str) -> None:
    database.make_tickets(1, ROWS)
    before = database.values()
    connections.close_all()
    options = {**django_connection.settings_dict.get("OPTIONS", {}), "assume_role": role}

    body = f"INSERT INTO {_users(database)} VALUES (current_user);"
    database.make_trigger(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(django_connection.settings_dict, "OPTIONS", options)
        try:
            assert_unconfirmed(rotate(TARGET), 0)
        finally:
            connections.close_all()
    seen = {user for (user,) in database.execute(f"SELECT DISTINCT name FROM {_USERS}")}
    assert seen == {role}
    assert database.changed(before) == before.keys()


_USERS = Identifier(SCHEMA, "users").as_string()


def _users(database: Database) -> str:
    database.execute(f"CREATE TABLE {_USERS} (name text)")
    return _USERS


async def test_one_worker_uses_one_session(database: Database) -> None:
    used = set[int]()
    async with pooled(database.server, 3) as pool:
        for _ in range(6):
            async with pool.connection() as connection:
                used.add(connection.info.backend_pid)
    assert len(used) == 1
