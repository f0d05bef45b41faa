"""The target's table, key and column as SQL; keys travel as the server's own JSON arrays."""

from dataclasses import dataclass

from psycopg import sql


def identifier(*path: str) -> sql.Identifier:
    """A quoted name for a statement that is executed with parameters, even if there are none of them.

    The driver looks for placeholders inside quoted names too, so their percent signs are doubled.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in path))


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of the table.

    Attributes:
        name: The column's name, unquoted.
        type_name: The type's name in pg_catalog, e.g. ``int8``.
        collation: The collation's schema and name, unquoted; None where the type has none.
    """

    name: str
    type_name: str
    collation: tuple[str, str] | None = None

    @property
    def type(self) -> sql.Composable:
        """The type's quoted name."""
        return identifier("pg_catalog", self.type_name)

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
        column: The rotated column.
    """

    path: tuple[str, ...]
    key: tuple[Column, ...]
    column: Column

    @property
    def name(self) -> sql.Composable:
        """The table's quoted name."""
        return identifier(*self.path)

    @property
    def regclass(self) -> str:
        """The table's quoted name as a parameter to be cast to ``regclass``."""
        return sql.Identifier(*self.path).as_string()

    @property
    def key_columns(self) -> sql.Composable:
        """The key's columns, as ORDER BY wants them."""
        return self.key_columns_of(None)

    @property
    def key_json(self) -> sql.Composable:
        """A row's key as JSON array text."""
        return sql.SQL("jsonb_build_array({})::text").format(self.key_columns)

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

    def within(self, *, after_is_known: bool, alias: str | None = None) -> sql.Composable:
        """A condition: the key lies in the span of the parameters ``after`` and ``through``."""
        key = sql.SQL("({})").format(self.key_columns_of(alias))
        through = sql.SQL("{} <= ({})").format(key, self.decoded(sql.SQL("%(through)s::jsonb")))
        if not after_is_known:
            return through
        after = sql.SQL("{} > ({})").format(key, self.decoded(sql.SQL("%(after)s::jsonb")))
        return sql.SQL("{} AND {}").format(after, through)
