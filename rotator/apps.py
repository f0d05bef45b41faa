"""The Django app: its configuration, its system checks and the ``ROTATOR`` setting."""

from collections.abc import Mapping
from typing import Any, Final

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004 - Django's name
from django.db import connections

from rotator.exceptions import OptionError, TargetError

KEYS: Final = {
    "DEFAULT_TARGET": "a string",
    "CELERY_APP": "a string",
    "THROTTLES": "a list of dotted paths",
    "HIDE_KEYS": "True or False",
}


def rotator_setting() -> Mapping[str, Any]:
    """Return the setting ``ROTATOR``; empty if the project has none.

    Raises:
        OptionError: It is not a dictionary, has an unknown key, or a value of the wrong type.
    """
    setting: object = getattr(settings, "ROTATOR", {})
    if not isinstance(setting, dict):
        raise OptionError("The setting ROTATOR is not a dictionary.")
    if unknown := sorted(str(key) for key in setting if key not in KEYS):
        *names, last = KEYS
        raise OptionError(
            f"The setting ROTATOR has an unknown key {', '.join(unknown)}. The keys are "
            f"{', '.join(names)} and {last}."
        )
    for key, value in setting.items():
        if not _fits(key, value):
            raise OptionError(f'ROTATOR["{key}"] is not {KEYS[key]}.')
    return setting


def _fits(key: str, value: object) -> bool:
    if key == "THROTTLES":
        return isinstance(value, list | tuple) and all(isinstance(path, str) for path in value)
    return isinstance(value, bool if key == "HIDE_KEYS" else str)


def throttle_paths() -> tuple[str, ...]:
    """Return the dotted paths of the setting's throttles; empty if the setting has none."""
    return tuple(rotator_setting().get("THROTTLES", ()))


def hides_keys() -> bool:
    """Return whether the page and log records show no keys of rows."""
    return bool(rotator_setting().get("HIDE_KEYS", False))


def default_target() -> tuple[str, ...]:
    """Return the target of the setting ``ROTATOR``; empty if the setting has none."""
    return tuple(rotator_setting().get("DEFAULT_TARGET", "").split())


def check_setting(**_: object) -> list[CheckMessage]:
    """Check ``settings.ROTATOR``."""
    try:
        labels, paths = default_target(), throttle_paths()
    except OptionError as error:
        return [Error(str(error), id="rotator.E001")]
    if not (labels or paths):
        return []
    # They import the driver.
    from rotator.fields.target import find_fields  # noqa: PLC0415
    from rotator.fields.throttles import check_callable  # noqa: PLC0415

    try:
        find_fields(labels)
    except TargetError as error:
        return [Error(f'ROTATOR["DEFAULT_TARGET"]: {error}', id="rotator.E002")]
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
            "None of the project's databases is PostgreSQL, but rotations need PostgreSQL.", id="rotator.W001"
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
