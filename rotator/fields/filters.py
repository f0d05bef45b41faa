"""The SQL condition on one table's rows that Django lookups from the command line mean."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from django.conf import settings
from django.core.exceptions import EmptyResultSet, FieldDoesNotExist, FullResultSet, ValidationError
from django.db import InterfaceError, OperationalError
from django.db.models import BinaryField, BooleanField, DateTimeField, Field, Model, Q, QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.utils import timezone

from rotator.exceptions import OptionError, RotatorError
from rotator.fields.model import AnyField, key_fields
from rotator.options import Selection
from rotator.postgres.table import ROW, Condition

_ENDS_OF_RANGE: Final = 2
_OF_LISTS: Final = ("in", "range", "has_keys", "has_any_keys")
# Others make a text of the value.
_OF_BYTES: Final = ("exact", "gt", "gte", "lt", "lte")
_TRUTHS: Final = {"true": True, "1": True, "false": False, "0": False}


def row_condition(
    model: type[Model], selection: Selection, *, rotated: Sequence[str], database: str
) -> Condition | None:
    """Return the condition that rows match all filters and no exclude; None if it is always true.

    Raises:
        OptionError: A lookup is not valid, or it needs another table.
    """
    rows: QuerySet[Model] = QuerySet(model, using=database)
    condition: Condition | None = None
    for option, texts in (("--filter", selection.filters), ("--exclude", selection.excludes)):
        for text in texts:
            lookup = Q(**_lookup(model, option, text, rotated))
            try:
                rows = rows.filter(lookup) if option == "--filter" else rows.exclude(lookup)
                # All of them, so that the latest one is named if a value does not fit.
                condition = _compiled(rows, database)
            except (RotatorError, OperationalError, InterfaceError):
                raise
            # Lookups, and fields of the project, raise any error for a value that they cannot compare.
            except Exception as error:  # noqa: BLE001
                reason = " ".join(error.messages) if isinstance(error, ValidationError) else str(error)
                reason = reason or type(error).__name__
                sentence = f"{option} {text} is not a valid filter of this model: {reason.rstrip('.')}."
                raise OptionError(_one_line(sentence)) from None
    return condition


def _compiled(rows: QuerySet[Model], database: str) -> Condition | None:
    query = rows.query
    if sum(1 for uses in query.alias_refcount.values() if uses) > 1:
        raise OptionError("A filter needs another table. Use only columns of the rotated table.")
    try:
        alias = query.get_initial_alias()
        compiler = query.get_compiler(using=database)
        text, parameters = compiler.compile(query.where.relabeled_clone({alias: ROW}))
    except FullResultSet:
        return None
    except EmptyResultSet:
        raise OptionError("No row can match these filters. Change them.") from None
    return Condition(text, tuple(parameters))


def _lookup(model: type[Model], option: str, text: str, rotated: Sequence[str]) -> dict[str, Any]:
    if "\0" in text:
        raise OptionError(f"{option}: a filter with a zero byte matches no row.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OptionError(f"{option}: a filter must be valid Unicode.") from None
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise OptionError(
            f"{option} {text} is not a valid filter. Write it as field=value or field__lookup=value."
        )
    first, *rest = name.split(LOOKUP_SEP)
    field = _field(model, option, first)
    if field.is_relation and rest and field.get_lookup(rest[0]) is None:
        raise _other_table(model, option, name)
    if field.name in rotated and rest != ["isnull"]:
        # A resumed run would not match the rows that have changed, and the filter with a secret would be
        # saved.
        raise OptionError(
            f"{option} {name} filters by {field.name}, which is rotated. Use only {field.name}__isnull."
        )
    return {name: _value(field, rest, option, name, value)}


def _field(model: type[Model], option: str, name: str) -> AnyField:
    meta = model._meta
    by_column = {field.attname: field for field in meta.local_concrete_fields}
    if name == "pk" and len(key_fields(model)) > 1:
        names = " and ".join(field.name for field in key_fields(model))
        raise OptionError(f"{option} {name}: the key is composite. Filter by {names} one by one.")
    try:
        found = meta.pk if name == "pk" else by_column.get(name) or meta.get_field(name)
    except FieldDoesNotExist:
        raise OptionError(
            f"{option} {name}: {meta.label} has no such field. Its columns are "
            f"{', '.join(sorted(by_column))}."
        ) from None
    if not isinstance(found, Field) or found.attname not in by_column:
        raise _other_table(model, option, name)
    return found


def _other_table(model: type[Model], option: str, name: str) -> OptionError:
    return OptionError(
        f"{option} {name} needs another table. Use only columns of {model._meta.label} itself."
    )


def _value(field: AnyField, lookups: list[str], option: str, name: str, text: str) -> object:
    last = lookups[-1] if lookups else ""
    if last == "isnull" or (isinstance(field, BooleanField) and not lookups):
        if text.lower() not in _TRUTHS:
            raise OptionError(f"{option} {name} must be true or false, not '{_one_line(text)}'.")
        return _TRUTHS[text.lower()]
    if last in _OF_LISTS:
        parts = text.split(",")
        if last == "range" and len(parts) != _ENDS_OF_RANGE:
            raise OptionError(f"{option} {name} needs the first and the last value. Write it as {name}=1,9.")
        return [_single(field, lookups[:-1], option, name, part) for part in parts]
    return _single(field, lookups, option, name, text)


def _single(field: AnyField, lookups: list[str], option: str, name: str, text: str) -> object:
    if isinstance(field, BinaryField):
        if lookups and lookups[-1] not in _OF_BYTES:
            raise OptionError(
                f"{option} {name}: a binary field has only these lookups: exact, in, isnull, range, "
                f"{', '.join(_OF_BYTES[1:])}."
            )
        try:
            return bytes.fromhex(text.removeprefix("\\x"))
        except ValueError:
            raise OptionError(
                f"{option} {name} must be hexadecimal digits, not '{_one_line(text)}'."
            ) from None
    if not isinstance(field, DateTimeField) or (lookups and field.get_lookup(lookups[0]) is None):
        return text
    try:
        moment = field.to_python(text)
    except ValidationError:
        moment = None
    if not isinstance(moment, datetime):
        raise OptionError(f"{option} {name} is not a valid time. Write it as 2026-11-01T00:00:00Z.")
    if settings.USE_TZ and timezone.is_naive(moment):
        raise OptionError(f"{option} {name} lacks a time zone. Write it as 2026-11-01T00:00:00Z.")
    return moment


def _one_line(text: str) -> str:
    return " ".join(text.split())
