"""The identity of the target: server, database, table, columns, key, and the files of the table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg.rows import class_row, dict_row

from rotator.exceptions import TargetError
from rotator.options import known_fields
from rotator.postgres.connection import fetch_as
from rotator.postgres.table import TargetTable

SESSION_QUERY: Final = (
    "SELECT (SELECT system_identifier FROM pg_control_system())::text AS system,"
    " d.oid::bigint AS database_oid, d.datname AS database, current_user::text AS role,"
    " current_setting('search_path') AS search_path, c.oid::bigint AS table_oid, n.nspname AS table_schema,"
    " to_regclass('rotator_rotation')::oid::bigint AS rotations_oid"
    " FROM pg_database d LEFT JOIN pg_class c ON c.oid = to_regclass(%s)"
    " LEFT JOIN pg_namespace n ON n.oid = c.relnamespace WHERE d.datname = current_database()"
)
"""Reads a :class:`SessionIdentity`; takes the target table's quoted name. Any role may execute it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionIdentity:
    """The server and database of one connection, and the tables that it finds there, or None."""

    system: str
    database_oid: int
    database: str
    role: str
    search_path: str
    table_oid: int | None
    table_schema: str | None
    rotations_oid: int | None


async def check_session(
    connection: AsyncConnection, path: tuple[str, ...], expected: SessionIdentity
) -> None:
    """Raise TargetError if this connection does not use the server, role and tables of Django's own."""
    name = sql.Identifier(*path).as_string()
    (found,) = await fetch_as(connection, class_row(SessionIdentity), SESSION_QUERY, (name,))
    check_same_session(path, expected, found)


def check_same_session(path: tuple[str, ...], django: SessionIdentity, rotator: SessionIdentity) -> None:
    """Refuse two sessions with different servers or tables; see :func:`check_session`."""
    for what, of_django, of_rotator in (
        ("server (system identifier)", django.system, rotator.system),
        ("database", django.database, rotator.database),
        ("database (oid)", django.database_oid, rotator.database_oid),
        ("role", django.role, rotator.role),
        (f"table {'.'.join(path)} (oid)", django.table_oid, rotator.table_oid),
        ("table rotator_rotation (oid)", django.rotations_oid, rotator.rotations_oid),
    ):
        if of_django != of_rotator:
            raise TargetError(
                f"Django's own connection and the rotator's do not use the same {what}: Django's has "
                f"{of_django}, the rotator's has {of_rotator}. Set it in DATABASES, which both read, not in "
                "a connection_created receiver or a custom engine."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyColumn:
    """The parts of a key column on which the order of its values depends.

    The collation, and its version in the operating system or ICU, are empty where there is none.
    """

    name: str
    type: str
    collation: str
    collation_version: str

    def __str__(self) -> str:
        """Return the name, the type and the collation."""
        return f"{self.name} {self.type}" + (f" COLLATE {self.collation}" if self.collation else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetIdentity:
    """The target of a rotation at its start; later, the same names can belong to something else.

    Attributes:
        system: The server's system identifier.
        files: The number of the file (``relfilenode``) of each partition, or of the table itself, by its oid
            as a text. A rewrite of the table changes it.
        columns: The number (``attnum``) of each rotated column. A renamed column keeps it. Empty for a
            rotation that an older version began.
    """

    system: str
    database_oid: int
    table_oid: int
    key: tuple[KeyColumn, ...]
    files: Mapping[str, int]
    columns: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "TargetIdentity | None":
        """Return the identity that was saved; None for a rotation that an older version began."""
        if not saved:
            return None
        key = tuple(KeyColumn(**column) for column in saved["key"])
        return cls(**known_fields(cls, saved) | {"key": key})

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON types."""
        return asdict(self)

    def difference(self, now: "TargetIdentity") -> str:
        """Return how the target differs, in one phrase; empty where it is the same.

        Neither other partitions nor other files, as after VACUUM FULL, make it another target.
        """
        if self.system != now.system:
            return (
                f"the server is another one: its system identifier is {now.system} and was {self.system}, as "
                "after a dump and restore or pg_upgrade"
            )
        if self.database_oid != now.database_oid:
            return f"the database is another one: its oid is {now.database_oid} and was {self.database_oid}"
        if self.table_oid != now.table_oid:
            return replaced(oid=now.table_oid, before=self.table_oid)
        return self._difference_within_table(now)

    def _difference_within_table(self, now: "TargetIdentity") -> str:
        if self.columns and self.columns != now.columns:
            return (
                "the rotated columns are other ones: their numbers in the table (attnum) are "
                f"{_listed(now.columns)} and were {_listed(self.columns)}, as after DROP COLUMN or a "
                "swap of two columns' names"
            )
        if _listed(self.key) != _listed(now.key):
            return f"the key is {_listed(now.key)} and was {_listed(self.key)}"
        for before, after in zip(self.key, now.key, strict=True):
            if before.collation_version != after.collation_version:
                return (
                    f"the collation {after.collation} of the key {after.name} has version "
                    f"{after.collation_version or 'unknown'} and had {before.collation_version or 'unknown'}"
                )
        return ""

    def rewritten(self, now: "TargetIdentity") -> tuple[int, ...]:
        """Return the oids of the partitions, or of the table, whose files have changed."""
        return tuple(int(oid) for oid, file in now.files.items() if self.files.get(oid, file) != file)


def _listed(columns: Sequence[object]) -> str:
    return ", ".join(map(str, columns))


REWRITTEN: Final = (
    "another session has rewritten every row, as ALTER TABLE, TRUNCATE and pg_repack do, so it is unknown "
    "which rows have new values"
)


def replaced(*, oid: int, before: int) -> str:
    """Return the phrase for a table that has another oid than before."""
    return f"the table is another one: its oid is {oid} and was {before}, as after DROP TABLE and a restore"


def changed_target(rotation: int, target: str, difference: str) -> TargetError:
    """Return the error for a rotation whose target has changed since its start."""
    return TargetError(
        f"Cannot continue rotation {rotation} of {target}: {difference}. Rotate all rows again with "
        "--restart."
    )


_KEY: Final = (
    "SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,"
    " COALESCE(n.nspname || '.' || l.collname, '') AS collation,"
    # The database has the version of its own collation.
    " COALESCE(CASE WHEN l.collprovider = 'd' THEN (SELECT pg_database_collation_actual_version(oid)"
    " FROM pg_database WHERE datname = current_database())"
    " ELSE pg_collation_actual_version(l.oid) END, '') AS collation_version"
    " FROM unnest(%(key)s::text[]) WITH ORDINALITY AS k (name, place)"
    " JOIN pg_attribute a ON a.attrelid = {regclass} AND a.attname = k.name"
    " LEFT JOIN pg_collation l ON l.oid = a.attcollation LEFT JOIN pg_namespace n ON n.oid = l.collnamespace"
    " ORDER BY k.place"
)
_TARGET: Final = (
    "SELECT (SELECT system_identifier FROM pg_control_system())::text AS system,"
    " (SELECT oid FROM pg_database WHERE datname = current_database())::bigint AS database_oid,"
    " {regclass}::oid::bigint AS table_oid,"
    " (SELECT COALESCE(jsonb_object_agg(oid::text, pg_relation_filenode(oid)), '{{}}')"
    " FROM {partitions} AS leaf) AS files,"
    " (SELECT array_agg(a.attnum::integer ORDER BY c.place)"
    " FROM unnest(%(columns)s::text[]) WITH ORDINALITY AS c (name, place)"
    " JOIN pg_attribute a ON a.attrelid = {regclass} AND a.attname = c.name) AS columns"
)


async def read_identity(connection: AsyncConnection, table: TargetTable) -> TargetIdentity:
    """Read the present identity of the target."""
    parameters = {"key": [column.name for column in table.key], "columns": table.column_names}
    key = await fetch_as(connection, class_row(KeyColumn), table.compose(_KEY), parameters)
    (row,) = await fetch_as(connection, dict_row, table.compose(_TARGET), parameters)
    return TargetIdentity(**row | {"key": tuple(key), "columns": tuple(row["columns"] or ())})
