"""What can make new values for a field: a callable by its path, the field's default, the server."""

import inspect
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Final, TypeAlias

from django.core.exceptions import ValidationError
from django.db import connections
from django.db.models import BinaryField, CharField, Field, IntegerField, Model, TextField, UUIDField, Value
from django.db.models.fields import NOT_PROVIDED
from django.db.models.sql import Query
from django.utils.module_loading import import_string

from rotator.errors import TargetError
from rotator.project_connections import unlogged
from rotator.saving import comparable, overrides

AnyField: TypeAlias = "Field[Any, Any]"

SERVER_VALUES: Final = 500
"""The number of values that the server is asked for at once."""

_HASH: Final = re.compile(r"(^|_)(hash|hashed|digest|checksum|fingerprint|hmac|md5|sha\d+)(_|$)")
# What signed tokens carry to name themselves or the key of their signature.
_REFERRED: Final = re.compile(r"(^|_)(jti|kid|sid)(_|$)")
_MAKING: Final = re.compile(r"^_?(generate|make|create|new|random|get_new|get_random)_(?P<made>\w+)$")
_HEX_OF_32_BYTES: Final = 64
_BYTES: Final = 32


def imported(path: str) -> Callable[..., object]:
    """Import a callable: a function of a module, or a method of a class.

    Raises:
        TargetError: It cannot be imported, or is no plain callable.
    """
    try:
        found = _found(path)
    except Exception as error:
        raise TargetError(
            f"The generator {path} cannot be imported ({type(error).__name__}): write it as "
            "package.module.name, or package.module.Class.name for a method."
        ) from error
    if not callable(found):
        raise TargetError(f"The generator {path} cannot be called: name a function.")
    if inspect.iscoroutinefunction(found):
        raise TargetError(f"The generator {path} is a coroutine: name a plain function.")
    return found


def _found(path: str) -> object:
    try:
        return import_string(path)
    except ImportError:
        # The path of a method is that of its class, which is no module.
        owner, _, name = path.rpartition(".")
        if owner.count(".") < 1:
            raise
        return getattr(_class(owner), name)


def _class(path: str) -> object:
    module, _, name = path.rpartition(".")
    found: object = getattr(import_module(module), name)
    if not isinstance(found, type):
        raise TypeError(f"{path} is no class")
    return found


def default_maker(field: AnyField, database: str) -> Callable[[], object]:
    """Return what makes a new value of this field for each row.

    Args:
        field: The field.
        database: Django's alias of the database.

    Raises:
        TargetError: Nothing does; the text advises what could.
    """
    if overrides(field, "get_default") and _makes_new_values(field.get_default):
        return field.get_default
    default: object = field.default
    if default is not NOT_PROVIDED and callable(default):
        return default
    by_server = _ByServer(field, database)
    if by_server.is_expression and _makes_new_values(by_server):
        return by_server
    raise TargetError(
        f"{_name(field)} has no default that makes a new value for each row. {_advice(field, field.model)}"
    )


def _makes_new_values(make: Callable[[], object]) -> bool:
    try:
        return comparable(make()) != comparable(make())
    except Exception:  # noqa: BLE001 - whatever the project's code raises
        return False


class _ByServer:
    """Has the server evaluate a field's ``db_default`` for each row."""

    def __init__(self, field: AnyField, database: str) -> None:
        self._field = field
        self._database = database
        self._values = deque[object]()

    @property
    def is_expression(self) -> bool:
        """Whether there is one that is more than a constant."""
        default = getattr(self._field, "db_default", NOT_PROVIDED)
        return hasattr(default, "resolve_expression") and not isinstance(default, Value)

    def __call__(self) -> object:
        if not self._values:
            self._values.extend(self._fetched())
        return self._values.popleft()

    def _fetched(self) -> list[object]:
        connection = connections[self._database]
        compiler = Query(self._field.model).get_compiler(connection=connection)
        text, parameters = compiler.compile(getattr(self._field, "db_default"))  # noqa: B009 - no stub has it
        with unlogged(self._database), connection.cursor() as cursor:
            cursor.execute(
                f"SELECT {text} FROM generate_series(1, %s)",  # noqa: S608 - Django's own SQL
                [*parameters, SERVER_VALUES],
            )
            return [value for (value,) in cursor.fetchall()]


def name_warnings(fields: list[AnyField]) -> tuple[str, ...]:
    """Return what the names of the rotated fields warn of, one sentence each."""
    warnings = [
        f"signed tokens refer to {field.name}: tokens that are revoked by it become valid again"
        for field in fields
        if _REFERRED.search(field.name)
    ]
    # With the field of the secret next to it, they are made together.
    if len(fields) == 1 and _HASH.search(fields[0].name):
        warnings.append(
            f"the name {fields[0].name} says that it holds a hash: values are stored as they are made"
        )
    return tuple(warnings)


def _advice(field: AnyField, model: type[Model]) -> str:
    if _REFERRED.search(field.name):
        return (
            "Signed tokens refer to it: with new values, tokens that are revoked by it would become valid "
            "again. Rotate the key of the signature instead."
        )
    if _HASH.search(field.name):
        return (
            "Its name says that it holds a hash, and a plain value in it matches no secret. Name the field "
            "of the secret as a target too, if there is one, and a --generator that returns a mapping of the "
            "fields' names to what is stored."
        )
    for path in _makers(field, model):
        return f"{path.rpartition('.')[2]} of the application may be what makes them: --generator {path}."
    return f"Name a callable that does with --generator{_example(field)}"


def _makers(field: AnyField, model: type[Model]) -> Iterator[str]:
    """The paths of the application's functions that seem to make values of this field."""
    module = import_module(model.__module__)
    for kind in model.__mro__:
        if kind.__module__.startswith("django."):
            continue
        for name, method in vars(kind).items():
            if isinstance(method, staticmethod | classmethod) and _makes(getattr(model, name), name, field):
                yield f"{model.__module__}.{model.__qualname__}.{name}"
    for name, function in vars(module).items():
        if inspect.isfunction(function) and _makes(function, name, field):
            yield f"{module.__name__}.{name}"


def _makes(function: Callable[..., object], name: str, field: AnyField) -> bool:
    found = _MAKING.match(name)
    if found is None or not (found["made"] in field.name or field.name in found["made"]):
        return False
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        return False
    return not inspect.iscoroutinefunction(function)


def _example(field: AnyField) -> str:
    """Return the end of the advice: a callable whose values fit the field."""
    length = field.max_length
    if isinstance(field, UUIDField):
        return ", e.g. --generator uuid.uuid4."
    if isinstance(field, BinaryField):
        if length is None or length >= _BYTES:
            return ", e.g. --generator secrets.token_bytes."
        return f", one that returns secrets.token_bytes({length})."
    if isinstance(field, IntegerField):
        return ", one that returns secrets.randbelow(2**31), or less where the field has limits."
    if isinstance(field, CharField | TextField):
        return _text_example(field, length)
    return f", one that returns values for a {type(field).__name__}."


def _text_example(field: AnyField, length: int | None) -> str:
    # Hexadecimal digits stay the same where the application turns what it looks up into small letters.
    is_long = length is None or length >= _HEX_OF_32_BYTES
    digits = _HEX_OF_32_BYTES if length is None or is_long else length - length % 2
    try:
        field.run_validators(secrets.token_hex(digits // 2))
    except ValidationError:
        limit = "" if length is None else f" and at most {length} characters"
        return f", one whose values have the form that the field's validators accept{limit}."
    except Exception:  # noqa: BLE001, S110 - a validator of the project that needs more than a value
        pass
    if is_long:
        return ", e.g. --generator secrets.token_hex."
    if digits == 0:
        return f", one that returns texts of at most {length} characters."
    return f", one that returns at most {length} characters, e.g. secrets.token_hex({digits // 2})."


def _name(field: AnyField) -> str:
    return f"{field.model._meta.label}.{field.name}"
