"""Fields of the kinds that projects write themselves."""

import base64
import hashlib
import os
import secrets
from typing import TYPE_CHECKING, Any

from django.db import models
from django.db.models import Func, Value
from django.utils import timezone

if TYPE_CHECKING:
    _BinaryField = models.BinaryField[Any, Any]
    _CharField = models.CharField[Any, Any]
    _DateTimeField = models.DateTimeField[Any, Any]
    _UUIDField = models.UUIDField[Any, Any]
else:
    # Generic for the type checker alone.
    _BinaryField = models.BinaryField
    _CharField = models.CharField
    _DateTimeField = models.DateTimeField
    _UUIDField = models.UUIDField


class ReversedField(_CharField):
    """Stores a text backwards, as an encrypting field stores something that is not what the model shows."""

    def from_db_value(self, value: str | None, *_: object) -> str | None:
        return None if value is None else value.removeprefix("<")[::-1]

    def get_prep_value(self, value: Any) -> Any:  # noqa: ANN401 - Django's signature
        return None if value is None else f"<{str(value)[::-1]}"


class HexUuidField(_UUIDField):
    """Stores a UUID as 32 digits, as projects do that came from another database."""

    def db_type(self, connection: Any) -> str:  # noqa: ANN401, ARG002 - Django's signature
        return "char(32)"

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:  # noqa: ANN401, ARG002, FBT001, FBT002 - Django's signature
        return None if value is None else self.to_python(value).hex


class EncryptedField(_BinaryField):
    """Is encrypted by the server, while it is written."""

    def get_placeholder(self, value: Any, compiler: Any, connection: Any) -> str:  # noqa: ANN401, ARG002 - Django's signature
        return "sha256(%s)"


class ChecksumField(_CharField):
    """Stores a checksum of its neighbour."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        return hashlib.sha256(model_instance.__dict__["name"].encode()).hexdigest()


class HashedField(_CharField):
    """Stores the hash of what it is given."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        return hashlib.sha256(str(getattr(model_instance, self.attname)).encode()).hexdigest()


class NewlyEncryptedField(_BinaryField):
    """Is encrypted by the server, by the method that Django 6.1 calls."""

    def get_placeholder_sql(self, value: Any, compiler: Any, connection: Any) -> Any:  # noqa: ANN401, ARG002 - Django's signature
        return "sha256(%s)", (value,)


class PreparedAsSqlField(_CharField):
    """Is changed by the server, through an expression in the place of the value."""

    def get_db_prep_save(self, value: Any, connection: Any) -> Any:  # noqa: ANN401, ARG002 - Django's signature
        return Func(Value(value), function="md5")


class SavedAsSqlField(_CharField):
    """The same, when the row is saved."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        return Func(Value(getattr(model_instance, self.attname)), function="md5")


class RandomlyEncryptedField(_CharField):
    """Stores the same value differently each time."""

    def from_db_value(self, value: str | None, *_: object) -> str | None:
        return None if value is None else base64.b64decode(value[8:]).decode()

    def get_prep_value(self, value: Any) -> Any:  # noqa: ANN401 - Django's signature
        return None if value is None else os.urandom(4).hex() + base64.b64encode(str(value).encode()).decode()


class ModifiedField(_DateTimeField):
    """Holds the time of the last save, as django-model-utils has it."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        now = timezone.now()
        setattr(model_instance, self.attname, now)
        return now


class TagField(_CharField):
    """Holds another random text after each save."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        return secrets.token_hex(8)


class OnceField(_CharField):
    """Gets a random text with the first save, and keeps it."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        value = getattr(model_instance, self.attname) or secrets.token_hex(8)
        setattr(model_instance, self.attname, value)
        return value


class SaltedField(_CharField):
    """Stores a salted hash of the secret next to it."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        salt = secrets.token_hex(4)
        return salt + hashlib.sha256(f"{salt}{model_instance.secret}".encode()).hexdigest()[:32]  # type: ignore[attr-defined]


class _Search:
    """The value of the field next to it, whatever the instance was given."""

    def __init__(self, field: "SearchField") -> None:
        self.field = field

    def __get__(self, instance: Any, owner: Any) -> Any:  # noqa: ANN401 - any model's
        return self if instance is None else instance.__dict__.get("secret")

    def __set__(self, instance: Any, value: Any) -> None:  # noqa: ANN401 - any model's
        pass


class SearchField(_CharField):
    """Makes an encrypted neighbour searchable: derives its value by a descriptor, and hashes it for SQL."""

    def contribute_to_class(self, cls: Any, name: str, **options: Any) -> None:  # type: ignore[override] # noqa: ANN401
        super().contribute_to_class(cls, name, **options)
        setattr(cls, name, _Search(self))

    def get_prep_value(self, value: Any) -> Any:  # noqa: ANN401 - Django's signature
        return None if value is None else hashlib.sha256(str(value).encode()).hexdigest()


class OwnDefaultField(_CharField):
    """Makes its default by a method, without the argument for it."""

    def get_default(self) -> Any:  # noqa: ANN401 - Django's signature
        return secrets.token_hex(16)


class PrefixedKeyField(_CharField):
    """Has a prefix in Python that the database and the JSON text of a key do not have."""

    def from_db_value(self, value: str, *_: object) -> str:
        return f"ord_{value}"

    def get_prep_value(self, value: Any) -> Any:  # noqa: ANN401 - Django's signature
        return None if value is None else str(value).removeprefix("ord_")
