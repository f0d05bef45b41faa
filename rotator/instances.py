"""The model's instances of rows that the rotation knows by their keys."""

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from django.db.models import Field, Model, QuerySet

from rotator.keys import Key


def key_fields(model: type[Model]) -> "list[Field[Any, Any]]":
    """Return the fields of a model's primary key: several where it is composite (Django 5.2)."""
    key = model._meta.pk
    return list(getattr(model._meta, "pk_fields", [key]))


def fetch_instances(model: type[Model], keys: Sequence[Key], database: str) -> Mapping[Key, Model]:
    """Read the rows with these keys that there still are."""
    fields = key_fields(model)
    values = {_value(key, fields): key for key in keys}
    rows: QuerySet[Model] = QuerySet(model, using=database)
    found = {row.pk: row for row in rows.filter(pk__in=list(values))}
    return {key: found[value] for value, key in values.items() if value in found}


def _value(key: Key, fields: "Sequence[Field[Any, Any]]") -> object:
    parts = json.loads(key, parse_float=Decimal)
    values = tuple(field.to_python(part) for field, part in zip(fields, parts, strict=True))
    return values[0] if len(values) == 1 else values
