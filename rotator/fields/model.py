"""A model's key, the names of its fields, and its instances by key or by place."""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias

from django.db import connections
from django.db.models import Field, Model, QuerySet

from rotator.postgres.values import Place, places_of
from rotator.ranges import Key

AnyField: TypeAlias = "Field[Any, Any]"


def field_label(field: AnyField) -> str:
    """Return a field's name as users write it: ``app.Model.field``."""
    return f"{field.model._meta.label}.{field.name}"


def key_fields(model: type[Model]) -> list[AnyField]:
    """Return the fields of a model's primary key; several if it is composite (Django 5.2)."""
    key = model._meta.pk
    return list(getattr(model._meta, "pk_fields", [key]))


def fetch_instances(model: type[Model], keys: Sequence[Key], database: str) -> Mapping[Key, Model]:
    """Return the rows with these keys, except those that were deleted."""
    fields = key_fields(model)
    values = {_value(key, fields): key for key in keys}
    rows: QuerySet[Model] = QuerySet(model, using=database)
    found = {row.pk: row for row in rows.filter(pk__in=list(values))}
    return {key: found[value] for value, key in values.items() if value in found}


def fetch_instances_at(model: type[Model], places: Sequence[Place], database: str) -> Mapping[Place, Model]:
    """Return the rows at these places, all of one leaf, except those that were deleted or moved."""
    rows: QuerySet[Model] = QuerySet(model, using=database)
    # Django looks for placeholders in these texts.
    table = connections[database].ops.quote_name(model._meta.db_table).replace("%", "%%")
    at_places, place = places_of(table)
    found = {
        vars(row)["rotator_place"]: row
        for row in rows.extra(  # noqa: S610 - the table's quoted name
            select={"rotator_place": place},
            where=[at_places],
            params=[places[0].leaf, [each.ctid for each in places]],
        )
    }
    return {each: found[each.ctid] for each in places if each.ctid in found}


def _value(key: Key, fields: Sequence[AnyField]) -> object:
    parts = json.loads(key, parse_float=Decimal)
    values = tuple(field.to_python(part) for field, part in zip(fields, parts, strict=True))
    return values[0] if len(values) == 1 else values
