"""The reusable app as its users install it: a wheel in an environment of its own, a project of theirs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from django.db import connection
from psycopg import sql

from tests.acceptance.harness import PROJECT, url_of

_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SECONDS = 900
# What Django's own connections are made with, and others are not.
_DJANGOS_OWN = ("cursor_factory", "context", "prepare_threshold", "dbname")


def blocks(language: str, guide: str = "install.md") -> list[str]:
    """The fenced blocks of a guide in one language, in their order."""
    text = (PROJECT / "docs" / guide).read_text()
    return [block for kind, block in _FENCED.findall(text) if kind == language]


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path, python: str = sys.executable) -> "Environment":
        subprocess.run([python, "-m", "venv", folder], check=True, timeout=_SECONDS)
        return cls(folder)

    def run(self, command: str, *, cwd: Path, status: int = 0) -> str:
        """Run a line of shell in it, and return all that it said."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DJANGO_")}
        environment["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{environment['PATH']}"
        environment.pop("DATABASE_URL", None)
        done = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert done.returncode == status, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout


def copy_of_this_repository(folder: Path) -> Path:
    """What a clone holds, without what was made since."""
    shutil.copytree(
        PROJECT, folder, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__")
    )
    return folder


@dataclass(frozen=True)
class Site:
    """A user's project.

    Attributes:
        environment: Where its packages are.
        folder: Where its manage.py is.
        database: The name of its database.
    """

    environment: Environment
    folder: Path
    database: str

    @classmethod
    def start(cls, environment: Environment, folder: Path, database: str) -> "Site":
        """Create a project as a user does: startproject, startapp, and a PostgreSQL database."""
        folder.mkdir()
        environment.run(
            "django-admin startproject site_of_theirs . && python manage.py startapp shop", cwd=folder
        )
        _create_database(database)
        parameters = connection.get_connection_params()
        site = cls(environment, folder, database)
        site.add_to_settings(
            "DATABASES = {'default': {'ENGINE': 'django.db.backends.postgresql', "
            f"'NAME': {database!r}, 'USER': {parameters.get('user', '')!r}, "
            f"'PASSWORD': {parameters.get('password', '')!r}, 'HOST': {str(parameters.get('host', ''))!r}, "
            f"'PORT': {str(parameters.get('port', ''))!r}}}}}\nINSTALLED_APPS += ['shop']\n"
        )
        return site

    def end(self) -> None:
        _drop_database(self.database)

    def add_to_settings(self, text: str) -> None:
        with (self.folder / "site_of_theirs" / "settings.py").open("a") as file:
            file.write(f"\n{text}")

    def add_to_models(self, text: str) -> None:
        with (self.folder / "shop" / "models.py").open("a") as file:
            file.write(f"\n{text}")

    def run(self, command: str, *, status: int = 0) -> str:
        return self.environment.run(command, cwd=self.folder, status=status)

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with _connected(self.database) as database:
            return database.execute(query.encode()).fetchall()

    def assert_rotated(self, table: str, columns: Sequence[str], rotate: Callable[[], object]) -> None:
        """All values of these columns are others after it, and no two rows have the same."""
        query = f"SELECT {', '.join(columns)} FROM {table}"
        before = self.rows(query)
        rotate()
        after = self.rows(query)
        assert len(before) == len(after) == len(set(after)) > 0
        for at in range(len(columns)):
            assert {row[at] for row in before}.isdisjoint(row[at] for row in after)


@contextmanager
def empty_database(name: str) -> Iterator[str]:
    """A database with this name on the tests' server, as its DATABASE_URL."""
    _create_database(name)
    try:
        yield url_of(name)
    finally:
        _drop_database(name)


def _create_database(name: str) -> None:
    with _connected() as server:
        # A run of the tests that was killed leaves one behind.
        server.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
        server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


def _drop_database(name: str) -> None:
    with _connected() as server:
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _connected(database: str | None = None) -> psycopg.Connection:
    parameters = connection.get_connection_params()
    name = database or parameters["dbname"]
    kept = {key: value for key, value in parameters.items() if key not in _DJANGOS_OWN}
    return psycopg.connect(**kept, dbname=name, autocommit=True)
