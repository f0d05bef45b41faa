"""The source of new values: the fields' defaults, or a generator that the user names."""

import inspect
import math
import os
import re
import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Final, TypeAlias

from asgiref.sync import sync_to_async
from django.core.exceptions import ValidationError
from django.core.validators import BaseValidator
from django.db import connections
from django.db.models import BinaryField, CharField, Field, IntegerField, Model, TextField, UUIDField, Value
from django.db.models.fields import NOT_PROVIDED
from django.db.models.sql import Query
from django.utils.module_loading import import_string

from rotator.exceptions import RangeTooSlowError, ServerLostError, TargetError, ValuesError
from rotator.fields.connections import lost_is_an_outage, unlogged
from rotator.fields.derivation import comparable, is_expression, overrides, sql_hook, transforms
from rotator.fields.model import fetch_instances, fetch_instances_at
from rotator.postgres.values import FromRows, InBulk, Place, UuidBlock, Values, ValueSource
from rotator.ranges import Key

_UUID_BYTES = 16
# RFC 9562, section 5.4: version 4 in the high half of byte 6, variant 10 in the top two bits of byte 8.
_VERSION_BYTE = 6
_VARIANT_BYTE = 8
_SET_VERSION = bytes(byte & 0x0F | 0x40 for byte in range(256))
_SET_VARIANT = bytes(byte & 0x3F | 0x80 for byte in range(256))


def uuid4_block(count: int, random_bytes: Callable[[int], bytes] = os.urandom) -> bytes:
    """Make random version 4 UUIDs, all at once.

    Args:
        count: How many; at least 0.
        random_bytes: Gives as many unpredictable bytes as it is asked for.

    Returns:
        ``16 * count`` bytes: one UUID behind the other, in network order.
    """
    block = bytearray(random_bytes(_UUID_BYTES * count))
    block[_VERSION_BYTE::_UUID_BYTES] = block[_VERSION_BYTE::_UUID_BYTES].translate(_SET_VERSION)
    block[_VARIANT_BYTE::_UUID_BYTES] = block[_VARIANT_BYTE::_UUID_BYTES].translate(_SET_VARIANT)
    return bytes(block)


AnyField: TypeAlias = "Field[Any, Any]"

SERVER_VALUES: Final = 500
"""The number of values that the server is asked for at once."""

_HASH: Final = re.compile(r"(^|_)(hash|hashed|digest|checksum|fingerprint|hmac|md5|sha\d+)(_|$)")
# What signed tokens carry to name themselves or the key of their signature.
_REFERRED: Final = re.compile(r"(^|_)(jti|kid|sid)(_|$)")
_MAKING: Final = re.compile(r"^_?(generate|make|create|new|random|get_new|get_random)_(?P<made>\w+)$")
_HEX_OF_32_BYTES: Final = 64
_BYTES: Final = 32


def imported(path: str) -> Callable[..., object]:
    """Import a callable: a function of a module, or a method of a class.

    Raises:
        TargetError: It cannot be imported, or is no plain callable.
    """
    try:
        found = _found(path)
    except Exception as error:
        raise TargetError(
            f"The generator {path} cannot be imported ({type(error).__name__}): write it as "
            "package.module.name, or package.module.Class.name for a method."
        ) from error
    if not callable(found):
        raise TargetError(f"The generator {path} cannot be called: name a function.")
    if inspect.iscoroutinefunction(found):
        raise TargetError(f"The generator {path} is a coroutine: name a plain function.")
    return found


def _found(path: str) -> object:
    try:
        return import_string(path)
    except ImportError:
        # The path of a method is that of its class, which is no module.
        owner, _, name = path.rpartition(".")
        if owner.count(".") < 1:
            raise
        return getattr(_class(owner), name)


def _class(path: str) -> object:
    module, _, name = path.rpartition(".")
    found: object = getattr(import_module(module), name)
    if not isinstance(found, type):
        raise TypeError(f"{path} is no class")
    return found


def default_maker(field: AnyField, database: str) -> Callable[[], object]:
    """Return what makes a new value of this field for each row.

    Args:
        field: The field.
        database: Django's alias of the database.

    Raises:
        TargetError: Nothing does; the text advises what could.
    """
    if overrides(field, "get_default") and _makes_new_values(field.get_default):
        return field.get_default
    default: object = field.default
    if default is not NOT_PROVIDED and callable(default):
        return default
    by_server = _ByServer(field, database)
    if by_server.is_expression and _makes_new_values(by_server):
        return by_server
    raise TargetError(
        f"{_field_name(field)} has no default that makes a new value for each row. "
        f"{_advice(field, field.model)}"
    )


def _makes_new_values(make: Callable[[], object]) -> bool:
    try:
        return comparable(make()) != comparable(make())
    except Exception:  # noqa: BLE001 - whatever the project's code raises
        return False


class _ByServer:
    """Has the server evaluate a field's ``db_default`` for each row."""

    def __init__(self, field: AnyField, database: str) -> None:
        self._field = field
        self._database = database
        self._values = deque[object]()

    @property
    def is_expression(self) -> bool:
        """Whether there is one that is more than a constant."""
        default = getattr(self._field, "db_default", NOT_PROVIDED)
        return hasattr(default, "resolve_expression") and not isinstance(default, Value)

    def __call__(self) -> object:
        if not self._values:
            self._values.extend(self._fetched())
        return self._values.popleft()

    def _fetched(self) -> list[object]:
        connection = connections[self._database]
        compiler = Query(self._field.model).get_compiler(connection=connection)
        text, parameters = compiler.compile(getattr(self._field, "db_default"))  # noqa: B009 - no stub has it
        with unlogged(self._database), connection.cursor() as cursor:
            cursor.execute(
                f"SELECT {text} FROM generate_series(1, %s)",  # noqa: S608 - Django's own SQL
                [*parameters, SERVER_VALUES],
            )
            return [value for (value,) in cursor.fetchall()]


def name_warnings(fields: list[AnyField]) -> tuple[str, ...]:
    """Return what the names of the rotated fields warn of, one sentence each."""
    warnings = [
        f"signed tokens refer to {field.name}: tokens that are revoked by it become valid again"
        for field in fields
        if _REFERRED.search(field.name)
    ]
    # With the field of the secret next to it, they are made together.
    if len(fields) == 1 and _HASH.search(fields[0].name):
        warnings.append(
            f"the name {fields[0].name} says that it holds a hash: values are stored as they are made"
        )
    return tuple(warnings)


def _advice(field: AnyField, model: type[Model]) -> str:
    if _REFERRED.search(field.name):
        return (
            "Signed tokens refer to it: with new values, tokens that are revoked by it would become valid "
            "again. Rotate the key of the signature instead."
        )
    if _HASH.search(field.name):
        return (
            "Its name says that it holds a hash, and a plain value in it matches no secret. Name the field "
            "of the secret as a target too, if there is one, and a --generator that returns a mapping of the "
            "fields' names to what is stored."
        )
    for path in _makers(field, model):
        return f"{path.rpartition('.')[2]} of the application may be what makes them: --generator {path}."
    return f"Name a callable that does with --generator{_example(field)}"


def _makers(field: AnyField, model: type[Model]) -> Iterator[str]:
    """The paths of the application's functions that seem to make values of this field."""
    module = import_module(model.__module__)
    for kind in model.__mro__:
        if kind.__module__.startswith("django."):
            continue
        for name, method in vars(kind).items():
            if isinstance(method, staticmethod | classmethod) and _makes(getattr(model, name), name, field):
                yield f"{model.__module__}.{model.__qualname__}.{name}"
    for name, function in vars(module).items():
        if inspect.isfunction(function) and _makes(function, name, field):
            yield f"{module.__name__}.{name}"


def _makes(function: Callable[..., object], name: str, field: AnyField) -> bool:
    found = _MAKING.match(name)
    if found is None or not (found["made"] in field.name or field.name in found["made"]):
        return False
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return not inspect.iscoroutinefunction(function)


def _example(field: AnyField) -> str:
    """Return the end of the advice: a callable whose values fit the field."""
    length = field.max_length
    if isinstance(field, UUIDField):
        return ", e.g. --generator uuid.uuid4."
    if isinstance(field, BinaryField):
        if length is None or length >= _BYTES:
            return ", e.g. --generator secrets.token_bytes."
        return f", one that returns secrets.token_bytes({length})."
    if isinstance(field, IntegerField):
        return ", one that returns secrets.randbelow(2**31), or less where the field has limits."
    if isinstance(field, CharField | TextField):
        return _text_example(field, length)
    return f", one that returns values for a {type(field).__name__}."


def _text_example(field: AnyField, length: int | None) -> str:
    # Hexadecimal digits stay the same where the application turns what it looks up into small letters.
    is_long = length is None or length >= _HEX_OF_32_BYTES
    digits = _HEX_OF_32_BYTES if length is None or is_long else length - length % 2
    try:
        field.run_validators(secrets.token_hex(digits // 2))
    except ValidationError:
        limit = "" if length is None else f" and at most {length} characters"
        return f", one whose values have the form that the field's validators accept{limit}."
    except Exception:  # noqa: BLE001, S110 - a validator of the project that needs more than a value
        pass
    if is_long:
        return ", e.g. --generator secrets.token_hex."
    if digits == 0:
        return f", one that returns texts of at most {length} characters."
    return f", one that returns at most {length} characters, e.g. secrets.token_hex({digits // 2})."


def _field_name(field: AnyField) -> str:
    return f"{field.model._meta.label}.{field.name}"


TRIES: Final = 100
"""How often a value is made anew that there was in the same range before."""

BULK_SECONDS: Final = 2.0
"""How long the values of a range may take to make; a slower generator gets smaller ranges."""

ROWS_SECONDS: Final = 0.5
"""The same where the rows are locked meanwhile."""


def value_source(
    fields: Sequence[AnyField], *, model: type[Model], generator: str, database: str
) -> ValueSource:
    """Find what makes the values of some fields.

    Args:
        fields: The fields, all of one model.
        model: That model.
        generator: The dotted path of a callable; empty for the fields' own defaults.
        database: Django's alias of the database.

    Raises:
        TargetError: There is nothing that makes values, or it cannot be called.
    """
    if generator:
        return _from_generator(fields, model, generator, database)
    defaults = [default_maker(field, database) for field in fields]
    if len(fields) == 1 and type(fields[0]) is UUIDField and defaults[0] is uuid.uuid4:
        return InBulk(_uuid4s)
    named = "The default" if len(fields) == 1 else "The defaults"
    maker = _Maker(f"{named} of {' and '.join(map(_field_name, fields))}", fields, database)
    return _in_bulk(maker, lambda: [default() for default in defaults])


def _from_generator(fields: Sequence[AnyField], model: type[Model], path: str, database: str) -> ValueSource:
    function = imported(path)
    maker = _Maker(f"The generator {path}", fields, database)
    if not _takes_instance(path, function):
        return _in_bulk(maker, lambda: maker.of_fields(function()))

    def values_of(rows: Iterable[Model]) -> tuple[Values, ...]:
        makers = [partial(lambda row: maker.of_fields(function(row)), row) for row in rows]
        return maker.make_each(makers, seconds=ROWS_SECONDS)

    def make(keys: Sequence[Key]) -> tuple[list[Key], tuple[Values, ...]]:
        with unlogged(database):
            with lost_is_an_outage():
                rows = fetch_instances(model, keys, database)
            return list(rows), values_of(rows.values())

    def make_at(places: Sequence[Place]) -> tuple[list[Place], tuple[Values, ...]]:
        with unlogged(database):
            with lost_is_an_outage():
                rows = fetch_instances_at(model, places, database)
            return list(rows), values_of(rows.values())

    return FromRows(sync_to_async(make), sync_to_async(make_at))


def check_plain_values(fields: Sequence[AnyField], model: type[Model]) -> None:
    """Refuse fields whose values are changed in SQL.

    Raises:
        TargetError: One of them is.
    """
    for field in fields:
        if hook := sql_hook(field, model):
            raise _written_by_sql(field, hook)


async def _uuid4s(count: int) -> tuple[Values, ...]:
    return (UuidBlock(uuid4_block(count)),)


def _in_bulk(maker: "_Maker", make_one: Callable[[], Sequence[object]]) -> InBulk:
    # What it gives cannot be known otherwise, and one row would not show that it is always the same.
    maker.make_each([make_one] * 2, seconds=math.inf)
    # In a thread: the project's code may ask the database, and may take its time.
    return InBulk(sync_to_async(partial(maker.make, make_one=make_one)))


@dataclass(frozen=True, slots=True)
class _Maker:
    """Calls what makes values, and prepares them for the database.

    Attributes:
        called: What it is called in messages.
        fields: The fields that it makes values for.
        database: Django's alias of the database.
    """

    called: str
    fields: Sequence[AnyField]
    database: str

    def make(self, count: int, make_one: Callable[[], Sequence[object]]) -> tuple[Values, ...]:
        """Make the values of so many rows."""
        with unlogged(self.database):
            return self.make_each([make_one] * count, seconds=BULK_SECONDS)

    def make_each(
        self, makers: Sequence[Callable[[], Sequence[object]]], *, seconds: float
    ) -> tuple[Values, ...]:
        """Make a row's values with each of these; one at least, however long it takes.

        Raises:
            ValuesError: There is something wrong with a value.
            RangeTooSlowError: They take longer than they may.
        """
        seen = set[object]()
        rows: list[list[object]] = []
        until = time.monotonic() + seconds
        for make_one in makers:
            if rows and time.monotonic() > until:
                raise RangeTooSlowError(f"{self.called[0].lower()}{self.called[1:]} is slow")
            rows.append(self._unseen(make_one, seen))
        return tuple([list(column) for column in zip(*rows, strict=True)] or [[] for _ in self.fields])

    def of_fields(self, given: object) -> Sequence[object]:
        """Put what a generator gave into the order of the fields."""
        names = [field.name for field in self.fields]
        if isinstance(given, Mapping):
            if set(given) != set(names):
                raise ValuesError(
                    f"{self.called} gives a mapping with {_listed(given)}, and the fields are "
                    f"{_listed(names)}."
                )
            return [given[name] for name in names]
        if len(names) > 1:
            raise ValuesError(
                f"{self.called} gives a single value for several fields: it must return a mapping with "
                f"{_listed(names)}."
            )
        if transforms(self.fields[0]):
            raise ValuesError(
                f"{self.called} gives a plain value, which saving {names[0]} would transform: it must return "
                "a mapping of the field's name to what is stored."
            )
        return [given]

    def _unseen(self, make_one: Callable[[], Sequence[object]], seen: set[object]) -> list[object]:
        for _ in range(TRIES):
            given = self._called(make_one)
            prepared = self._prepared(given)
            # An encrypting field stores the same value differently each time, another one stores different
            # values as the same.
            both = {("given", *map(comparable, given)), ("prepared", *map(comparable, prepared))}
            if seen.isdisjoint(both):
                seen |= both
                return prepared
        raise ValuesError(
            f"{self.called} gave the same value {TRIES} times for rows of one range: it must make a new one "
            "for each row"
        )

    def _called(self, make_one: Callable[[], Sequence[object]]) -> Sequence[object]:
        try:
            with lost_is_an_outage():
                return make_one()
        except (ValuesError, ServerLostError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever the project's code raises
            # Not chained and not quoted: the message may hold a value.
            raise ValuesError(f"{self.called} raised {type(error).__name__}") from None

    def _prepared(self, given: Sequence[object]) -> list[object]:
        return [self._of_field(field, value) for field, value in zip(self.fields, given, strict=True)]

    def _of_field(self, field: AnyField, value: object) -> object:
        if value is None:
            raise ValuesError(f"{self.called} gave None for {field.name}")
        if hasattr(value, "resolve_expression"):
            raise ValuesError(f"{self.called} gave an SQL expression for {field.name}: it must give values")
        self._check_limits(field, value)
        try:
            prepared = field.get_db_prep_save(value, connections[self.database])
        except Exception as error:  # noqa: BLE001 - whatever a custom field raises
            raise ValuesError(
                f"{self.called} gave something that {field.name} cannot store ({type(error).__name__})"
            ) from None
        if is_expression(prepared):
            raise _written_by_sql(field, "get_db_prep_save")
        if isinstance(prepared, str) and "\x00" in prepared:
            raise ValuesError(f"{self.called} gave a text with a zero byte for {field.name}")
        return prepared

    def _check_limits(self, field: AnyField, value: object) -> None:
        # What the field itself makes of it: a text of a UUID, where that is what is stored. Where it cannot,
        # it cannot store it either, and that is said of it next.
        with suppress(Exception):
            value = field.to_python(value)
        for validator in field.validators:
            # The field's own limits; other validators are the forms' and may ask anything.
            if not isinstance(validator, BaseValidator):
                continue
            try:
                validator(value)
            except TypeError:
                # Of another type than the limit is for: the server knows its own.
                continue
            except ValidationError:
                raise ValuesError(
                    f"{self.called} gave a value for {field.name} that is over its limit "
                    f"({validator.code} {validator.limit_value})"
                ) from None


def _written_by_sql(field: AnyField, hook: str) -> TargetError:
    return TargetError(
        f"{_field_name(field)} is written through an SQL expression of its own ({hook}), and the rotation "
        "writes plain values, which the application cannot read. Rotate it with the application's own code."
    )


def _takes_instance(path: str, function: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        # Of what is written in C there is no signature.
        return False
    needed = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(needed) > 1 or any(parameter.kind is parameter.KEYWORD_ONLY for parameter in needed):
        raise TargetError(
            f"The generator {path} needs {_listed(parameter.name for parameter in needed)}: it may take "
            "nothing, or the row's instance."
        )
    return bool(needed)


def _listed(names: object) -> str:
    return ", ".join(sorted(map(str, names)))  # type: ignore[call-overload] # any iterable of names
