"""Which server the project uses: the one that DATABASE_URL names, or the embedded one."""

from typing import Any

import dj_database_url
from django.core.exceptions import ImproperlyConfigured

from core.embedded.configuration import DATABASE, SUPERUSER

_POSTGRESQL = "django.db.backends.postgresql"
_SHAPE = "postgres://user:password@host:5432/name"


class DatabaseUrlError(ImproperlyConfigured):
    """DATABASE_URL cannot be used. The URL may hold a password, so the text does not repeat it."""


def database_from(url: str) -> dict[str, Any]:
    """Django's settings for a database URL; those of the embedded server for an empty one.

    Raises:
        DatabaseUrlError: The URL is malformed, names no PostgreSQL, or names no database on it.
    """
    if not url:
        return {"ENGINE": "core.embedded", "NAME": DATABASE, "USER": SUPERUSER}
    try:
        database: dict[str, Any] = dict(dj_database_url.parse(url))
    except ValueError:
        # Not chained: the parser's own error may quote a part of the URL.
        raise DatabaseUrlError(f"DATABASE_URL cannot be read: write it as {_SHAPE}.") from None
    if database.get("ENGINE") != _POSTGRESQL:
        raise DatabaseUrlError(f"DATABASE_URL must name a PostgreSQL server, as {_SHAPE}.")
    if not database["NAME"]:
        raise DatabaseUrlError(f"DATABASE_URL names no database: write it as {_SHAPE}.")
    return database
