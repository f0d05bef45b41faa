"""The target's table as SQL: key, columns, conditions, partitions and updates by key."""

import re
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection, sql
from psycopg.abc import AdaptContext
from psycopg.adapt import PyFormat

from rotator.postgres.errors import translate_errors

ROW: Final = "rotator_row"
"""The alias of a row of the target in every statement that a :class:`Condition` is part of."""

REPEATED: Final = 1
KEPT: Final = 2
COUNT_OUTCOMES: Final = sql.SQL(
    "SELECT count(*), count(*) FILTER (WHERE outcome = {}), count(*) FILTER (WHERE outcome = {}) FROM written"
).format(sql.Literal(KEPT), sql.Literal(REPEATED))
"""Counts the rows of the update ``written``, those that kept their values, and those with repeated ones."""

_BUILTIN_SCHEMA: Final = "pg_catalog"


def _old_name(at: int) -> str:
    """The name of the column with the old value of the rotated column at this place."""
    return f"rotator_old_{at}"


def values_name(at: int) -> str:
    """The name of the parameter that holds the values of the column at this place."""
    return f"values_{at}"


def identifier(*path: str) -> sql.Identifier:
    """A quoted name for a statement that is executed with parameters, even if there are none of them.

    The driver looks for placeholders inside quoted names too, so their percent signs are doubled.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in path))


@dataclass(frozen=True, slots=True)
class Condition(sql.Composable):
    """Which rows of the table are meant, in SQL about the alias :data:`ROW`.

    Attributes:
        text: With ``%s`` for each parameter and ``%%`` for each percent sign.
        parameters: Their values, which become literals: the server plans with them.
    """

    text: str
    parameters: tuple[Any, ...] = ()

    def as_bytes(self, context: AdaptContext | None = None) -> bytes:
        """Return SQL for a statement that is executed with parameters."""
        values = iter(self.parameters)

        def written(found: "re.Match[bytes]") -> bytes:
            if found[0] == b"%%":
                return found[0]
            return sql.Literal(next(values)).as_bytes(context).replace(b"%", b"%%")

        return re.sub(rb"%s|%%", written, self.text.encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the table.

    Attributes:
        name: The column's name, unquoted.
        type_name: The type's name, e.g. ``int8``; that of the base type where the column's is a domain.
            Without its length: an explicit cast would cut a value, where an assignment is an error.
        type_schema: The schema that the type is in.
        collation: The collation's schema and name, unquoted; None where the type has none.
        keeps_null: Whether a NULL in it stays one.
        stored_type: The column's own type as SQL, e.g. ``numeric(5,2)``: what an assignment turns a value
            into; empty where it is the base type.
        keeps_blank: Whether an empty text in it stays one; only where the type has such a value.
    """

    name: str
    type_name: str
    type_schema: str = _BUILTIN_SCHEMA
    collation: tuple[str, str] | None = None
    keeps_null: bool = False
    stored_type: str = ""
    keeps_blank: bool = False

    def is_given(self, value: sql.Composable) -> sql.Composable | None:
        """Return a condition that is true where a row with this old value gets a new one; None for always."""
        conditions = [sql.SQL("{} IS NOT NULL").format(value)] if self.keeps_null else []
        if self.keeps_blank:
            conditions.append(sql.SQL("{} IS DISTINCT FROM ''").format(value))
        return sql.SQL(" AND ").join(conditions) if conditions else None

    @property
    def type(self) -> sql.Composable:
        """The type's quoted name."""
        return identifier(self.type_schema, self.type_name)

    @property
    def stored(self) -> sql.Composable:
        """The column's own type."""
        return sql.SQL(self.stored_type.replace("%", "%%")) if self.stored_type else self.type

    @property
    def cast(self) -> sql.Composable:
        """What makes a text one of the column's values, which then compares as the column does."""
        if self.collation is None:
            return sql.SQL("::{}").format(self.type)
        return sql.SQL("::{} COLLATE {}").format(self.type, identifier(*self.collation))


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetTable:
    """The table that holds the rotated column.

    Attributes:
        path: The table's name, with its schema before it where it has one; unquoted.
        key: The columns of the primary key, in the index's order.
        columns: The rotated columns.
        condition: Which rows are rotated; None for all.
        found_name: The table's name with its schema, quoted, as the server has it: the same by whatever
            alias or search path it is reached.
        is_partitioned: Whether its rows are in partitions.
    """

    path: tuple[str, ...]
    key: tuple[Column, ...]
    columns: tuple[Column, ...]
    condition: Condition | None = None
    found_name: str = ""
    is_partitioned: bool = False

    @property
    def name(self) -> sql.Composable:
        """The table's quoted name."""
        return identifier(*self.path)

    @property
    def regclass(self) -> str:
        """The table's quoted name as a parameter to be cast to ``regclass``."""
        return sql.Identifier(*self.path).as_string()

    @property
    def row(self) -> sql.Composable:
        """The table under the alias :data:`ROW`."""
        return sql.SQL("{} AS {}").format(self.name, identifier(ROW))

    @property
    def matches(self) -> sql.Composable | None:
        """A condition about :data:`ROW`: it is rotated; None where all rows are."""
        conditions = [] if self.condition is None else [sql.SQL("({})").format(self.condition)]
        given = [column.is_given(identifier(ROW, column.name)) for column in self.columns]
        restricting = [condition for condition in given if condition is not None]
        # A column that always gets a value takes every row.
        if len(restricting) == len(given):
            either = sql.SQL(" OR ").join(sql.SQL("({})").format(condition) for condition in restricting)
            conditions.append(sql.SQL("({})").format(either))
        return sql.SQL(" AND ").join(conditions) if conditions else None

    @property
    def and_matches(self) -> sql.Composable:
        """The same, to follow another condition."""
        return sql.SQL("") if self.matches is None else sql.SQL(" AND {}").format(self.matches)

    @property
    def old_values(self) -> sql.Composable:
        """The rotated columns of :data:`ROW`, as columns of a subquery that an update joins with."""
        return sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(identifier(ROW, column.name), identifier(_old_name(at)))
            for at, column in enumerate(self.columns)
        )

    def outcome(self, alias: str, position: sql.Composable) -> sql.Composable:
        """What an update of :data:`ROW` returns of each row, as a number named ``outcome``.

        :data:`KEPT` where a rotated column still has its old value although it was given another one,
        :data:`REPEATED` where it has it because the new value is the same, else 0. Compared are the stored
        bytes (``*=``): other operators call different values equal, or do not exist for the type.

        Args:
            alias: The alias of the subquery that has :attr:`old_values`.
            position: The row's position in the arrays of new values.
        """
        same = sql.SQL("ROW({})::record *= ROW({})::record")
        outcomes = []
        for at, column in enumerate(self.columns):
            old = identifier(alias, _old_name(at))
            is_unchanged = same.format(identifier(ROW, column.name), old)
            # Only what an assignment makes of the new value: rounded, or padded with blanks.
            stored = sql.SQL("{}::{}")
            if (is_given := column.is_given(old)) is not None:
                is_unchanged = sql.SQL("{} AND {}").format(is_given, is_unchanged)
            is_repeated = same.format(
                stored.format(self._new_value(at, column, position), column.stored),
                stored.format(old, column.stored),
            )
            outcomes.append(
                sql.SQL("CASE WHEN {} THEN CASE WHEN {} THEN {} ELSE {} END ELSE 0 END").format(
                    is_unchanged, is_repeated, sql.Literal(REPEATED), sql.Literal(KEPT)
                )
            )
        return sql.SQL("GREATEST({}) AS outcome").format(sql.SQL(", ").join(outcomes))

    @property
    def digests(self) -> sql.Composable:
        """An array of numbers, each of which stands for the stored value of a rotated column of :data:`ROW`.

        It has a NULL for a NULL or an empty text that stays one.
        """
        return sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(map(self._digest, self.columns)))

    @staticmethod
    def _digest(column: Column) -> sql.Composable:
        value = identifier(ROW, column.name)
        digest = sql.SQL("hashtextextended(ROW({})::text, 0)").format(value)
        is_given = column.is_given(value)
        return digest if is_given is None else sql.SQL("CASE WHEN {} THEN {} END").format(is_given, digest)

    def assignments(self, position: sql.Composable) -> sql.Composable:
        """What UPDATE of :data:`ROW` sets: for each column the value at a position of its own array."""
        return sql.SQL(", ").join(
            sql.SQL("{} = {}").format(identifier(column.name), self._value(at, column, position))
            for at, column in enumerate(self.columns)
        )

    def _new_value(self, at: int, column: Column, position: sql.Composable) -> sql.Composable:
        return sql.SQL("({}::{}[])[{}]").format(
            sql.Placeholder(values_name(at), format=PyFormat.BINARY), column.type, position
        )

    def _value(self, at: int, column: Column, position: sql.Composable) -> sql.Composable:
        value = self._new_value(at, column, position)
        old = identifier(ROW, column.name)
        is_given = column.is_given(old)
        # A single column's rows are chosen for it.
        if is_given is None or len(self.columns) == 1:
            return value
        return sql.SQL("CASE WHEN {} THEN {} ELSE {} END").format(is_given, value, old)

    @property
    def key_columns(self) -> sql.Composable:
        """The key's columns, as ORDER BY wants them."""
        return self.key_columns_of(None)

    @property
    def key_json(self) -> sql.Composable:
        """A row's key as JSON array text."""
        return self.key_json_of(None)

    def key_json_of(self, alias: str | None) -> sql.Composable:
        """A row's key as JSON array text, of this alias."""
        return sql.SQL("jsonb_build_array({})::text").format(self.key_columns_of(alias))

    def key_columns_of(self, alias: str | None) -> sql.Composable:
        """The key's columns, as those of this alias."""
        path = () if alias is None else (alias,)
        return sql.SQL(", ").join(identifier(*path, column.name) for column in self.key)

    def decoded(self, array: sql.Composable) -> sql.Composable:
        """The values of a JSON array, in the key's own types, as ORDER BY wants them."""
        return sql.SQL(", ").join(
            sql.SQL("({} ->> {}){}").format(array, sql.Literal(position), column.cast)
            for position, column in enumerate(self.key)
        )

    def decoded_columns(self, array: sql.Composable) -> sql.Composable:
        """The values of a JSON array, as columns of the key's own types and names."""
        return sql.SQL(", ").join(
            sql.SQL("({} ->> {}){} AS {}").format(
                array, sql.Literal(position), column.cast, identifier(column.name)
            )
            for position, column in enumerate(self.key)
        )

    def survives_as_text(self, array: sql.Composable) -> sql.Composable:
        """Whether a row's key is the same once it has been made a JSON array and read from it again."""
        return sql.SQL("({}) = ({})").format(self.key_columns, self.decoded(array))

    def within(self, *, after_is_known: bool, alias: str | None = None) -> sql.Composable:
        """A condition: the key lies in the span of the parameters ``after`` and ``through``."""
        key = sql.SQL("({})").format(self.key_columns_of(alias))
        through = sql.SQL("{} <= ({})").format(key, self.decoded(sql.SQL("%(through)s::jsonb")))
        if not after_is_known:
            return through
        after = sql.SQL("{} > ({})").format(key, self.decoded(sql.SQL("%(after)s::jsonb")))
        return sql.SQL("{} AND {}").format(after, through)


PARTITIONS: Final = sql.SQL(
    "(SELECT COALESCE(tree.relid, root.oid::regclass)::oid AS oid"
    " FROM (SELECT %(table)s::regclass::oid AS oid) AS root"
    # Without a row for what has no partitions.
    " LEFT JOIN LATERAL pg_partition_tree(root.oid) AS tree ON tree.isleaf)"
)
"""A subquery: the ``oid`` of each of them; takes the parameter ``table``."""


def rows_written_so_far(table: TargetTable) -> sql.Composed:
    """The number of row versions that this session has written to the table, within and since any time.

    Only its change within a transaction means anything; takes the parameter ``table``.
    """
    writes = sql.SQL("pg_stat_get_xact_tuples_inserted({0}) + pg_stat_get_xact_tuples_updated({0})")
    if not table.is_partitioned:
        return sql.SQL("SELECT {}").format(writes.format(sql.SQL("%(table)s::regclass")))
    return sql.SQL("SELECT COALESCE(sum({}), 0)::bigint FROM {} AS leaf").format(
        writes.format(sql.SQL("oid")), PARTITIONS
    )


async def count_partitions(connection: AsyncConnection, table: TargetTable) -> int:
    """Return the number of tables that hold the rows."""
    async with translate_errors(connection):
        cursor = await connection.execute(
            sql.SQL("SELECT count(*) FROM {} AS leaf").format(PARTITIONS), {"table": table.regclass}
        )
        row = await cursor.fetchone()
    return int(row[0]) if row else 0


_KEYED: Final = "rotator_keyed"
_POSITION: Final = "rotator_position"


def keyed_update(table: TargetTable) -> sql.Composed:
    """The update of the rows with these keys; it returns what :func:`update_statement` does.

    Parameters: ``keys`` (texts of JSON arrays) and ``values_0`` and so on (an array for
    each column, in the order of the keys).
    """
    return sql.SQL(
        "WITH written AS (UPDATE {row} SET {assignments} FROM"
        " (SELECT keys.*, {old_values} FROM {keys} AS keys JOIN {row} ON ({row_key}) = ({key_of_keys})"
        # Sorted, so that the rows are locked in the key's order.
        " ORDER BY {key_of_keys}) AS {keyed} WHERE ({row_key}) = ({keyed_key}) RETURNING {outcome})"
        " {count_outcomes}"
    ).format(
        count_outcomes=COUNT_OUTCOMES,
        row=table.row,
        assignments=table.assignments(identifier(_KEYED, _POSITION)),
        old_values=table.old_values,
        keys=_keys(table),
        row_key=table.key_columns_of(ROW),
        key_of_keys=table.key_columns_of("keys"),
        keyed=identifier(_KEYED),
        keyed_key=table.key_columns_of(_KEYED),
        outcome=table.outcome(_KEYED, identifier(_KEYED, _POSITION)),
    )


def select_digests(table: TargetTable) -> sql.Composed:
    """The key and the digests of each of the rows with the keys of the parameter ``keys``."""
    return sql.SQL(
        "SELECT {key}, {digests} FROM {keys} AS keys JOIN {row} ON ({row_key}) = ({key_of_keys})"
    ).format(
        key=table.key_json_of(ROW),
        digests=table.digests,
        keys=_keys(table),
        row=table.row,
        row_key=table.key_columns_of(ROW),
        key_of_keys=table.key_columns_of("keys"),
    )


def _keys(table: TargetTable) -> sql.Composable:
    """The keys of the parameter as columns, each with its position in it."""
    return sql.SQL(
        "(SELECT {decoded}, {position} FROM unnest(%(keys)s::text[]) WITH ORDINALITY"
        " AS texts (rotator_key, {position}))"
    ).format(
        position=identifier(_POSITION),
        decoded=table.decoded_columns(sql.SQL("rotator_key::jsonb")),
    )
