"""The replicas and the callables of the project that throttles read."""

from collections.abc import Sequence
from functools import partial

from django.db import connections
from django.utils.module_loading import import_string

from rotator.exceptions import OptionError
from rotator.fields.server import server_of
from rotator.postgres.connection import Server
from rotator.runner.throttles import ThrottleSources


def find_sources(aliases: Sequence[str], paths: Sequence[str], server: Server) -> ThrottleSources:
    """Return the replicas of Django's aliases, and the callables of dotted paths.

    Raises:
        OptionError: There is no such alias, or no such callable.
    """
    for alias in aliases:
        if alias not in connections:
            raise OptionError(
                f"--lag-of: there is no database '{alias}'. The project has {', '.join(connections)}."
            )
        if connections[alias].vendor != "postgresql":
            raise OptionError(
                f"--lag-of {alias} is {connections[alias].display_name}, which is no replica of PostgreSQL."
            )
    for path in paths:
        check_callable(path)
    return ThrottleSources(
        replicas={alias: server_of(connections[alias], server.search_path) for alias in aliases},
        calls={path: partial(_call, path) for path in paths},
    )


def check_callable(path: str) -> None:
    """Refuse a dotted path that names no callable."""
    try:
        found = import_string(path)
    except ImportError as error:
        raise OptionError(f'ROTATOR["THROTTLES"]: {path} cannot be imported: {error}.') from error
    if not callable(found):
        raise OptionError(f'ROTATOR["THROTTLES"]: {path} is not callable.')


def _call(path: str) -> object:
    try:
        # Found again each time: a callable that has vanished is an error of the call.
        return import_string(path)()
    finally:
        # Django's connections belong to a thread, and each call has a new one.
        connections.close_all()
