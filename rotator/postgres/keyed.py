"""Rows that are named one by one, by the parameter ``keys``."""

from typing import Final

from psycopg import sql

from rotator.postgres.table import ROW, TargetTable, identifier

_KEYED: Final = "rotator_keyed"
_POSITION: Final = "rotator_position"


def keyed_update(table: TargetTable, condition: sql.Composable) -> sql.Composed:
    """The update of the rows with these keys for which a condition about the alias ROW holds.

    Parameters: ``keys`` (texts of JSON arrays) and ``values_0`` and so on (an array for
    each column, in the order of the keys).
    """
    return sql.SQL("UPDATE {} SET {} FROM {} WHERE {} AND {}").format(
        table.row,
        table.assignments(identifier(_KEYED, _POSITION)),
        _keyed(table),
        _same_key(table),
        condition,
    )


def keyed_select(table: TargetTable, condition: sql.Composable) -> sql.Composed:
    """One of the rows with these keys for which a condition about the alias ROW holds."""
    return sql.SQL("SELECT FROM {}, {} WHERE {} AND {} LIMIT 1").format(
        table.row, _keyed(table), _same_key(table), condition
    )


def _keyed(table: TargetTable) -> sql.Composable:
    """The keys of the parameter as columns, each with its position in it."""
    return sql.SQL(
        # Sorted, so that the rows are locked in the key's order.
        "(SELECT {decoded}, {position} FROM unnest(%(keys)s::text[]) WITH ORDINALITY"
        " AS keys (rotator_key, {position}) ORDER BY {key}) AS {keyed}"
    ).format(
        key=table.key_columns,
        position=identifier(_POSITION),
        decoded=table.decoded_columns(sql.SQL("rotator_key::jsonb")),
        keyed=identifier(_KEYED),
    )


def _same_key(table: TargetTable) -> sql.Composable:
    return sql.SQL("({}) = ({})").format(table.key_columns_of(ROW), table.key_columns_of(_KEYED))
