"""The guard: a trigger that keeps old values from coming back while the ledger exists."""

from typing import Final

from psycopg import AsyncConnection, sql

from rotator.postgres.connection import fetch_column, transaction_with
from rotator.postgres.fence import OWN_ROTATION
from rotator.postgres.ledger import Ledger
from rotator.postgres.table import TargetTable, identifier

LOCK_TIMEOUT: Final = "100ms"
_REFUSE: Final = (
    # The application gets the SQLSTATE of a violated constraint.
    "RAISE EXCEPTION USING ERRCODE = '23514', CONSTRAINT = {trigger}, SCHEMA = TG_TABLE_SCHEMA,"
    " TABLE = TG_TABLE_NAME, COLUMN = {column}, MESSAGE = {message};"
)
_KEEP: Final = "IF TG_OP = 'INSERT' THEN {refuse} END IF; NEW.{name} := OLD.{name};"
_CHECK: Final = (
    "IF (TG_OP = 'INSERT' OR NEW.{name} IS DISTINCT FROM OLD.{name})"
    " AND EXISTS (SELECT FROM {ledger} AS e WHERE e.digest = {digest}) THEN"
    # A sequence counts refused writes too, although they are rolled back, and no session waits for another.
    " PERFORM nextval({sequence}::regclass); {action} END IF;"
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
            trigger=trigger_name(ledger.rotation),
            column=column.name.replace("%", "%%"),
            message=f"this old value was replaced by rotation {ledger.rotation} and is not accepted",
        )
        parts.append(
            sql.SQL(_CHECK).format(
                name=name,
                ledger=ledger.name,
                digest=ledger.digest(column, alias="new"),
                sequence=_sequence(ledger).as_string(),
                action=sql.SQL(_KEEP).format(refuse=refuse, name=name) if action == "keep" else refuse,
            )
        )
    return f"BEGIN {sql.SQL(' ').join(parts).as_string()} RETURN NEW; END"


async def add_guard(connection: AsyncConnection, ledger: Ledger, table: TargetTable, action: str) -> None:
    """Add the trigger for a ready ledger, or give it another action: ``refuse`` or ``keep``.

    Raises:
        RowsLockedError: Other sessions use the table; a retry can succeed.
        ServerRefusedError: The role must not create triggers on the table.
    """
    names: dict[str, sql.Composable | str] = {
        "function": _function(ledger),
        "sequence": _sequence(ledger),
        "trigger": identifier(trigger_name(ledger.rotation)),
        "setting": OWN_ROTATION,
        "rotation": str(ledger.rotation),
        "columns": sql.SQL(", ").join(identifier(column.name) for column in table.columns),
        "body": _body(ledger, table, action),
    }
    statements = (
        "CREATE SEQUENCE IF NOT EXISTS {sequence}",
        # The function's owner may read the ledger; the application's role need not. A fixed search path keeps
        # other schemas from replacing what it calls.
        (
            "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
            " SET search_path = pg_catalog, pg_temp AS {body}"
        ),
        # Otherwise any role could attach it to its own table, to find out what is in the ledger.
        "REVOKE ALL ON FUNCTION {function}() FROM PUBLIC",
        # The verification looks for old values that the rotation itself wrote. Calling the function for its
        # rows would take several times as long as the update.
        (
            "CREATE OR REPLACE TRIGGER {trigger} BEFORE INSERT OR UPDATE OF {columns} ON {table}"
            " FOR EACH ROW WHEN (current_setting({setting}, true) IS DISTINCT FROM {rotation})"
            " EXECUTE FUNCTION {function}()"
        ),
    )
    async with transaction_with(connection, {"lock_timeout": LOCK_TIMEOUT}):
        for statement in statements:
            await connection.execute(table.compose(statement, **names), ())
        await connection.execute(
            "UPDATE rotator_ledger SET guard = %s WHERE rotation_id = %s", (action, ledger.rotation)
        )


async def remove_guard(connection: AsyncConnection, ledger: Ledger) -> None:
    """Remove the trigger with its function, and keep its count; raise RowsLockedError as add_guard()."""
    async with transaction_with(connection, {"lock_timeout": LOCK_TIMEOUT}):
        hits = await count_hits(connection, ledger.rotation)
        # The table may have another name by now, so the trigger goes with its function.
        drop_function = sql.SQL("DROP FUNCTION IF EXISTS {}() CASCADE").format(_function(ledger))
        await connection.execute(drop_function, ())
        await connection.execute(sql.SQL("DROP SEQUENCE IF EXISTS {}").format(_sequence(ledger)), ())
        await connection.execute(
            "UPDATE rotator_ledger SET guard = '', guard_hits = %s WHERE rotation_id = %s",
            (hits, ledger.rotation),
        )


async def count_hits(connection: AsyncConnection, rotation: int) -> int:
    """Return how often the guards of a rotation met an old value: earlier ones, and the present one."""
    hits = await fetch_column(
        connection,
        "SELECT l.guard_hits + COALESCE(pg_sequence_last_value(to_regclass(format("
        "'%%I.rotator_guard_%%s_hits', n.nspname, l.rotation_id))), 0) FROM rotator_ledger l, pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.oid = 'rotator_ledger'::regclass AND l.rotation_id = %s",
        (rotation,),
    )
    return sum(hits)
