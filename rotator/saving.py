"""What saving a model through Django does to a field, and an update by the server does not."""

import uuid
from collections.abc import Sequence
from copy import copy
from typing import Any, Final, TypeAlias

from django.db.models import BinaryField, Field, IntegerField, Model, UUIDField

AnyField: TypeAlias = "Field[Any, Any]"

# Two values that differ, for whatever derives something from them.
_EXAMPLES: Final[tuple[tuple[type[AnyField], tuple[object, object]], ...]] = (
    (UUIDField, (uuid.UUID(int=1), uuid.UUID(int=2))),
    (IntegerField, (1, 2)),
    (BinaryField, (b"one", b"two")),
)
_TEXTS: Final = ("one", "two")

# The first is Django's name for it up to 6.0, the second from 6.1 on.
_SQL_HOOKS: Final = ("get_placeholder", "get_placeholder_sql")


def sql_hook(field: AnyField, model: type[Model]) -> str:
    """Return the name of the method by which a field changes its value in SQL; empty where it has none."""
    for name in _SQL_HOOKS:
        hook = getattr(field, name, None)
        # Those of Django's own binary columns only add the type.
        if hook is not None and getattr(hook, "__func__", hook) is not getattr(BinaryField, name, None):
            return name
    if _overrides(field, "pre_save"):
        try:
            saved = field.pre_save(model(), False)  # noqa: FBT003 - Django's signature
        except Exception:  # noqa: BLE001 - whatever the project's code raises
            return ""
        return "pre_save" if is_expression(saved) else ""
    return ""


def is_expression(value: object) -> bool:
    """Whether Django would write SQL in the place of this value."""
    return hasattr(value, "resolve_expression") or hasattr(value, "as_sql")


def transforms(field: AnyField) -> bool:
    """Whether saving may write something else to this field than what it was given, a hash, say."""
    # Django's own set the time, or commit a file.
    return _overrides(field, "pre_save")


def derives(field: AnyField, fields: Sequence[AnyField], model: type[Model]) -> bool:
    """Whether saving may derive this field's value from those of others, a checksum, say.

    Only trying can tell: it does where it makes something else of other values, and may where it makes
    something else each time, or cannot be tried.
    """
    if not transforms(field):
        return False
    try:
        blank = model()
        one, same, other = (_saved(field, fields, blank, example) for example in (0, 0, 1))
    except Exception:  # noqa: BLE001 - whatever the project's code raises
        return True
    return not one == same == other


def _saved(field: AnyField, fields: Sequence[AnyField], blank: Model, example: int) -> object:
    # Of the same, since defaults may be random.
    instance = copy(blank)
    for other in fields:
        examples = next((pair for kind, pair in _EXAMPLES if isinstance(other, kind)), _TEXTS)
        setattr(instance, other.attname, examples[example])
    return field.pre_save(instance, False)  # noqa: FBT003 - Django's signature


def _overrides(field: AnyField, name: str) -> bool:
    """Whether a class that is not Django's own defines this method of a field."""
    return any(
        name in vars(kind)
        for kind in type(field).__mro__
        if not kind.__module__.startswith("django.db.models.")
    )
