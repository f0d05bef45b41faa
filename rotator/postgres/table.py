"""The target's table as SQL: its key, columns, conditions and partitions, and the updates of its rows."""

import re
from dataclasses import dataclass
from typing import Any, Final, LiteralString

from psycopg import sql
from psycopg.abc import AdaptContext
from psycopg.adapt import PyFormat

from rotator.postgres.errors import RANGE_GREW, TOO_LONG

ROW: Final = "rotator_row"
"""The alias of a row of the target in every statement that a :class:`Condition` is part of."""

_OLD: Final = "rotator_old"
_POSITION: Final = "rotator_position"
_REPEATED: Final = 1
_KEPT: Final = 2


def identifier(*path: str) -> sql.Identifier:
    """Return a quoted name for a statement that is executed with parameters, even with none.

    The driver looks for placeholders inside quoted names too, so their percent signs are doubled.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in path))


@dataclass(frozen=True, slots=True)
class Condition(sql.Composable):
    """A condition in SQL about the alias :data:`ROW`.

    Attributes:
        text: The SQL, with ``%s`` for each parameter and ``%%`` for each percent sign.
        parameters: Values that become literals, so that the server plans with them.
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
    """A column of the table.

    Attributes:
        type_name: The type's name, e.g. ``int8``; for a domain, the name of the base type. Without a length:
            an explicit cast would cut a value, where an assignment is an error.
        collation: The collation's schema and name, unquoted; None where the type has none.
        keeps_null: Whether a NULL stays NULL.
        stored_type: The column's own type as SQL, e.g. ``numeric(5,2)``, to which an assignment converts a
            value; empty where it is the base type.
        keeps_blank: Whether an empty text stays empty; only where the type has such a value.
    """

    name: str
    type_name: str
    type_schema: str = "pg_catalog"
    collation: tuple[str, str] | None = None
    keeps_null: bool = False
    stored_type: str = ""
    keeps_blank: bool = False

    def is_rotated(self, value: sql.Composable) -> sql.Composable | None:
        """Return a condition that is true where a row with this old value gets a new one; None for always."""
        conditions = [sql.SQL("{} IS NOT NULL").format(value)] if self.keeps_null else []
        if self.keeps_blank:
            conditions.append(sql.SQL("{} IS DISTINCT FROM ''").format(value))
        return sql.SQL(" AND ").join(conditions) if conditions else None

    def null_unless_rotated(self, value: sql.Composable, result: sql.Composable) -> sql.Composable:
        """Return a result that is NULL where a row with this old value keeps it."""
        is_rotated = self.is_rotated(value)
        return (
            result if is_rotated is None else sql.SQL("CASE WHEN {} THEN {} END").format(is_rotated, result)
        )

    @property
    def kept(self) -> tuple[sql.Composable, sql.Composable]:
        """Conditions about :data:`ROW`: it has a NULL that stays NULL, or an empty text that stays empty."""
        value, never = identifier(ROW, self.name), sql.SQL("false")
        return (
            sql.SQL("{} IS NULL").format(value) if self.keeps_null else never,
            sql.SQL("{} = ''").format(value) if self.keeps_blank else never,
        )

    @property
    def type(self) -> sql.Composable:
        """The type's quoted name."""
        return identifier(self.type_schema, self.type_name)

    @property
    def cast(self) -> sql.Composable:
        """The cast of a text to a value that compares as the column does."""
        if self.collation is None:
            return sql.SQL("::{}").format(self.type)
        return sql.SQL("::{} COLLATE {}").format(self.type, identifier(*self.collation))


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetTable:
    """The table that holds the rotated columns.

    Attributes:
        path: The table's name, after its schema where it has one; unquoted.
        key: The columns of the primary key, in the index's order.
        columns: The rotated columns.
        condition: The condition for the rotated rows; None for all rows.
        found_name: The table's name and schema as the server quotes them, for every alias and search path.
        oid: The table's oid; 0 where it was not read.
        has_before_triggers: Whether an update fires triggers that can change the new values.
    """

    path: tuple[str, ...]
    key: tuple[Column, ...]
    columns: tuple[Column, ...]
    condition: Condition | None = None
    found_name: str = ""
    is_partitioned: bool = False
    oid: int = 0
    has_before_triggers: bool = False

    @property
    def name(self) -> sql.Composable:
        """The table's quoted name."""
        return identifier(*self.path)

    @property
    def quoted_name(self) -> str:
        """The table's quoted name as a value."""
        return sql.Identifier(*self.path).as_string()

    @property
    def column_names(self) -> list[str]:
        """The names of the rotated columns, unquoted."""
        return [column.name for column in self.columns]

    def compose(self, text: LiteralString, /, **parts: sql.Composable | str | float | None) -> sql.Composed:
        """Compose SQL from a text with names in braces: those of these parts of the table, and others.

        ``table`` is the table's name, ``regclass`` its oid, and ``partitions`` a subquery with the ``oid`` of
        each leaf partition, or of the table itself. ``row`` is the table under the alias :data:`ROW`, and
        ``row_name`` this alias. ``leaf``, ``ctid``, ``xmin`` and ``row_key`` are columns of the row,
        ``row_json`` is its key as the text of a JSON array, and ``key`` has the names of the key's columns.
        ``and_matches`` restricts a condition to the rows to rotate. A part that is no SQL becomes a literal.
        """
        own: dict[str, sql.Composable] = {
            "table": self.name,
            # A cast of a text is evaluated at each execution, also of a statement that is prepared.
            "regclass": sql.SQL("{}::text::regclass").format(self.quoted_name.replace("%", "%%")),
            "row": sql.SQL("{} AS {}").format(self.name, identifier(ROW)),
            "row_name": identifier(ROW),
            "leaf": identifier(ROW, "tableoid"),
            "ctid": identifier(ROW, "ctid"),
            "xmin": identifier(ROW, "xmin"),
            "key": self.key_columns(),
            "row_key": self.key_columns(ROW),
            "row_json": self.key_json(ROW),
            "and_matches": self.and_matches,
        }
        own["partitions"] = sql.SQL(
            "(SELECT COALESCE(tree.relid, root.oid::regclass)::oid AS oid"
            " FROM (SELECT {}::oid AS oid) AS root"
            # A table without partitions has no row there.
            " LEFT JOIN LATERAL pg_partition_tree(root.oid) AS tree ON tree.isleaf)"
        ).format(own["regclass"])
        return sql.SQL(text).format(**own, **parts)

    @property
    def matches(self) -> sql.Composable | None:
        """A condition about :data:`ROW`: the row is rotated; None where all rows are."""
        conditions = [] if self.condition is None else [sql.SQL("({})").format(self.condition)]
        rotated = [column.is_rotated(identifier(ROW, column.name)) for column in self.columns]
        restricting = [condition for condition in rotated if condition is not None]
        # A column that always gets a value takes every row.
        if len(restricting) == len(rotated):
            either = sql.SQL(" OR ").join(sql.SQL("({})").format(condition) for condition in restricting)
            conditions.append(sql.SQL("({})").format(either))
        return sql.SQL(" AND ").join(conditions) if conditions else None

    @property
    def and_matches(self) -> sql.Composable:
        """The condition of :attr:`matches`, to follow another one."""
        return sql.SQL("") if self.matches is None else sql.SQL(" AND {}").format(self.matches)

    def own_name(self, name: str) -> sql.Composable:
        """Return the quoted name of a column that a subquery has next to those of the key."""
        taken = {column.name for column in self.key}
        while name in taken:
            name += "_"
        return identifier(name)

    def key_columns(self, *alias: str) -> sql.Composable:
        """Return the key's columns, separated by commas; those of an alias, if given."""
        return sql.SQL(", ").join(identifier(*alias, column.name) for column in self.key)

    def key_json(self, *alias: str) -> sql.Composable:
        """Return a row's key as JSON array text, from the columns of an alias, if given."""
        return sql.SQL("jsonb_build_array({})::text").format(self.key_columns(*alias))

    def decoded(self, array: sql.Composable) -> sql.Composable:
        """Return the values of a JSON array in the key's own types."""
        return sql.SQL(", ").join(
            sql.SQL("({} ->> {}){}").format(array, position, column.cast)
            for position, column in enumerate(self.key)
        )

    def within(self, *, after_is_known: bool) -> sql.Composable:
        """Return a condition about :data:`ROW`: its key is between ``after`` and ``through``."""
        through = self.compose("({row_key}) <= ({last})", last=self.decoded(sql.SQL("%(through)s::jsonb")))
        if not after_is_known:
            return through
        first = self.decoded(sql.SQL("%(after)s::jsonb"))
        return self.compose("({row_key}) > ({first}) AND {through}", first=first, through=through)

    @property
    def digests(self) -> sql.Composable:
        """An array with a hash of the stored value of each rotated column of :data:`ROW`.

        The hash is NULL for a NULL or an empty text that is not rotated.
        """
        digests = []
        for column in self.columns:
            value = identifier(ROW, column.name)
            digest = sql.SQL("hashtextextended(ROW({})::text, 0)").format(value)
            digests.append(column.null_unless_rotated(value, digest))
        return sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(digests))


def count_writes(table: TargetTable) -> sql.Composed:
    """Count the row versions that this session has written to the table.

    Only the difference of counts within a transaction has a meaning. The second column is the transaction's
    seconds, and the third one the table's oid.
    """
    return table.compose(
        "SELECT COALESCE(sum(pg_stat_get_xact_tuples_inserted(leaf.oid)"
        " + pg_stat_get_xact_tuples_updated(leaf.oid)), 0)::bigint,"
        " extract(epoch FROM clock_timestamp() - transaction_timestamp())::float8, {regclass}::oid::bigint"
        " FROM {leaves} AS leaf",
        # Most tables have no partitions to look for.
        leaves=table.compose("{partitions}" if table.is_partitioned else "(SELECT {regclass}::oid AS oid)"),
    )


def values_name(at: int) -> str:
    """Return the name of the parameter that holds the new values of the column at this index."""
    return f"values_{at}"


def range_rows(table: TargetTable, *, after_is_known: bool) -> sql.Composable:
    """Return the FROM clause and the conditions for the rows of a range."""
    return table.compose(
        "{row} WHERE {within}{and_matches}", within=table.within(after_is_known=after_is_known)
    )


def range_update(
    table: TargetTable,
    *,
    after_is_known: bool,
    transaction_seconds: float,
    entering: sql.Composable | None = None,
) -> sql.Composed:
    """Update the rows of one slice of a range; see docs/decisions/0001.

    It fails when the transaction is older than ``transaction_seconds``. For ``entering`` see :func:`_update`.

    Parameters: those of :func:`_update`, ``after``, ``through`` and ``rows``: the number of new values. More
    rows than that are an error.
    """
    old_rows = table.compose(
        "SELECT {key}, {old_values}, (row_number() OVER (ORDER BY {key}))::integer AS {position} FROM {rows}",
        old_values=_old_values(table),
        position=table.own_name(_POSITION),
        rows=range_rows(table, after_is_known=after_is_known),
    )
    condition = table.compose(
        "{same_key} AND {within} AND CASE WHEN {position} <= %(rows)s::integer THEN true"
        # The text includes a column: the planner would evaluate a constant cast, and fail, before any row.
        " ELSE CAST({grew} || ', at row ' || {position} AS boolean) END"
        # Evaluated once, before the first row.
        " AND (SELECT CASE WHEN clock_timestamp() - transaction_timestamp() < make_interval(secs => {limit})"
        " THEN true ELSE CAST({too_long} || clock_timestamp() AS boolean) END){and_matches}",
        same_key=sql.SQL(" AND ").join(
            sql.SQL("{} = {}").format(identifier(ROW, column.name), identifier(_OLD, column.name))
            for column in table.key
        ),
        within=table.within(after_is_known=after_is_known),
        position=_of_old(table, _POSITION),
        grew=RANGE_GREW,
        limit=transaction_seconds,
        too_long=TOO_LONG,
    )
    return _update(table, old_rows, condition, entering)


def keyed_update(table: TargetTable, entering: sql.Composable | None = None) -> sql.Composed:
    """Update the rows with some keys, which are locked in the key's order.

    Parameters: those of :func:`_update` and ``keys`` (texts of JSON arrays). For ``entering`` see there, too.
    """
    old_rows = sql.SQL("SELECT keys.*, {} FROM {} ORDER BY {}").format(
        _old_values(table), rows_with_keys(table), table.key_columns("keys")
    )
    condition = table.compose("({row_key}) = ({old_key})", old_key=table.key_columns(_OLD))
    return _update(table, old_rows, condition, entering)


def placed_update(table: TargetTable) -> sql.Composed:
    """Update the rows at some places, through the table itself.

    Parameters: those of :func:`_update`, ``leaves``, ``ctids``, ``xids`` and ``keys`` (one of each for each
    row).
    """
    old_rows = sql.SQL("SELECT places.*, {} FROM {}").format(_old_values(table), rows_at_places(table))
    condition = table.compose("{is_at_place}{and_matches}", is_at_place=_is_at_place(table, _OLD))
    return _update(table, old_rows, condition)


def rows_with_keys(table: TargetTable) -> sql.Composable:
    """Return a join with the rows that have the keys of the parameter ``keys``; conditions can follow."""
    return table.compose(
        "(SELECT {decoded}, {position} FROM unnest(%(keys)s::text[]) WITH ORDINALITY"
        " AS texts (rotator_key, {position})) AS keys ({key}, {position})"
        " JOIN {row} ON ({row_key}) = ({key_of_keys})",
        decoded=table.decoded(sql.SQL("rotator_key::jsonb")),
        position=table.own_name(_POSITION),
        key_of_keys=table.key_columns("keys"),
    )


def rows_at_places(table: TargetTable) -> sql.Composable:
    """Return a join with the row versions at ``leaves``, ``ctids``, ``xids`` and ``keys``, likewise."""
    return table.compose(
        "unnest(%(leaves)s::bigint[]::oid[], %(ctids)s::text[]::tid[], %(xids)s::text[]::xid[],"
        " %(keys)s::text[]) WITH ORDINALITY AS places (leaf, place, xid, rotator_key, {position})"
        " JOIN {row} ON {is_at_place}",
        position=table.own_name(_POSITION),
        is_at_place=_is_at_place(table, "places"),
    )


def _is_at_place(table: TargetTable, alias: str) -> sql.Composable:
    """Return a condition about :data:`ROW`.

    With ``xmin``, so that a row's next version does not match, and with the key, so that no other row matches
    that a rewrite of the table has moved there.
    """
    return table.compose(
        "{ctid} = {alias}.place AND {leaf} = {alias}.leaf AND {xmin} = {alias}.xid"
        " AND {row_json} = {alias}.rotator_key",
        alias=identifier(alias),
    )


def _old_values(table: TargetTable) -> sql.Composable:
    return sql.SQL(", ").join(
        sql.SQL("{} AS {}").format(identifier(ROW, column.name), table.own_name(f"rotator_old_{at}"))
        for at, column in enumerate(table.columns)
    )


def _of_old(table: TargetTable, name: str) -> sql.Composable:
    return sql.SQL("{}.{}").format(identifier(_OLD), table.own_name(name))


def _update(
    table: TargetTable,
    old_rows: sql.Composable,
    condition: sql.Composable,
    entering: sql.Composable | None = None,
) -> sql.Composed:
    """Update :data:`ROW`, joined with a subquery that has the old values and a position for each row.

    It returns one row: the number of updated rows, of rows that still have an old value although another one
    was assigned (a trigger restored it), of rows with a new value that is equal to the old one, and of
    entries. Stored bytes are compared (``*=``): other operators treat some different values as equal, or do
    not exist.

    ``entering`` is a statement that enters old values into the ledger, and returns a row for each entry. Both
    see the same snapshot.

    Parameters: ``values_0`` and so on, one array for each column; a row takes the element at its position.
    """
    same = sql.SQL("ROW({})::record *= ROW({})::record")
    assignments, outcomes = [], []
    for at, column in enumerate(table.columns):
        name, current = identifier(column.name), identifier(ROW, column.name)
        old = _of_old(table, f"rotator_old_{at}")
        new = sql.SQL("({}::{}[])[{}]").format(
            sql.Placeholder(values_name(at), format=PyFormat.BINARY),
            column.type,
            _of_old(table, _POSITION),
        )
        # The type of the column, into which an assignment rounds a value, or pads it with blanks.
        stored = sql.SQL(column.stored_type.replace("%", "%%")) if column.stored_type else column.type
        is_unchanged = same.format(current, old)
        is_repeated = same.format(
            sql.SQL("{}::{}").format(new, stored), sql.SQL("{}::{}").format(old, stored)
        )
        if (is_rotated := column.is_rotated(old)) is not None:
            is_unchanged = sql.SQL("{} AND {}").format(is_rotated, is_unchanged)
        is_assigned = column.is_rotated(current)
        # With one column, the condition selects only rows that get a value.
        if is_assigned is not None and len(table.columns) > 1:
            new = sql.SQL("CASE WHEN {} THEN {} ELSE {} END").format(is_assigned, new, current)
        assignments.append(sql.SQL("{} = {}").format(name, new))
        outcomes.append(
            sql.SQL("CASE WHEN {} THEN CASE WHEN {} THEN {} ELSE {} END ELSE 0 END").format(
                is_unchanged, is_repeated, _REPEATED, _KEPT
            )
        )
    return table.compose(
        "WITH {entered}written AS"
        " (UPDATE {row} SET {assignments} FROM ({old_rows}) AS {old} WHERE {condition}"
        " RETURNING GREATEST({outcomes}) AS outcome)"
        " SELECT count(*), count(*) FILTER (WHERE outcome = {kept}),"
        " count(*) FILTER (WHERE outcome = {repeated}), {number_entered} FROM written",
        assignments=sql.SQL(", ").join(assignments),
        old_rows=old_rows,
        old=identifier(_OLD),
        condition=condition,
        outcomes=sql.SQL(", ").join(outcomes),
        kept=_KEPT,
        repeated=_REPEATED,
        entered=sql.SQL("" if entering is None else "entered AS ({}), ").format(entering),
        number_entered=sql.SQL("0" if entering is None else "(SELECT count(*) FROM entered)"),
    )
