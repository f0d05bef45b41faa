"""Advice on the values of a field, from its name, its type, its application and its present values."""

import inspect
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from string import hexdigits
from typing import Final

from django.contrib.auth.base_user import AbstractBaseUser
from django.core.exceptions import ValidationError
from django.db.models import BinaryField, CharField, IntegerField, Model, QuerySet, TextField, UUIDField

from rotator.fields.connections import reading_rows
from rotator.fields.model import AnyField

HASH_NAME: Final = re.compile(
    r"(hash(es)?|digest|checksum|fingerprint|hmac)(_|$)|(^|_)(hashed|(md5|sha\d+)(_|$))", re.IGNORECASE
)
# Claims of signed tokens that identify the token or the key of its signature.
TOKEN_CLAIM_NAME: Final = re.compile(r"(^|_)(jti|kid|sid)(_|$)")
PRIVATE_KEY_NAME: Final = re.compile(r"(^|_)private_?key(_|$)")
_MAKING: Final = re.compile(r"^_?(generate|make|create|new|random|get_new|get_random)_(?P<made>\w+)$")
_CREATING: Final = ("create", "get_or_create", "update_or_create", "bulk_create", "bulk_update")
# A function that calls one of these does more than make a value.
_WRITING: Final = frozenset(prefix + name for name in (*_CREATING, "save", "delete") for prefix in ("", "a"))
# A hash has an update(), too.
_QUERYING: Final = frozenset({"objects", "filter", "exclude", "_default_manager", "_base_manager"})
_HEX_OF_32_BYTES: Final = 64
_BYTES: Final = 32
_SAMPLED_VALUES: Final = 20
_SAMPLED_ROWS: Final = 1000
_ALPHABETS: Final = {
    "digits": re.compile(r"[0-9]+"),
    "hexadecimal digits": re.compile(r"[0-9a-f]+"),
    "upper-case hexadecimal digits": re.compile(r"[0-9A-F]+"),
    "base32 digits": re.compile(r"[A-Z2-7]+"),
    "upper-case letters and digits": re.compile(r"[0-9A-Z]+"),
    "lower-case letters and digits": re.compile(r"[0-9a-z]+"),
    "letters and digits": re.compile(r"[0-9A-Za-z]+"),
    "letters, digits, hyphens and underscores": re.compile(r"[0-9A-Za-z_-]+"),
}


def name_warnings(fields: Sequence[AnyField]) -> tuple[str, ...]:
    """Return the warnings that follow from the names of the rotated fields, one sentence each."""
    warnings = [
        f"signed tokens refer to {field.name}: tokens that are revoked by it become valid again"
        for field in fields
        if TOKEN_CLAIM_NAME.search(field.name)
    ]
    # Several fields may be a secret and its hash, or a pair of keys, which are made together.
    if len(fields) == 1:
        name = fields[0].name
        if PRIVATE_KEY_NAME.search(name):
            warnings.append(f"{name} seems to hold private keys: their public keys stay as they are")
        if _is_password(fields[0]):
            warnings.append(f"{name} holds hashes of passwords: new values are stored without hashing")
        elif HASH_NAME.search(name):
            warnings.append(
                f"the name {name} suggests that it holds a hash: new values are stored without hashing"
            )
    return tuple(warnings)


def _is_password(field: AnyField) -> bool:
    """Return whether a field holds the hashes of passwords of Django's users."""
    return field.name == "password" and issubclass(field.model, AbstractBaseUser)


def advice(field: AnyField, database: str) -> tuple[str, str | None]:
    """Return what to do about a field without a default, and the path of a callable whose values fit it.

    The path is empty where the user has to write one, and None where plain new values would be of no use.
    """
    if _is_password(field):
        return (
            "It holds hashes of passwords, and no user could log in with a plain text in it. To make users "
            "set new passwords, name a callable with --generator that takes nothing and returns "
            "django.contrib.auth.hashers.make_password(None)."
        ), None
    if TOKEN_CLAIM_NAME.search(field.name):
        return (
            "Signed tokens refer to it. With new values, tokens that are revoked by it would become valid "
            "again. Rotate the key of the signature instead."
        ), None
    if PRIVATE_KEY_NAME.search(field.name):
        return (
            "Its name suggests that it holds private keys. Name the field of the public key as a target too, "
            "and a --generator that returns a mapping of the fields' names to a new pair of keys."
        ), None
    if HASH_NAME.search(field.name):
        return (
            "Its name suggests that it holds a hash, and a plain value in it matches no secret. Name the "
            "field of the secret as a target too, if there is one, and a --generator that returns a mapping "
            "of the fields' names to the values to store."
        ), None
    for path in _application_functions(field):
        name = path.rpartition(".")[2]
        return f"The application's {name} may make such values: --generator {path}.", path
    form = _read_form(field, database)
    standard = _standard_generator(field, form)
    example = f", e.g. --generator {standard}." if standard else _example(field, form)
    return f"Name a callable that makes values with --generator{example}", standard


# --- The form of the present values --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Form:
    """The form of a sample of a field's values, without any value.

    Attributes:
        length: The number of characters of each value; None where they differ.
        alphabet: The name of the smallest alphabet of all values; empty where there is none.
        is_grouped: Whether all values have hyphens at the same places.
    """

    length: int | None
    alphabet: str
    has_prefix: bool
    is_grouped: bool

    @property
    def fits_hex(self) -> bool:
        """Whether the application can be expected to accept hexadecimal digits."""
        letters = _ALPHABETS.get(self.alphabet)
        has_hex = letters is not None and letters.fullmatch(hexdigits.lower()) is not None
        return has_hex and not (self.has_prefix or self.is_grouped)

    def __str__(self) -> str:
        letters = self.alphabet or ("characters" if self.length else "")
        count = letters if self.length is None else f"{self.length} {letters}"
        parts = [count, "in groups" if self.is_grouped else ""]
        return ", ".join(filter(None, [*parts, "the same first characters" if self.has_prefix else ""]))


def _read_form(field: AnyField, database: str) -> _Form | None:
    """Return the form of the first values that are found; None where there are none."""
    rows: QuerySet[Model] = QuerySet(field.model, using=database)
    values: set[str] = set()
    with suppress(Exception), reading_rows(database):
        found = rows.order_by().values_list(field.name, flat=True)[:_SAMPLED_ROWS]
        # Many rows can have no value.
        given = (value for value in found.iterator() if isinstance(value, str) and value)
        values = set(islice(given, _SAMPLED_VALUES))
    if not values:
        return None
    lengths = {len(value) for value in values}
    hyphens = {tuple(found.start() for found in re.finditer("-", value)) for value in values}
    return _Form(
        length=lengths.pop() if len(lengths) == 1 else None,
        alphabet=next(
            (name for name, letters in _ALPHABETS.items() if all(map(letters.fullmatch, values))), ""
        ),
        # One character can be the same by chance.
        has_prefix=len(values) > 1 and len({value[:2] for value in values}) == 1,
        is_grouped=len(values) > 1 and len(hyphens) == 1 and hyphens != {()},
    )


# --- The application's functions -----------------------------------------------------------------------


def _application_functions(field: AnyField) -> Iterator[str]:
    """Yield the paths of the application's functions that seem to make values of this field."""
    model = field.model
    module = import_module(model.__module__)
    path = f"{model.__module__}.{model.__qualname__}"
    methods = _methods(model)
    for name, method in methods.items():
        if isinstance(method, staticmethod | classmethod) and _makes(getattr(model, name), name, field):
            yield f"{path}.{name}"
    for name, function in vars(module).items():
        if inspect.isfunction(function) and _makes(function, name, field):
            yield f"{module.__name__}.{name}"
    for manager in model._meta.managers:
        for name, method in _methods(type(manager)).items():
            if inspect.isfunction(method) and _makes(method, name, field, None):
                yield f"{path}.{manager.name}.{name}"
    # These get the row, which is slower.
    for name, method in methods.items():
        if inspect.isfunction(method) and _makes(method, name, field, None):
            yield f"{path}.{name}"


def _methods(owner: type) -> dict[str, object]:
    """Return the attributes of a class that the application has defined."""
    kinds = [
        kind for kind in owner.__mro__ if kind is not object and not kind.__module__.startswith("django.")
    ]
    return {name: attribute for kind in reversed(kinds) for name, attribute in vars(kind).items()}


def _makes(function: Callable[..., object], name: str, field: AnyField, *arguments: object) -> bool:
    found = _MAKING.match(name)
    if found is None or not (found["made"] in field.name or field.name in found["made"]):
        return False
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):
        return False
    code = getattr(inspect.unwrap(function), "__code__", None)
    names = frozenset() if code is None else frozenset(code.co_names)
    updates = not names.isdisjoint(("update", "aupdate")) and not names.isdisjoint(_QUERYING)
    return names.isdisjoint(_WRITING) and not updates and not inspect.iscoroutinefunction(function)


# --- Standard functions --------------------------------------------------------------------------------


def _standard_generator(field: AnyField, form: _Form | None) -> str:
    """Return the path of a function whose values fit the field; empty where there is none."""
    if isinstance(field, UUIDField):
        return "uuid.uuid4"
    if isinstance(field, BinaryField) and (field.max_length is None or field.max_length >= _BYTES):
        return "secrets.token_bytes"
    fits_hex = isinstance(field, CharField | TextField) and _digits(field, form) == _HEX_OF_32_BYTES
    return "secrets.token_hex" if fits_hex and _accepts(field, _HEX_OF_32_BYTES) else ""


def _example(field: AnyField, form: _Form | None) -> str:
    """Return the end of the advice where no standard function fits: what the user's callable returns."""
    match field:
        case BinaryField():
            return f", e.g. one that returns secrets.token_bytes({field.max_length})."
        case IntegerField():
            return ", e.g. one that returns secrets.randbelow(2**31), or less if the field has limits."
        case CharField() | TextField():
            return _text_example(field, form)
        case _:
            return f", one that returns values for a {type(field).__name__}."


def _digits(field: AnyField, form: _Form | None) -> int:
    """Return how many hexadecimal digits fit a field; 0 where they do not fit its present values."""
    if form is not None and not form.fits_hex:
        return 0
    limits = [_HEX_OF_32_BYTES, field.max_length, None if form is None else form.length]
    length: int = min(limit for limit in limits if limit is not None)
    return length - length % 2


def _text_example(field: AnyField, form: _Form | None) -> str:
    digits = _digits(field, form)
    limit = "" if field.max_length is None else f" and at most {field.max_length} characters"
    if form is not None and not form.fits_hex:
        about = f" ({form})" if str(form) else ""
        return f", one whose values have the form of the present ones{about}{limit}."
    if not _accepts(field, digits):
        return f", one whose values have the form that the field's validators accept{limit}."
    if digits == 0:
        return f", one that returns strings of at most {field.max_length} characters."
    most = "" if field.max_length is None else f"at most {field.max_length} characters, e.g. "
    return f", one that returns {most}secrets.token_hex({digits // 2})."


def _accepts(field: AnyField, digits: int) -> bool:
    """Return whether a field's validators accept this number of hexadecimal digits."""
    # An application that looks values up in lower case still finds hexadecimal digits.
    try:
        field.run_validators(secrets.token_hex(digits // 2))
    except ValidationError:
        return False
    except Exception:  # noqa: BLE001, S110 - a validator of the project that needs more than a value
        pass
    return True
