"""What ``manage.py check`` says of a project that is not set up for rotations.

- ``rotator.E001``: the setting ROTATOR is no dictionary of texts, or has a key that there is not.
- ``rotator.E002``: ``ROTATOR["DEFAULT_TARGET"]`` cannot be rotated.
- ``rotator.W001``: none of the project's databases is PostgreSQL.
"""

from django.core.checks import CheckMessage, Error, Warning  # noqa: A004 - Django's own name for it
from django.db import connections

from rotator.errors import OptionError, TargetError
from rotator.project_setting import read_setting


def check_setting(**_: object) -> list[CheckMessage]:
    """Check ``settings.ROTATOR``."""
    try:
        setting = read_setting()
    except OptionError as error:
        return [Error(str(error), id="rotator.E001")]
    return _check_default_target(setting.get("DEFAULT_TARGET", ""))


def _check_default_target(target: str) -> list[CheckMessage]:
    # Only where it is needed: it brings the driver with it.
    from rotator.target import find_fields  # noqa: PLC0415 - as said above

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
