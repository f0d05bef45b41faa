"""Which server the project uses: the one that DATABASE_URL names, or the embedded one."""

from typing import Any

import dj_database_url
from django.core.exceptions import ImproperlyConfigured

_POSTGRESQL = "django.db.backends.postgresql"


def database_from(url: str) -> dict[str, Any]:
    """Django's settings for a database URL; those of the embedded server for an empty one.

    Raises:
        ImproperlyConfigured: The URL is malformed or names no PostgreSQL. The URL may hold a
            password, so the message does not repeat it.
    """
    if not url:
        return {"ENGINE": "core.embedded", "NAME": "rotator", "USER": "postgres"}
    try:
        database: dict[str, Any] = dict(dj_database_url.parse(url))
    except ValueError as error:
        raise ImproperlyConfigured(
            "DATABASE_URL cannot be read: write it as postgres://user:password@host:5432/name."
        ) from error
    if database.get("ENGINE") != _POSTGRESQL:
        raise ImproperlyConfigured(
            "DATABASE_URL must name a PostgreSQL server, as postgres://user:password@host:5432/name."
        )
    return database
