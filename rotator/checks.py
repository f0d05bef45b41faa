"""What ``manage.py check`` says of a project that is not set up for rotations.

- ``rotator.E001``: the setting ROTATOR is no dictionary, or has a key that there is not.
- ``rotator.E002``: ``ROTATOR["DEFAULT_TARGET"]`` cannot be rotated.
- ``rotator.W001``: none of the project's databases is PostgreSQL.
"""

from typing import Final

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning  # noqa: A004 - Django's own name for it
from django.db import connections

from rotator.errors import TargetError

_KEYS: Final = ("DEFAULT_TARGET", "CELERY_APP")


def check_setting(**_: object) -> list[CheckMessage]:
    """Check ``settings.ROTATOR``."""
    rotator: object = getattr(settings, "ROTATOR", {})
    if not isinstance(rotator, dict):
        return [Error("The setting ROTATOR is no dictionary.", id="rotator.E001")]
    unknown = sorted(str(key) for key in rotator if key not in _KEYS)
    if unknown:
        return [
            Error(
                f"The setting ROTATOR has no key {', '.join(unknown)}.",
                hint=f"There are {' and '.join(_KEYS)}.",
                id="rotator.E001",
            )
        ]
    return _check_default_target(rotator.get("DEFAULT_TARGET", ""))


def _check_default_target(target: object) -> list[CheckMessage]:
    # Only where it is needed: it brings the driver with it.
    from rotator.target import find_fields  # noqa: PLC0415 - as said above

    if not isinstance(target, str):
        return [Error('ROTATOR["DEFAULT_TARGET"] is no text.', hint="app.Model.field", id="rotator.E002")]
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
