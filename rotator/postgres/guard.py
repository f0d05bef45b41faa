"""The guard: a trigger that keeps old values from coming back while the ledger exists.

Every function takes a connection in autocommit mode.
"""

from typing import Final

from psycopg import AsyncConnection, sql

from rotator.postgres.connection import fetch_column, set_local
from rotator.postgres.errors import translate_errors
from rotator.postgres.fence import OWN_ROTATION
from rotator.postgres.ledger import Ledger
from rotator.postgres.table import TargetTable, identifier

LOCK_TIMEOUT: Final = "100ms"
# The application gets this SQLSTATE, which is that of a violated constraint.
SQLSTATE: Final = "23514"

# A sequence counts refused writes too, although they are rolled back, and no session waits for another.
_COUNT: Final = "PERFORM nextval({sequence});"
_REFUSE: Final = (
    "RAISE EXCEPTION USING ERRCODE = {sqlstate}, CONSTRAINT = {trigger}, SCHEMA = TG_TABLE_SCHEMA,"
    " TABLE = TG_TABLE_NAME, COLUMN = {column}, MESSAGE = {message};"
)
_CHECK: Final = (
    "IF (TG_OP = 'INSERT' OR NEW.{name} IS DISTINCT FROM OLD.{name})"
    " AND EXISTS (SELECT FROM {ledger} AS e WHERE e.digest = {digest}) THEN"
    " {count} {action} END IF;"
)


def trigger_name(rotation: int) -> str:
    """Return the trigger's name. Triggers fire in the order of their names, and ``~`` comes last."""
    return f"~rotator_guard_{rotation}"


def _function(ledger: Ledger) -> sql.Composable:
    return identifier(ledger.schema, f"rotator_guard_{ledger.rotation}")


def _sequence(ledger: Ledger) -> sql.Composable:
    return identifier(ledger.schema, f"rotator_guard_{ledger.rotation}_hits")


def _body(ledger: Ledger, table: TargetTable, action: str) -> str:
    """Return the function's body, with each percent sign doubled."""
    parts = []
    for column in table.columns:
        name = identifier(column.name)
        refuse = sql.SQL(_REFUSE).format(
            sqlstate=sql.Literal(SQLSTATE),
            trigger=sql.Literal(trigger_name(ledger.rotation)),
            column=sql.Literal(column.name.replace("%", "%%")),
            message=sql.Literal(
                f"the new value was replaced by rotation {ledger.rotation} and must not come back"
            ),
        )
        keep = sql.SQL("IF TG_OP = 'INSERT' THEN {refuse} END IF; NEW.{name} := OLD.{name};").format(
            refuse=refuse, name=name
        )
        parts.append(
            sql.SQL(_CHECK).format(
                name=name,
                ledger=ledger.name,
                digest=ledger.digest(column, alias="new"),
                count=sql.SQL(_COUNT).format(
                    sequence=sql.SQL("{}::regclass").format(sql.Literal(_sequence(ledger).as_string()))
                ),
                action=keep if action == "keep" else refuse,
            )
        )
    return f"BEGIN {sql.SQL(' ').join(parts).as_string()} RETURN NEW; END"


async def add_guard(connection: AsyncConnection, ledger: Ledger, table: TargetTable, action: str) -> None:
    """Add the trigger, or replace it by one with another action: ``refuse`` or ``keep``.

    The ledger must be ready.

    Raises:
        RowsLockedError: Other sessions use the table; a retry can succeed.
        ServerRefusedError: The role must not create triggers on the table.
    """
    names = {
        "function": _function(ledger),
        "sequence": _sequence(ledger),
        "trigger": identifier(trigger_name(ledger.rotation)),
        "table": table.name,
        "setting": sql.Literal(OWN_ROTATION),
        "rotation": sql.Literal(str(ledger.rotation)),
        "columns": sql.SQL(", ").join(identifier(column.name) for column in table.columns),
        "body": sql.Literal(_body(ledger, table, action)),
    }
    create_function = (
        # The function's owner may read the ledger; the application's role need not. A fixed search path keeps
        # other schemas from replacing what it calls.
        "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
        " SET search_path = pg_catalog, pg_temp AS {body}"
    )
    create_trigger = (
        "CREATE OR REPLACE TRIGGER {trigger} BEFORE INSERT OR UPDATE OF {columns} ON {table}"
        # The verification looks for old values that the rotation itself wrote. Calling the function for its
        # rows would take several times as long as the update.
        " FOR EACH ROW WHEN (current_setting({setting}, true) IS DISTINCT FROM {rotation})"
        " EXECUTE FUNCTION {function}()"
    )
    statements = (
        "CREATE SEQUENCE IF NOT EXISTS {sequence}",
        create_function,
        # Otherwise any role could attach it to its own table, to find out what is in the ledger.
        "REVOKE ALL ON FUNCTION {function}() FROM PUBLIC",
        create_trigger,
    )
    async with translate_errors(connection), connection.transaction():
        await set_local(connection, {"lock_timeout": LOCK_TIMEOUT})
        for statement in statements:
            await connection.execute(sql.SQL(statement).format(**names), {})
        await connection.execute(
            "UPDATE rotator_ledger SET guard = %s WHERE rotation_id = %s", (action, ledger.rotation)
        )


async def remove_guard(connection: AsyncConnection, ledger: Ledger) -> None:
    """Remove the trigger with its function, and keep its count.

    Raises:
        RowsLockedError: Other sessions use the table; a retry can succeed.
    """
    async with translate_errors(connection), connection.transaction():
        await set_local(connection, {"lock_timeout": LOCK_TIMEOUT})
        hits = await count_hits(connection, ledger)
        # The table may have another name by now, so the trigger goes with its function.
        await connection.execute(
            sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE").format(_function(ledger)), {}
        )
        await connection.execute(sql.SQL("DROP SEQUENCE IF EXISTS {}").format(_sequence(ledger)), {})
        await connection.execute(
            "UPDATE rotator_ledger SET guard = '', guard_hits = guard_hits + %s WHERE rotation_id = %s",
            (hits, ledger.rotation),
        )


async def count_hits(connection: AsyncConnection, ledger: Ledger) -> int:
    """Return how often the present guard met an old value."""
    (hits,) = await fetch_column(
        connection,
        "SELECT COALESCE(pg_sequence_last_value(to_regclass(%s)), 0)",
        (_sequence(ledger).as_string(),),
    )
    return int(hits)
