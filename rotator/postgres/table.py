"""The target's table and key as SQL; keys travel as the server's own JSON arrays."""

from dataclasses import dataclass

from psycopg import sql


def identifier(*path: str) -> sql.Identifier:
    """A quoted name for a statement that is executed with parameters, even if there are none of them.

    The driver looks for placeholders inside quoted names too, so their percent signs are doubled.
    """
    return sql.Identifier(*(name.replace("%", "%%") for name in path))


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyColumn:
    """One column of the key.

    Attributes:
        name: The column's name, unquoted.
        type_name: The type's name in pg_catalog, e.g. ``int8``.
    """

    name: str
    type_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetTable:
    """The table that holds the rotated column.

    Attributes:
        path: The table's name, with its schema before it where it has one; unquoted.
        key: The columns of the primary key, in the index's order.
    """

    path: tuple[str, ...]
    key: tuple[KeyColumn, ...]

    @property
    def name(self) -> sql.Composable:
        """The table's quoted name."""
        return identifier(*self.path)

    @property
    def key_columns(self) -> sql.Composable:
        """The key's columns, as ORDER BY wants them."""
        return sql.SQL(", ").join(identifier(column.name) for column in self.key)

    @property
    def key_json(self) -> sql.Composable:
        """A row's key as JSON array text."""
        return sql.SQL("jsonb_build_array({})::text").format(self.key_columns)

    def decoded(self, array: sql.Composable) -> sql.Composable:
        """The values of a JSON array, in the key's own types, as ORDER BY wants them."""
        return sql.SQL(", ").join(
            sql.SQL("({} ->> {})::{}").format(
                array, sql.Literal(position), sql.Identifier("pg_catalog", column.type_name)
            )
            for position, column in enumerate(self.key)
        )

    def within(self, *, after_is_known: bool) -> sql.Composable:
        """A condition: the key lies in the span of the parameters ``after`` and ``through``."""
        key = sql.SQL("({})").format(self.key_columns)
        through = sql.SQL("{} <= ({})").format(key, self.decoded(sql.SQL("%(through)s::jsonb")))
        if not after_is_known:
            return through
        after = sql.SQL("{} > ({})").format(key, self.decoded(sql.SQL("%(after)s::jsonb")))
        return sql.SQL("{} AND {}").format(after, through)
