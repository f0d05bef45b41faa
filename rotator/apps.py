"""The Django app: its configuration, its system checks and the ``ROTATOR`` setting."""

from collections.abc import Mapping
from typing import Final

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004 - Django's own name for it
from django.db import connections

from rotator.exceptions import OptionError, TargetError

KEYS: Final = ("DEFAULT_TARGET", "CELERY_APP")


def read_setting() -> Mapping[str, str]:
    """Return the setting; empty where the project has none.

    Raises:
        OptionError: It is no dictionary of texts, or has a key that there is not.
    """
    setting: object = getattr(settings, "ROTATOR", {})
    if not isinstance(setting, dict):
        raise OptionError("The setting ROTATOR is no dictionary.")
    unknown = sorted(str(key) for key in setting if key not in KEYS)
    if unknown:
        raise OptionError(
            f"The setting ROTATOR has no key {', '.join(unknown)}: there are {' and '.join(KEYS)}."
        )
    for key, value in setting.items():
        if not isinstance(value, str):
            raise OptionError(f'ROTATOR["{key}"] is no text.')
    return setting


def check_setting(**_: object) -> list[CheckMessage]:
    """Check ``settings.ROTATOR``."""
    try:
        setting = read_setting()
    except OptionError as error:
        return [Error(str(error), id="rotator.E001")]
    return _check_default_target(setting.get("DEFAULT_TARGET", ""))


def _check_default_target(target: str) -> list[CheckMessage]:
    # Only where it is needed: it brings the driver with it.
    from rotator.fields.target import find_fields  # noqa: PLC0415 - as said above

    try:
        if target:
            find_fields(target.split())
    except TargetError as error:
        return [Error(f'ROTATOR["DEFAULT_TARGET"]: {error}', id="rotator.E002")]
    return []


def check_databases(**_: object) -> list[CheckMessage]:
    """Check that there is a database that can be rotated."""
    if any(connection.vendor == "postgresql" for connection in connections.all()):
        return []
    return [
        Warning(
            "None of the project's databases is PostgreSQL, the only one that rotations work on.",
            id="rotator.W001",
        )
    ]


class RotatorConfig(AppConfig):
    """The reusable app that rotates leaked columns."""

    name = "rotator"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks."""
        register(check_setting)
        register(check_databases, Tags.compatibility)
