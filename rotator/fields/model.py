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


def fetch_instances(model: type[Model], keys: Sequence[Key], database: str) -> Mapping[Key, Model]:
    """Return the rows with these keys, except those that were deleted.

    The server compares the keys: a field may have another Python value for a key than for its JSON text.
    """
    connection = connections[database]
    table = _quoted(model._meta.db_table, database)
    columns = [f"{table}.{_quoted(str(field.column), database)}" for field in key_fields(model)]
    types = [str(field.db_type(connection)) for field in key_fields(model)]
    are_wanted, key_text, texts = keys_of(columns, types)
    with connection.cursor() as cursor:
        cursor.execute(texts, [list(keys)])
        keys_by_text = {text: Key(key) for text, key in cursor.fetchall()}
    found = _fetch(model, database, key_text, are_wanted, [list(keys)])
    return {keys_by_text[text]: row for text, row in found.items()}


def fetch_instances_at(model: type[Model], places: Sequence[Place], database: str) -> Mapping[Place, Model]:
    """Return the rows at these places, all of one leaf, except those that were deleted or moved."""
    at_places, place = places_of(_quoted(model._meta.db_table, database))
    parameters = [places[0].leaf, [each.ctid for each in places]]
    found = _fetch(model, database, place, at_places, parameters)
    return {each: found[each.ctid] for each in places if each.ctid in found}


def _quoted(name: str, database: str) -> str:
    # Django looks for placeholders in these texts.
    return connections[database].ops.quote_name(name).replace("%", "%%")


def _fetch(
    model: type[Model], database: str, name: str, condition: str, parameters: list[object]
) -> dict[str, Model]:
    """Return the rows of a condition by their name, which is an expression for the server."""
    attribute = "rotator_name"
    while hasattr(model, attribute):
        attribute += "_"
    rows: QuerySet[Model] = QuerySet(model, using=database)
    found = rows.extra(  # noqa: S610 - quoted names and types
        select={attribute: name}, where=[condition], params=parameters
    )
    return {vars(row)[attribute]: row for row in found}
