"""Fields of the kinds that projects write themselves."""

import hashlib
from typing import TYPE_CHECKING, Any

from django.db import models

if TYPE_CHECKING:
    _CharField = models.CharField[Any, Any]
else:
    # Generic for the type checker alone.
    _CharField = models.CharField


class ReversedField(_CharField):
    """Stores a text backwards, as an encrypting field stores something that is not what the model shows."""

    def from_db_value(self, value: str | None, *_: object) -> str | None:
        return None if value is None else value.removeprefix("<")[::-1]

    def get_prep_value(self, value: Any) -> Any:  # noqa: ANN401 - Django's signature
        return None if value is None else f"<{str(value)[::-1]}"


class ChecksumField(_CharField):
    """Stores a checksum of its neighbour."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        return hashlib.sha256(model_instance.__dict__["name"].encode()).hexdigest()


class HashedField(_CharField):
    """Stores the hash of what it is given."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:  # noqa: ANN401, FBT001, ARG002 - Django's
        return hashlib.sha256(str(getattr(model_instance, self.attname)).encode()).hexdigest()
