"""The tests' own server crashes, comes back and can be set up, whichever PostgreSQL it is made of."""

from pathlib import Path

import psycopg
import pytest

from core.embedded.account import Account
from core.embedded.binaries import Programs
from core.own_server import OwnServer
from tests.faults.database import Database

_DEBIAN = Path("/usr/lib/postgresql")


def test_a_crash_loses_acknowledged_commits_and_ends_every_connection(
    server: OwnServer, database: Database
) -> None:
    database.query("CREATE TABLE told (n integer)")
    with server.configured(wal_writer_delay="10s"), server.connect(database.name) as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute("INSERT INTO told VALUES (1)")
        server.restart("immediate")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        assert database.number("SELECT count(*) FROM told") == 0


def test_it_is_configured_for_a_while(server: OwnServer, database: Database) -> None:
    with server.configured(max_connections="20"):
        assert database.query("SHOW max_connections") == [("20",)]
        assert database.query("SHOW max_prepared_transactions") == [("10",)]
    assert database.query("SHOW max_connections") == [("60",)]
    assert "database system is ready to accept connections" in server.log()


def test_it_asks_for_the_password_over_tcp(server: OwnServer, database: Database) -> None:
    with psycopg.connect(database.url(application_name="a b&c")) as connection:
        assert connection.execute("SHOW application_name").fetchone() == ("a b&c",)
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(database.url().replace(server.password, "wrong"))


def _installed() -> list[Programs]:
    return [
        Programs(folder=folder, major=int(folder.parent.name))
        for folder in sorted(_DEBIAN.glob("*/bin"))
        if (folder / "pg_ctl").exists() and int(folder.parent.name) >= 15
    ]


@pytest.mark.parametrize("programs", _installed() or [None], ids=lambda p: f"{p.major}" if p else "none")
def test_it_can_be_made_of_an_installed_postgresql(programs: Programs | None) -> None:
    if programs is None:
        pytest.skip("no PostgreSQL of a Debian package is installed")
    with OwnServer(programs=programs) as own:
        folder = own.folder
        assert (own.folder / "data").stat().st_uid == Account.for_server().uid
        with own.connect() as connection:
            assert connection.info.server_version // 10_000 == programs.major == own.major
    assert not folder.exists()
