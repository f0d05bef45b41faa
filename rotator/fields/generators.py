"""The source of new values: the fields' defaults, or a generator that the user names."""

import inspect
import math
import os
import time
import uuid
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from numbers import Number
from pkgutil import resolve_name
from typing import Final, TypeAlias, TypeVar

from asgiref.sync import sync_to_async
from django.core.exceptions import ValidationError
from django.core.validators import BaseValidator
from django.db import connections
from django.db.models import BinaryField, Model, UUIDField, Value
from django.db.models.fields import NOT_PROVIDED
from django.db.models.sql import Query
from django.utils.module_loading import import_string

from rotator.exceptions import NoDefaultError, RangeTooSlowError, ServerLostError, TargetError, ValuesError
from rotator.fields.advice import advice
from rotator.fields.connections import lost_is_an_outage, reading_times, unlogged
from rotator.fields.derivation import comparable, is_expression, overrides, sql_hook, transforms
from rotator.fields.model import AnyField, fetch_instances, fetch_instances_at, field_label
from rotator.postgres.values import UUID_BYTES, FromRows, InBulk, UuidBlock, Values, ValueSource

T = TypeVar("T")
Fetch: TypeAlias = Callable[[type[Model], Sequence[T], str], Mapping[T, Model]]
"""Returns the rows of a model with these keys, or at these places, in a database."""

MakeRow: TypeAlias = Callable[[], Sequence[object]]
"""Makes the values of one row, in the order of the fields."""

# The number of values that one query of a db_default returns.
SERVER_VALUES: Final = 500
# The number of attempts to make a value that differs from the others of its range.
TRIES: Final = 100
# The longest time to make the values of a range; a slower generator gets smaller ranges ...
BULK_SECONDS: Final = 2.0
# ... and the same for values that are made while their rows are locked.
ROWS_SECONDS: Final = 0.5
_TRIALS_OF_DEFAULT: Final = 5
# The text of a value with one of these methods is Python's notation, for example of bytes, a tuple or a dict.
_NOTATIONS: Final = (object.__str__, bytes.__str__, bytearray.__str__)

# RFC 9562, section 5.4: version 4 in the high half of byte 6, variant 10 in the top two bits of byte 8.
_SET_VERSION: Final = bytes(byte & 0x0F | 0x40 for byte in range(256))
_SET_VARIANT: Final = bytes(byte & 0x3F | 0x80 for byte in range(256))


def uuid4_block(count: int, random_bytes: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return the bytes of random version 4 UUIDs, one after the other, in network order."""
    block = bytearray(random_bytes(UUID_BYTES * count))
    block[6::UUID_BYTES] = block[6::UUID_BYTES].translate(_SET_VERSION)
    block[8::UUID_BYTES] = block[8::UUID_BYTES].translate(_SET_VARIANT)
    return bytes(block)


# --- The source of values ------------------------------------------------------------------------------


def value_source(fields: Sequence[AnyField], *, generator: str, database: str) -> ValueSource:
    """Return the source of the values of some fields of a model: the named generator, or their defaults.

    Raises:
        TargetError: There is no default that makes values, or the generator cannot be called.
    """
    if generator:
        return _from_generator(fields, generator, database)
    defaults = [_default(field, database) for field in fields]
    if len(fields) == 1 and type(fields[0]) is UUIDField and defaults[0] is uuid.uuid4:
        return InBulk(_uuid4s)
    name = "The default" if len(fields) == 1 else "The defaults"
    checker = _ValueChecker(f"{name} of {' and '.join(map(field_label, fields))}", fields, database)
    return _in_bulk(checker, lambda: [default() for default in defaults])


async def _uuid4s(count: int) -> tuple[Values, ...]:
    return (UuidBlock(uuid4_block(count)),)


def _in_bulk(checker: "_ValueChecker", make_row: MakeRow) -> InBulk:
    # One row would not show that the value is always the same.
    checker.make_rows([make_row] * 2, seconds=math.inf)

    def make(count: int) -> tuple[Values, ...]:
        with unlogged(checker.database):
            return checker.make_rows([make_row] * count, seconds=BULK_SECONDS)

    # In a thread, because the project's code may be slow or query the database.
    return InBulk(sync_to_async(make))


def _from_generator(fields: Sequence[AnyField], path: str, database: str) -> ValueSource:
    generator = _import_generator(path)
    checker = _ValueChecker(f"The generator {path}", fields, database)
    if not _takes_instance(path, generator):
        return _in_bulk(checker, lambda: checker.in_order(generator()))

    def make(fetch: Fetch[T], wanted: Sequence[T]) -> tuple[list[T], tuple[Values, ...]]:
        with unlogged(database):
            with lost_is_an_outage(), reading_times(database):
                rows = fetch(fields[0].model, wanted, database)
            make_rows = [partial(lambda row: checker.in_order(generator(row)), row) for row in rows.values()]
            return list(rows), checker.make_rows(make_rows, seconds=ROWS_SECONDS)

    return FromRows(
        sync_to_async(partial(make, fetch_instances)), sync_to_async(partial(make, fetch_instances_at))
    )


def check_plain_values(fields: Sequence[AnyField]) -> None:
    """Refuse fields whose values are changed in SQL."""
    for field in fields:
        if hook := sql_hook(field):
            raise _written_in_sql(field, hook)


def _written_in_sql(field: AnyField, hook: str) -> TargetError:
    return TargetError(
        f"{field_label(field)} writes its values through an SQL expression of its own ({hook}). The rotation "
        "writes plain values, which the application cannot read. Rotate the field with the application's own "
        "code."
    )


@dataclass(frozen=True, slots=True)
class _ValueChecker:
    """Calls a generator or defaults, named so in messages, and checks and prepares their values."""

    name: str
    fields: Sequence[AnyField]
    database: str

    def make_rows(self, make_rows: Sequence[MakeRow], *, seconds: float) -> tuple[Values, ...]:
        """Make the values of rows, at least of one, and return them by column.

        Raises:
            ValuesError: A value is not valid.
            RangeTooSlowError: It takes longer than the given seconds.
        """
        seen = set[object]()
        rows: list[list[object]] = []
        deadline = time.monotonic() + seconds
        for make_row in make_rows:
            if rows and time.monotonic() > deadline:
                raise RangeTooSlowError(f"{self.name[0].lower()}{self.name[1:]} is slow")
            rows.append(self._make_unique(make_row, seen))
        return tuple([list(column) for column in zip(*rows, strict=True)] or [[] for _ in self.fields])

    def in_order(self, result: object) -> Sequence[object]:
        """Return what a generator returned, in the order of the fields."""
        names = [field.name for field in self.fields]
        if isinstance(result, Mapping):
            if set(result) != set(names):
                raise self._error(
                    f"returned a mapping with {_listed(result)}, but the fields are {_listed(names)}."
                )
            return [result[name] for name in names]
        if len(names) > 1:
            raise self._error(
                f"returned a single value for several fields. It must return a mapping with {_listed(names)}."
            )
        if transforms(self.fields[0]):
            raise self._error(
                f"returned a plain value, which saving {names[0]} would transform. It must return a mapping "
                "of the field's name to the value to store."
            )
        return [result]

    def _make_unique(self, make_row: MakeRow, seen: set[object]) -> list[object]:
        for _ in range(TRIES):
            values = self._call(make_row)
            if all(isinstance(value, str | bytes) and not value for value in values):
                raise self._error("returned an empty value.")
            prepared = [self._prepare(field, value) for field, value in zip(self.fields, values, strict=True)]
            # An encrypting field stores the same value differently each time. Another field may store
            # different values as the same.
            both = {("value", *map(comparable, values)), ("prepared", *map(comparable, prepared))}
            if seen.isdisjoint(both):
                seen |= both
                return prepared
        raise self._error(
            f"returned the same value {TRIES} times for rows of one range. It must return a new one each "
            "time."
        )

    def _error(self, text: str) -> ValuesError:
        return ValuesError(f"{self.name} {text}")

    def _call(self, make_row: MakeRow) -> Sequence[object]:
        try:
            with lost_is_an_outage():
                return make_row()
        except (ValuesError, ServerLostError):
            raise
        # The last two would end the run as if it had been stopped.
        except (Exception, SystemExit, CancelledError) as error:  # noqa: BLE001 - the project's code
            # Neither chained nor quoted, because the message may contain a value.
            raise self._error(f"raised {type(error).__name__}.") from None

    def _prepare(self, field: AnyField, value: object) -> object:
        if value is None:
            raise self._error(f"returned None for {field.name}.")
        if hasattr(value, "resolve_expression"):
            raise self._error(f"returned an SQL expression for {field.name}. It must return values.")
        if self._stores_repr(field, value):
            raise self._error(
                f"returned {type(value).__name__} for {field_label(field)}, which stores text. Return a str."
            )
        self._check_limits(field, value)
        try:
            prepared = field.get_db_prep_save(value, connections[self.database])
        except Exception as error:  # noqa: BLE001 - any error of a custom field
            raise self._error(
                f"returned a value that {field.name} cannot store ({type(error).__name__})."
            ) from None
        if is_expression(prepared):
            raise _written_in_sql(field, "get_db_prep_save")
        if isinstance(prepared, str):
            if "\x00" in prepared:
                raise self._error(f"returned a text with a zero byte for {field.name}.")
            try:
                prepared.encode()
            except UnicodeEncodeError:
                raise self._error(f"returned a text for {field.name} that is not valid Unicode.") from None
        return prepared

    def _stores_repr(self, field: AnyField, value: object) -> bool:
        """Return whether the field stores Python's notation of a value that is no text, e.g. ``b'...'``."""
        is_text = type(value).__str__ not in _NOTATIONS or isinstance(value, Number)
        if is_text or isinstance(field, BinaryField):
            return False
        connection = connections[self.database]
        # If the conversion fails, saving fails too, or the field stores no text.
        with suppress(Exception):
            stored = field.get_db_prep_save(value, connection)
            if comparable(stored) == comparable(field.get_db_prep_save(str(value), connection)):
                return True
            # Encryption may store the same text differently each time.
            read = field.from_db_value(getattr(stored, "obj", stored), None, connection)  # type: ignore[attr-defined]
            return bool(read == str(value))
        return False

    def _check_limits(self, field: AnyField, value: object) -> None:
        # The stored form of the value counts, e.g. the text of a UUID. If the conversion fails, saving fails
        # too, with a message of its own.
        with suppress(Exception):
            value = field.to_python(value)
        for validator in field.validators:
            # Only the field's own limits: other validators are for forms and may check anything.
            if not isinstance(validator, BaseValidator):
                continue
            try:
                validator(value)
            except TypeError:
                # The limit is for another type; the server checks its own limits.
                continue
            except ValidationError:
                raise self._error(
                    f"returned a value for {field.name} that is over its limit "
                    f"({validator.code} {validator.limit_value})."
                ) from None


# --- Generators ----------------------------------------------------------------------------------------


def _import_generator(path: str) -> Callable[..., object]:
    """Import a function of a module, or a method of a class or of a model's manager."""
    try:
        found = _resolve(path)
    except Exception as error:
        raise TargetError(
            f"The generator {path} cannot be imported ({type(error).__name__}). Write it as "
            "package.module.name, or package.module.Class.name for a method."
        ) from error
    if not callable(found):
        raise TargetError(f"The generator {path} cannot be called. Name a function.")
    if inspect.iscoroutinefunction(found):
        raise TargetError(f"The generator {path} is a coroutine function. Name a plain function.")
    return found


def _resolve(path: str) -> object:
    try:
        return import_string(path)
    except ImportError as error:
        # A method has no module as its parent. Otherwise the first error is the one that helps.
        with suppress(Exception):
            return resolve_name(path)
        raise error from None


def _takes_instance(path: str, generator: Callable[..., object]) -> bool:
    try:
        signature = inspect.signature(generator)
    except (ValueError, TypeError):
        # A function that is written in C may have no signature.
        return False
    for arguments in ((), (None,)):
        with suppress(TypeError):
            signature.bind(*arguments)
            return bool(arguments)
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    needed = (each for each in signature.parameters.values() if each.kind in kinds)
    names = _listed(each.name for each in needed if each.default is Parameter.empty)
    raise TargetError(f"The generator {path} needs {names}. It may take no argument, or the row's instance.")


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, names)))


# --- Defaults ------------------------------------------------------------------------------------------


def _default(field: AnyField, database: str) -> Callable[[], object]:
    """Return the default of a field that makes a new value for each row."""
    if overrides(field, "get_default") and _makes_new_values(field.get_default):
        return field.get_default
    default: object = field.default
    # The trial of the values reports an error.
    if default is not NOT_PROVIDED and callable(default) and _makes_new_values(default, or_fails=True):
        return default
    server_default = field.db_default
    if hasattr(server_default, "resolve_expression") and not isinstance(server_default, Value):
        evaluate = _evaluate_on_server(field, server_default, database)
        if _makes_new_values(evaluate):
            return evaluate
    text, generator = advice(field, database)
    raise NoDefaultError(
        f"{field_label(field)} has no default that makes a new value for each row. {text}",
        generator=generator,
    )


def _makes_new_values(make: Callable[[], object], *, or_fails: bool = False) -> bool:
    """Return whether a default makes different values, unlike ``dict``."""
    # A short random value, such as a PIN, is the same twice now and then.
    with suppress(Exception):
        first, *others = (make() for _ in range(_TRIALS_OF_DEFAULT))
        return any(each != first or comparable(each) != comparable(first) for each in others)
    return or_fails


def _evaluate_on_server(field: AnyField, default: object, database: str) -> Callable[[], object]:
    """Return a function that returns a new value of a field's ``db_default``, many of them by one query."""
    values = deque[object]()

    def evaluate() -> object:
        if not values:
            connection = connections[database]
            text, parameters = Query(field.model).get_compiler(connection=connection).compile(default)
            with unlogged(database), connection.cursor() as cursor:
                cursor.execute(
                    f"SELECT {text} FROM generate_series(1, %s)",  # noqa: S608 - Django's own SQL
                    [*parameters, SERVER_VALUES],
                )
                values.extend(value for (value,) in cursor.fetchall())
        return values.popleft()

    return evaluate
