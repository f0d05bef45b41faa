"""Fields of the kinds that projects write themselves."""

import hashlib
from typing import TYPE_CHECKING, Any

from django.db import models

if TYPE_CHECKING:
    _BinaryField = models.BinaryField[Any, Any]
    _CharField = models.CharField[Any, Any]
    _UUIDField = models.UUIDField[Any, Any]
else:
    # Generic for the type checker alone.
    _BinaryField = models.BinaryField
    _CharField = models.CharField
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
