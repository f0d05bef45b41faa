"""The privileges that a rotation needs, and the GRANT statements for those that the role does not have."""

from typing import Final

from psycopg import AsyncConnection, sql

from rotator.postgres.failures import answered
from rotator.postgres.table import TargetTable

_OWN_TABLES: Final = {
    "rotator_rotation": ("SELECT", "INSERT", "UPDATE"),
    "rotator_completedrange": ("SELECT", "INSERT"),
    "rotator_latetransaction": ("SELECT", "INSERT"),
}
_HAS: Final = (
    "SELECT COALESCE(has_table_privilege(to_regclass(%(table)s)::oid, %(privilege)s), true)"
    " OR %(column)s::text IS NOT NULL"
    " AND has_column_privilege(to_regclass(%(table)s)::oid, %(column)s, %(privilege)s)"
)


async def missing_grants(connection: AsyncConnection, table: TargetTable) -> tuple[str, ...]:
    """Return the GRANT statements that the role still needs; empty where it has all privileges.

    Args:
        connection: In autocommit mode.
        table: The target's table.
    """
    async with answered(connection):
        cursor = await connection.execute("SELECT quote_ident(current_user)")
        ((role,),) = await cursor.fetchall()
    needed: dict[str, list[tuple[str, str | None]]] = {
        table.regclass: [("SELECT", None), *(("UPDATE", column.name) for column in table.columns)]
    }
    for name, privileges in _OWN_TABLES.items():
        needed[name] = [(privilege, None) for privilege in privileges]
    grants = []
    for name, wanted in needed.items():
        missing = [
            _written(privilege, column)
            for privilege, column in wanted
            if not await _has(connection, name, privilege, column)
        ]
        if missing:
            grants.append(f"GRANT {', '.join(missing)} ON {name} TO {role};")
    return tuple(grants)


async def _has(connection: AsyncConnection, name: str, privilege: str, column: str | None) -> bool:
    async with answered(connection):
        cursor = await connection.execute(_HAS, {"table": name, "privilege": privilege, "column": column})
        row = await cursor.fetchone()
    return bool(row and row[0])


def _written(privilege: str, column: str | None) -> str:
    return privilege if column is None else f"{privilege} ({sql.Identifier(column).as_string()})"
