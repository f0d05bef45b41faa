"""The Django app: its configuration, its system checks and the ``ROTATOR`` setting."""

from collections.abc import Mapping
from typing import Any, Final

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004 - Django's name
from django.db import connections

from rotator.exceptions import OptionError, TargetError

KEYS: Final = ("DEFAULT_TARGET", "CELERY_APP", "THROTTLES", "HIDE_KEYS")


def rotator_setting() -> Mapping[str, Any]:
    """Return the setting ``ROTATOR``; empty if the project has none.

    Raises:
        OptionError: It is not a dictionary, has an unknown key, or a value of the wrong type.
    """
    setting: object = getattr(settings, "ROTATOR", {})
    if not isinstance(setting, dict):
        raise OptionError("The setting ROTATOR is not a dictionary.")
    unknown = sorted(str(key) for key in setting if key not in KEYS)
    if unknown:
        raise OptionError(
            f"The setting ROTATOR has an unknown key {', '.join(unknown)}. The keys are "
            f"{', '.join(KEYS[:-1])} and {KEYS[-1]}."
        )
    for key, value in setting.items():
        if key == "THROTTLES":
            if not isinstance(value, list | tuple) or not all(isinstance(path, str) for path in value):
                raise OptionError('ROTATOR["THROTTLES"] is not a list of dotted paths.')
        elif key == "HIDE_KEYS":
            if not isinstance(value, bool):
                raise OptionError('ROTATOR["HIDE_KEYS"] is not True or False.')
        elif not isinstance(value, str):
            raise OptionError(f'ROTATOR["{key}"] is not a string.')
    return setting


def throttle_paths() -> tuple[str, ...]:
    """Return the dotted paths of the setting's throttles; empty if the setting has none.

    Raises:
        OptionError: The setting is not valid.
    """
    return tuple(rotator_setting().get("THROTTLES", ()))


def hides_keys() -> bool:
    """Return whether the page and log records show no keys of rows.

    Raises:
        OptionError: The setting is not valid.
    """
    return bool(rotator_setting().get("HIDE_KEYS", False))


def default_target() -> tuple[str, ...]:
    """Return the target of the setting ``ROTATOR``; empty if the setting has none.

    Raises:
        OptionError: The setting is not valid.
    """
    return tuple(rotator_setting().get("DEFAULT_TARGET", "").split())


def check_setting(**_: object) -> list[CheckMessage]:
    """Check ``settings.ROTATOR``."""
    try:
        labels, paths = default_target(), throttle_paths()
    except OptionError as error:
        return [Error(str(error), id="rotator.E001")]
    if labels:
        from rotator.fields.target import find_fields  # noqa: PLC0415 - imports the driver

        try:
            find_fields(labels)
        except TargetError as error:
            return [Error(f'ROTATOR["DEFAULT_TARGET"]: {error}', id="rotator.E002")]
    if paths:
        from rotator.fields.throttles import check_callable  # noqa: PLC0415 - imports the driver

        try:
            for path in paths:
                check_callable(path)
        except OptionError as error:
            return [Error(str(error), id="rotator.E003")]
    return []


def check_databases(**_: object) -> list[CheckMessage]:
    """Check that the project has a PostgreSQL database."""
    if any(connection.vendor == "postgresql" for connection in connections.all()):
        return []
    return [
        Warning(
            "None of the project's databases is PostgreSQL, but rotations need PostgreSQL.",
            id="rotator.W001",
        )
    ]


class RotatorConfig(AppConfig):
    """The app that rotates leaked columns."""

    name = "rotator"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks."""
        register(check_setting)
        register(check_databases, Tags.compatibility)
