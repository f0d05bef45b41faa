"""Where new values come from on Django's side: the fields' defaults, or a generator that the user names."""

import inspect
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from asgiref.sync import sync_to_async
from django.core.exceptions import ValidationError
from django.core.validators import BaseValidator
from django.db import connections
from django.db.models import Field, Model, UUIDField

from rotator.errors import RangeTooSlowError, ServerLostError, TargetError, ValuesError
from rotator.instances import fetch_instances, fetch_instances_at
from rotator.keys import Key
from rotator.makers import default_maker, imported
from rotator.own_connections import lost_is_an_outage
from rotator.postgres.arrays import UuidBlock, Values
from rotator.postgres.value_source import FromRows, InBulk, Place, ValueSource
from rotator.project_connections import unlogged
from rotator.saving import comparable, is_expression, sql_hook, transforms
from rotator.values import uuid4_block

AnyField: TypeAlias = "Field[Any, Any]"

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
    maker = _Maker(f"{named} of {' and '.join(map(_name, fields))}", fields, database)
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
        f"{_name(field)} is written through an SQL expression of its own ({hook}), and the rotation writes "
        "plain values, which the application could not read. Rotate it with the application's own code."
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


def _name(field: AnyField) -> str:
    return f"{field.model._meta.label}.{field.name}"


def _listed(names: object) -> str:
    return ", ".join(sorted(map(str, names)))  # type: ignore[call-overload] # any iterable of names
