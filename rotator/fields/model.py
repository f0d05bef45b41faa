"""A model's key, the names of its fields, and its instances by key or by place."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from django.db import connections
from django.db.models import Field, Model, QuerySet

from rotator.postgres.values import Place, keys_of, places_of
from rotator.ranges import Key

AnyField: TypeAlias = "Field[Any, Any]"


def field_label(field: AnyField) -> str:
    """Return a field's name as users write it: ``app.Model.field``."""
    return f"{field.model._meta.label}.{field.name}"


def key_fields(model: type[Model]) -> list[AnyField]:
    """Return the fields of a model's primary key; several if it is composite (Django 5.2)."""
    return list(model._meta.pk_fields)


def _own_name(model: type[Model], name: str) -> str:
    """Return the name of an attribute that no instance of the model has."""
    while hasattr(model, name):
        name += "_"
    return name


def fetch_instances(model: type[Model], keys: Sequence[Key], database: str) -> Mapping[Key, Model]:
    """Return the rows with these keys, except those that were deleted.

    The server compares the keys: a field may have another Python value for a key than for its JSON text.
    """
    connection = connections[database]
    # Django looks for placeholders in these texts.
    names = [(model._meta.db_table, str(field.column)) for field in key_fields(model)]
    columns = [".".join(map(connection.ops.quote_name, name)).replace("%", "%%") for name in names]
    types = [str(field.db_type(connection)) for field in key_fields(model)]
    are_wanted, key_text, texts = keys_of(columns, types)
    with connection.cursor() as cursor:
        cursor.execute(texts, [list(keys)])
        keys_by_text = {text: Key(key) for text, key in cursor.fetchall()}
    rows: QuerySet[Model] = QuerySet(model, using=database)
    name = _own_name(model, "rotator_key")
    found = rows.extra(  # noqa: S610 - quoted names and types
        select={name: key_text}, where=[are_wanted], params=[list(keys)]
    )
    return {keys_by_text[vars(row)[name]]: row for row in found}


def fetch_instances_at(model: type[Model], places: Sequence[Place], database: str) -> Mapping[Place, Model]:
    """Return the rows at these places, all of one leaf, except those that were deleted or moved."""
    rows: QuerySet[Model] = QuerySet(model, using=database)
    # Django looks for placeholders in these texts.
    table = connections[database].ops.quote_name(model._meta.db_table).replace("%", "%%")
    at_places, place = places_of(table)
    name = _own_name(model, "rotator_place")
    found = {
        vars(row)[name]: row
        for row in rows.extra(  # noqa: S610 - the table's quoted name
            select={name: place},
            where=[at_places],
            params=[places[0].leaf, [each.ctid for each in places]],
        )
    }
    return {each: found[each.ctid] for each in places if each.ctid in found}
