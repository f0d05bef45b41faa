"""Turns ``app.Model.field`` into a table, its key, a column and where new values come from."""

import uuid
from collections.abc import Callable
from typing import Any

from django.apps import apps
from django.core.exceptions import FieldDoesNotExist
from django.db import connections
from django.db.models import Field, Model, UUIDField
from django.db.models.fields import NOT_PROVIDED
from django.db.models.signals import post_save, pre_save

from rotator.errors import TargetError
from rotator.postgres.arrays import MakeValues, UuidBlock, Values
from rotator.run.options import RunTarget
from rotator.values import uuid4_block

_PARTS = 3


def resolve(label: str, database: str) -> RunTarget:
    """Find a target by the name that the user writes.

    Args:
        label: ``app.Model.field``.
        database: Django's alias of the database.

    Raises:
        TargetError: There is no such field, it is no column of its own, or nothing makes values for it.
    """
    field = _field(label)
    meta = field.model._meta
    return RunTarget(
        label=f"{meta.label}.{field.name}",
        database=database,
        path=_path(meta.db_table),
        key=tuple(_key_columns(field.model)),
        column=str(field.column),
        make_values=_make_values(label, field, database),
        bypassed=_bypassed(field.model),
    )


def _field(label: str) -> "Field[Any, Any]":
    parts = label.split(".")
    if len(parts) != _PARTS or not all(parts):
        raise TargetError(f"'{label}' is no target: write it as app.Model.field, e.g. shop.Order.api_key.")
    app, model_name, field_name = parts
    try:
        model = apps.get_model(app, model_name)
    except LookupError:
        raise TargetError(
            f"There is no model {app}.{model_name}: check the name, and that '{app}' is in INSTALLED_APPS."
        ) from None
    try:
        field = model._meta.get_field(field_name)
    except FieldDoesNotExist:
        names = ", ".join(sorted(field.name for field in model._meta.concrete_fields))
        raise TargetError(
            f"{model._meta.label} has no field '{field_name}': its columns are {names}."
        ) from None
    if not isinstance(field, Field) or not field.concrete or field.column is None:
        raise TargetError(
            f"{model._meta.label}.{field_name} is no column of the table: it cannot be rotated."
        )
    if field.primary_key:
        raise TargetError(
            f"{model._meta.label}.{field_name} is the primary key, by which rows are found: it cannot be "
            "rotated."
        )
    if field.is_relation:
        raise TargetError(
            f"{model._meta.label}.{field_name} refers to other rows: it holds no secret to be made anew."
        )
    return field


def _path(db_table: str) -> tuple[str, ...]:
    # Django passes a name that is quoted already through, which is how people write a schema: 'a"."b'.
    return tuple(part for part in db_table.strip('"').split('"."'))


def _bypassed(model: type[Model]) -> tuple[str, ...]:
    """What would have acted upon each save() of a row, and never hears of an update by the server."""
    automatic = [field.name for field in model._meta.concrete_fields if getattr(field, "auto_now", False)]
    signals = [
        name
        for name, signal in (("pre_save", pre_save), ("post_save", post_save))
        if signal.has_listeners(model)
    ]
    return tuple(
        [f"{name} (auto_now) stays as it is" for name in automatic]
        + [f"receivers of {name} are not called" for name in signals]
        + ([f"{model.__name__}.save() is not called"] if model.save is not Model.save else [])
    )


def _key_columns(model: type[Model]) -> list[str]:
    key = model._meta.pk
    if key is None:
        raise TargetError(f"{model._meta.label} has no primary key, by which rows could be found.")
    fields = getattr(model._meta, "pk_fields", [key])
    return [field.column for field in fields]


def _make_values(label: str, field: "Field[Any, Any]", database: str) -> MakeValues:
    default = field.default
    if not callable(default) or default is NOT_PROVIDED:
        raise TargetError(
            f"{label} has no default that makes a new value for each row, so nothing can be made for it."
        )
    if isinstance(field, UUIDField) and default is uuid.uuid4:
        return _uuid4_values
    return _values_of(field, default, database)


def _uuid4_values(count: int) -> Values:
    return UuidBlock(uuid4_block(count))


def _values_of(field: "Field[Any, Any]", default: Callable[[], object], database: str) -> MakeValues:
    connection = connections[database]

    def make(count: int) -> Values:
        return [field.get_db_prep_save(default(), connection) for _ in range(count)]

    return make
