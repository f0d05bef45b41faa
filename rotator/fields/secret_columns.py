"""Finds the columns of a project that look like secrets, and asks whether they can be rotated."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from django.apps import apps
from django.conf import settings
from django.db import Error, ProgrammingError, connections, router
from psycopg import AsyncConnection

from rotator.exceptions import NoDefaultError, OptionError, RotatorError, TargetError
from rotator.fields.connections import (
    check_postgresql,
    is_in_transaction,
    reading_rows,
    reading_times,
    run_in_new_loop,
)
from rotator.fields.model import AnyField, field_label, key_fields
from rotator.fields.secret_rules import Finding, Kind, can_hold_secrets, judge
from rotator.fields.server import read_session, server_of
from rotator.fields.target import find_fields, resolve, table_path
from rotator.models import Rotation
from rotator.options import Selection
from rotator.postgres.catalog import read_table
from rotator.postgres.column_samples import (
    ColumnSample,
    Pauses,
    StoredTable,
    UnreadableError,
    connected_for_reading,
    read_stored_table,
    reading,
    sample_column,
)
from rotator.postgres.connection import Server
from rotator.postgres.copies import CopySearch, find_copies
from rotator.postgres.errors import translate_errors

# The code of the error for a write in a read-only transaction.
_READ_ONLY: Final = "25006"
_DATABASE_CACHE: Final = "django.core.cache.backends.db.DatabaseCache"


@dataclass(kw_only=True, slots=True)
class SecretColumn:
    """A column that looks like a secret.

    Attributes:
        label: The column as ``app.Model.field``, or the name of a cache.
        options: The options of ``async_rotate`` that rotate it; None where it cannot be rotated.
        refusal: The reason why it cannot be rotated; empty otherwise.
        last_rotation: The latest completed rotation; None where there is none.
    """

    label: str
    table: StoredTable
    finding: Finding
    options: tuple[str, ...] | None = None
    refusal: str = ""
    last_rotation: Rotation | None = None

    @property
    def can_be_rotated(self) -> bool:
        """Whether a rotation is what to do about it."""
        return self.finding.kind is Kind.SECRET and not self.finding.advice


@dataclass(slots=True)
class Inventory:
    """The columns with secrets of one database, in the order of their names.

    Attributes:
        examined: The number of columns that the rules examined.
        problems: The tables and columns that could not be read, one phrase each.
    """

    examined: int = 0
    columns: list[SecretColumn] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def take_inventory(database: str) -> Inventory:
    """Find the columns with secrets of a database, by read-only transactions.

    Raises:
        TargetError: The database is not PostgreSQL.
        OptionError: The program has a transaction open.
        ServerLostError: The server cannot be reached.
    """
    server = _server_for_reading(database)
    # Before the event loop, since the project's routers may read from the database.
    fields = list(_stored_fields(database))
    inventory = Inventory(examined=len(fields))
    caches = {
        alias: (str(options.get("LOCATION", "")),)
        for alias, options in settings.CACHES.items()
        if options.get("BACKEND") == _DATABASE_CACHE
    }
    tables, found = run_in_new_loop(lambda: _examine(server, fields, list(caches.values()), inventory))
    rotations = _last_rotations(database)
    for each, column in found.items():
        if column.can_be_rotated:
            _resolve(column, each, database)
        column.last_rotation = rotations.get((column.label, column.table.name))
    inventory.columns += sorted(found.values(), key=lambda column: column.label)
    inventory.columns += [
        SecretColumn(
            label=f"cache '{alias}'",
            table=tables[path],
            finding=Finding(
                Kind.COPY,
                ("it is a cache, which can hold copies of rows",),
                f"Clear it: django.core.cache.caches[{alias!r}].clear().",
            ),
        )
        for alias, path in caches.items()
        if path in tables
    ]
    return inventory


def search_copies(database: str, rotation: int, *, every_row: bool) -> CopySearch:
    """Search all tables of a database for old values of a rotation, by read-only transactions.

    Without ``every_row`` it searches a sample of each column first.

    Raises:
        OptionError: There is no such rotation, or it has no ledger.
        ServerLostError: The server cannot be reached.
    """
    server = _server_for_reading(database)
    try:
        with reading_rows(database), reading_times(database):
            found = Rotation.objects.using(database).filter(pk=rotation).first()
    except ProgrammingError as error:
        raise OptionError(
            f"The rotator's tables cannot be read in the database '{database}'. Check that the database is "
            "migrated."
        ) from error
    if found is None:
        raise OptionError(f"There is no rotation {rotation} in the database '{database}'.")
    columns = [str(each.column) for each in find_fields(found.target.split())]

    async def search() -> CopySearch:
        async with connected_for_reading(server) as own:
            return await find_copies(
                own, server, rotation=rotation, table=found.table_name, columns=columns, every_row=every_row
            )

    return run_in_new_loop(search)


def _server_for_reading(database: str) -> Server:
    connection = connections[database]
    check_postgresql(connection)
    if is_in_transaction(connection):
        raise OptionError(
            "Secrets cannot be searched inside a transaction, which would become read-only. Call the command "
            "outside atomic()."
        )
    with reading_rows(database):
        return server_of(connection, read_session(connection, ("pg_class",)).search_path)


def _stored_fields(database: str) -> Iterator[AnyField]:
    """Yield the fields of the project's models that can hold secrets, without the rotator's own."""
    for model in apps.get_models():
        meta = model._meta
        is_own = model.__module__ == Rotation.__module__
        if meta.proxy or meta.swapped or is_own or not router.allow_migrate_model(database, model):
            continue
        for each in meta.local_concrete_fields:
            if can_hold_secrets(each) or judge(each):
                yield each


async def _examine(
    server: Server, fields: Sequence[AnyField], others: Sequence[tuple[str, ...]], inventory: Inventory
) -> tuple[Mapping[tuple[str, ...], StoredTable], Mapping[AnyField, SecretColumn]]:
    """Read the tables, take samples of their columns, and judge these."""
    tables = dict[tuple[str, ...], StoredTable]()
    found = dict[AnyField, SecretColumn]()
    pauses = Pauses()
    # Packages have models without a table, and another database can have the table of a cache.
    expected = {table_path(each.model) for each in fields if each.model._meta.managed}
    async with connected_for_reading(server) as connection:
        for path in dict.fromkeys([*(table_path(each.model) for each in fields), *others]):
            table = await read_stored_table(connection, server, path)
            if table is not None:
                tables[path] = table
            elif path in expected:
                inventory.problems.append(f"The database has no table {'.'.join(path)}")
            await pauses.pause()
        for each in fields:
            if (table := tables.get(table_path(each.model))) is None:
                continue
            sample: ColumnSample | None = None
            try:
                if table.rows or not table.rows_is_exact:
                    sample = await sample_column(connection, server, table, str(each.column))
            except UnreadableError as error:
                inventory.problems.append(f"{field_label(each)} could not be sampled: {error}")
            if finding := judge(each, sample):
                found[each] = SecretColumn(label=field_label(each), table=table, finding=finding)
                if found[each].can_be_rotated:
                    found[each].refusal = await _table_refusal(connection, server, each)
            await pauses.pause()
    return tables, found


async def _table_refusal(connection: AsyncConnection, server: Server, each: AnyField) -> str:
    """Return the reason why the table cannot be rotated; empty where it can."""
    try:
        async with translate_errors(connection), reading(connection, server):
            await read_table(
                connection,
                path=table_path(each.model),
                key=tuple(str(key.column) for key in key_fields(each.model)),
                columns=(str(each.column),),
            )
    except TargetError as error:
        return str(error)
    return ""


def _resolve(column: SecretColumn, each: AnyField, database: str) -> None:
    """Add the options of the column's rotation, or the reason of Django's side why it cannot be rotated."""
    # Checked first: an error in a default ends the transaction, so every later check would fail too.
    if refusal := _default_refusal(each, database):
        column.refusal = refusal
        return
    options = () if router.db_for_write(each.model) == database else ("--database", database)
    try:
        with reading_rows(database):
            resolve([column.label], database, Selection())
    except NoDefaultError as error:
        if error.generator is None:
            column.refusal = str(error)
        options = ("--generator", error.generator or "DOTTED.PATH", *options)
    except RotatorError as error:
        column.refusal = str(error)
    except Error as error:
        # Other code of the project may write.
        column.refusal = f"It cannot be examined: {type(error).__name__}."
    column.options = None if column.refusal else options


def _default_refusal(each: AnyField, database: str) -> str:
    """Return the reason why the default of a field cannot be called; empty where it can."""
    try:
        with reading_rows(database):
            # A rotation calls it in the same way. NOT_PROVIDED is a class: calling it has no effect.
            default: object = each.default
            if callable(default):
                default()
    except Exception as error:  # noqa: BLE001 - any error of the project's code
        if getattr(error.__cause__, "sqlstate", "") == _READ_ONLY:
            return "Its default writes to the database, and find_secrets only reads."
        return f"Its default cannot be tried: {type(error).__name__}."
    return ""


def _last_rotations(database: str) -> Mapping[tuple[str, str], Rotation]:
    """Return the latest completed rotations by column and table; none where the app is not migrated."""
    completed = Rotation.objects.using(database).filter(status=Rotation.Status.COMPLETED).order_by("pk")
    try:
        with reading_rows(database), reading_times(database):
            rotations = list(completed)
    except Error:
        return {}
    return {
        (label, rotation.table_name): rotation for rotation in rotations for label in rotation.target.split()
    }
