"""The update of rows that are named one by one, by the parameter ``keys``."""

from typing import Final

from psycopg import sql

from rotator.postgres.table import COUNT_OUTCOMES, ROW, TargetTable, identifier

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
