"""The effect of ``Model.save()`` on a field, which an update by the server does not have."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import copy
from enum import Enum
from typing import Any, Final, TypeAlias

from django.db import connections
from django.db.models import (
    BinaryField,
    DateField,
    Field,
    IntegerField,
    Model,
    QuerySet,
    TimeField,
    UUIDField,
)

from rotator.fields.connections import unlogged

AnyField: TypeAlias = "Field[Any, Any]"

# Two values that differ, for fields that derive something from them.
_EXAMPLES: Final[tuple[tuple[type[AnyField], tuple[object, object]], ...]] = (
    (UUIDField, (uuid.UUID(int=1), uuid.UUID(int=2))),
    (IntegerField, (1, 2)),
    (BinaryField, (b"one", b"two")),
)
_TEXTS: Final = ("one", "two")

# The first is Django's name for it up to 6.0, the second from 6.1 on.
_SQL_HOOKS: Final = ("get_placeholder", "get_placeholder_sql")


class Derivation(Enum):
    """How a field's value depends on those of other fields when a row is saved."""

    NONE = "none"
    CERTAIN = "certain"
    UNCLEAR = "unclear"


def sql_hook(field: AnyField, model: type[Model]) -> str:
    """Return the name of the method by which a field changes its value in SQL; empty where it has none."""
    for name in _SQL_HOOKS:
        hook = getattr(field, name, None)
        # Those of Django's own binary columns only add the type.
        if hook is not None and getattr(hook, "__func__", hook) is not getattr(BinaryField, name, None):
            return name
    if overrides(field, "pre_save"):
        try:
            saved = _saved(field, model())
        except Exception:  # noqa: BLE001 - whatever the project's code raises
            return ""
        return "pre_save" if is_expression(saved) else ""
    return ""


def is_expression(value: object) -> bool:
    """Whether Django would write SQL in the place of this value."""
    return hasattr(value, "resolve_expression") or hasattr(value, "as_sql")


def comparable(value: object) -> str:
    """Return a text that is the same for equal values, of whatever type they are."""
    # The driver's wrappers and views of memory do not show their whole value.
    value = getattr(value, "obj", value)
    return repr(bytes(value) if isinstance(value, memoryview | bytearray) else value)


def overrides(field: AnyField, name: str) -> bool:
    """Whether a class that is not Django's own defines this method of a field."""
    return any(
        name in vars(kind)
        for kind in type(field).__mro__
        if not kind.__module__.startswith("django.db.models.")
    )


def transforms(field: AnyField) -> bool:
    """Whether saving writes something else to this field than what it was given, a hash, say.

    Only trying can tell. A field that cannot be tried may do so.
    """
    # Django's own set the time, or commit a file.
    if not overrides(field, "pre_save"):
        return False
    try:
        return any(
            _changes(field, example, add=add) for add in (False, True) for example in range(len(_TEXTS))
        )
    except Exception:  # noqa: BLE001 - whatever the project's code raises
        return True


def _changes(field: AnyField, example: int, *, add: bool) -> bool:
    instance = _with_examples(field.model(), [field], example)
    given = comparable(getattr(instance, field.attname))
    if comparable(_saved(field, copy(instance), add=add)) == given:
        return False
    # A field that makes a value with the first save, whatever it was given, makes nothing of that.
    return not add or _reads(field, [field], instance, add=add)


def derivation(field: AnyField, fields: Sequence[AnyField], model: type[Model], database: str) -> Derivation:
    """Find out whether saving derives this field's value from those of others, a checksum, say.

    Args:
        field: The field.
        fields: The others.
        model: The model of all of them.
        database: Django's alias of the database, for a row to try it with.
    """
    # A time of the last save is not derived from other fields, and neither is what the server makes.
    if isinstance(field, DateField | TimeField) or getattr(field, "generated", False):
        return Derivation.NONE
    for instance in _instances(model, database):
        try:
            return _tried(field, fields, instance, database)
        except Exception:  # noqa: BLE001, S112 - whatever the project's code raises
            continue
    return Derivation.UNCLEAR if overrides(field, "pre_save") else Derivation.NONE


def _instances(model: type[Model], database: str) -> Iterator[Model]:
    """Instances to try with: a new one, and a row where the new one lacks something."""
    with suppress(Exception):
        yield model()
    row: Model | None = None
    with suppress(Exception), unlogged(database):
        row = QuerySet(model, using=database)[:1].get()
    if row is not None:
        yield row


def _tried(field: AnyField, fields: Sequence[AnyField], instance: Model, database: str) -> Derivation:
    settled = _with_examples(instance, fields, 0)
    # What is made once, or only where there is nothing, is made here.
    _saved(field, settled)
    outcomes = [
        _outcome(field, changed, database)
        for changed in (copy(settled), copy(settled), _with_examples(settled, fields, 1))
    ]
    # What is stored counts. An encrypted value is stored differently each time, and then the value itself
    # counts.
    for same, again, other in zip(*outcomes, strict=True):
        if same == again:
            return Derivation.NONE if same == other else Derivation.CERTAIN
    return Derivation.UNCLEAR if _reads(field, fields, settled) else Derivation.NONE


def _outcome(field: AnyField, instance: Model, database: str) -> tuple[str, str]:
    """Return what saving stores, and the value that this is made of."""
    value = _saved(field, instance)
    return comparable(field.get_db_prep_save(value, connections[database])), comparable(value)


def _reads(field: AnyField, fields: Sequence[AnyField], settled: Model, *, add: bool = False) -> bool:
    """Whether saving this field looks at the values of the others."""
    instance = copy(settled)
    read: list[str] = []
    values = {other.attname: vars(instance).pop(other.attname, None) for other in fields}

    def refresh_from_db(*_args: object, **_options: object) -> None:
        # Django calls it for an attribute that an instance lacks.
        read.extend(values)
        vars(instance).update(values)

    vars(instance)["refresh_from_db"] = refresh_from_db
    try:
        _saved(field, instance, add=add)
    except Exception:  # noqa: BLE001 - it missed them
        return True
    return bool(read)


def _with_examples(instance: Model, fields: Sequence[AnyField], example: int) -> Model:
    # Of the same instance, since defaults may be random.
    instance = copy(instance)
    for field in fields:
        examples = next((pair for kind, pair in _EXAMPLES if isinstance(field, kind)), _TEXTS)
        setattr(instance, field.attname, examples[example])
    return instance


def _saved(field: AnyField, instance: Model, *, add: bool = False) -> object:
    # Django's own fields may commit a file.
    return field.pre_save(instance, add) if overrides(field, "pre_save") else getattr(instance, field.attname)
