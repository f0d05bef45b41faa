"""The effect of ``Model.save()`` on fields, which an update by the server does not have."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import copy
from enum import Enum
from typing import Final

from django.db import connections
from django.db.models import BinaryField, DateField, IntegerField, Model, QuerySet, TimeField, UUIDField

from rotator.fields.connections import unlogged
from rotator.fields.model import AnyField

# Two different values for each type of field, to see whether another field derives its value from them.
_EXAMPLES: Final[tuple[tuple[type[AnyField], tuple[object, object]], ...]] = (
    (UUIDField, (uuid.UUID(int=1), uuid.UUID(int=2))),
    (IntegerField, (1, 2)),
    (BinaryField, (b"one", b"two")),
)
_TEXTS: Final = ("one", "two")

# The names up to Django 6.0, and since 6.1.
_SQL_HOOKS: Final = ("get_placeholder", "get_placeholder_sql")


class Derivation(Enum):
    """How a field's value depends on those of other fields when a row is saved."""

    NONE = "none"
    CERTAIN = "certain"
    UNCLEAR = "unclear"


def sql_hook(field: AnyField) -> str:
    """Return the name of the method that changes a field's value in SQL; empty if it has none."""
    for name in _SQL_HOOKS:
        hook = getattr(field, name, None)
        # The hooks of Django's own binary fields only add the type.
        if hook is not None and getattr(hook, "__func__", hook) is not getattr(BinaryField, name, None):
            return name
    # Any error of the project's code.
    with suppress(Exception):
        if overrides(field, "pre_save") and is_expression(_saved(field, field.model())):
            return "pre_save"
    return ""


def is_expression(value: object) -> bool:
    """Return whether Django would write SQL in place of this value."""
    return hasattr(value, "resolve_expression") or hasattr(value, "as_sql")


def comparable(value: object) -> str:
    """Return a text that is the same for equal values of any type."""
    # The text of the driver's wrappers and of memory views does not contain their whole value.
    value = getattr(value, "obj", value)
    return repr(bytes(value) if isinstance(value, memoryview | bytearray) else value)


def overrides(field: AnyField, name: str) -> bool:
    """Return whether a class outside Django defines this method of a field."""
    return any(
        name in vars(kind)
        for kind in type(field).__mro__
        if not kind.__module__.startswith("django.db.models.")
    )


def transforms(field: AnyField) -> bool:
    """Return whether saving changes the value of this field, e.g. to a hash.

    Tries ``pre_save()`` with examples. Returns True for a field that fails.
    """
    # Django's own methods set the time or commit a file.
    if not overrides(field, "pre_save"):
        return False
    try:
        return any(_changes(field, example, add=add) for add in (False, True) for example in (0, 1))
    except Exception:  # noqa: BLE001 - any error of the project's code
        return True


def stores_randomly(field: AnyField, database: str) -> bool:
    """Return whether this field stores the same value in another form each time, as encryption can do.

    Tries the field with an example. Returns False for a field that fails, because it says nothing.
    """
    with suppress(Exception):
        instance = _with_examples(field.model(), [field], 0)
        once, again = (_outcome(field, copy(instance), database)[0] for _ in range(2))
        return once != again
    return False


def stores_blank_otherwise(field: AnyField, database: str) -> bool:
    """Return whether this field stores the empty text in another form, e.g. encrypted, except as NULL."""
    with suppress(Exception):
        blank = b"" if isinstance(field, BinaryField) else ""
        stored = comparable(field.get_db_prep_save(blank, connections[database]))
        return stored not in map(comparable, ("", b"", None))
    return False


def _changes(field: AnyField, example: int, *, add: bool) -> bool:
    instance = _with_examples(field.model(), [field], example)
    given = comparable(getattr(instance, field.attname))
    if comparable(_saved(field, copy(instance), add=add)) == given:
        return False
    # A field that makes its own value at the first save does not transform the given one.
    return not add or _reads(field, [field], instance, add=add)


def derivation(field: AnyField, fields: Sequence[AnyField], model: type[Model], database: str) -> Derivation:
    """Return whether saving derives this field's value from those of other fields, as a checksum does.

    Tries ``pre_save()`` with a new instance, or with a row of the database if necessary.
    """
    # Neither the time of the last save nor a value of the server is derived from other fields.
    if isinstance(field, DateField | TimeField) or field.generated:
        return Derivation.NONE
    for instance in _instances(model, database):
        try:
            return _tried(field, fields, instance, database)
        except Exception:  # noqa: BLE001, S112 - any error of the project's code
            continue
    return Derivation.UNCLEAR if overrides(field, "pre_save") else Derivation.NONE


def _instances(model: type[Model], database: str) -> Iterator[Model]:
    """Yield examples: a new instance, and a row in case the new instance lacks something."""
    with suppress(Exception):
        yield model()
    with suppress(Exception), unlogged(database):
        # Any row: the model's own order could sort the whole table.
        yield QuerySet(model, using=database).order_by()[:1].get()


def _tried(field: AnyField, fields: Sequence[AnyField], instance: Model, database: str) -> Derivation:
    settled = _with_examples(instance, fields, 0)
    # A value that is made once, or only if there is none, is made here.
    _saved(field, settled)
    outcomes = [
        _outcome(field, changed, database)
        for changed in (copy(settled), copy(settled), _with_examples(settled, fields, 1))
    ]
    # The stored value counts, or the value itself if it is stored differently each time, encrypted for
    # example.
    for same, again, other in zip(*outcomes, strict=True):
        if same == again:
            return Derivation.NONE if same == other else Derivation.CERTAIN
    return Derivation.UNCLEAR if _reads(field, fields, settled) else Derivation.NONE


def _outcome(field: AnyField, instance: Model, database: str) -> tuple[str, str]:
    """Return the value as it is stored, and the value itself."""
    value = _saved(field, instance)
    return comparable(field.get_db_prep_save(value, connections[database])), comparable(value)


def _reads(field: AnyField, fields: Sequence[AnyField], settled: Model, *, add: bool = False) -> bool:
    """Return whether saving this field reads the values of the others."""
    instance = copy(settled)
    read: list[str] = []
    values = {other.attname: vars(instance).pop(other.attname, None) for other in fields}

    def refresh_from_db(*_args: object, **_options: object) -> None:
        # Django calls this for a missing attribute.
        read.extend(values)
        vars(instance).update(values)

    vars(instance)["refresh_from_db"] = refresh_from_db
    try:
        _saved(field, instance, add=add)
    except Exception:  # noqa: BLE001 - because the values are missing
        return True
    return bool(read)


def _with_examples(instance: Model, fields: Sequence[AnyField], example: int) -> Model:
    # A copy of the same instance, because defaults may be random.
    instance = copy(instance)
    for field in fields:
        examples = next((pair for kind, pair in _EXAMPLES if isinstance(field, kind)), _TEXTS)
        setattr(instance, field.attname, examples[example])
    return instance


def _saved(field: AnyField, instance: Model, *, add: bool = False) -> object:
    # The pre_save() of Django's own fields may commit a file.
    return field.pre_save(instance, add) if overrides(field, "pre_save") else getattr(instance, field.attname)
