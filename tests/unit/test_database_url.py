from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from core.database import database_from
from core.embedded import server


def test_no_url_means_the_embedded_server() -> None:
    assert database_from("")["ENGINE"] == "core.embedded"


def test_a_socket_folder_can_be_the_host() -> None:
    database = database_from("postgres://me@%2Frun%2Fpostgresql/shop")
    assert (database["HOST"], database["NAME"], database["USER"]) == ("/run/postgresql", "shop", "me")


@pytest.mark.parametrize("url", ["mysql://me:hunter2@db/shop", "nonsense://me:hunter2@db", "hunter2"])
def test_what_is_no_postgresql_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="postgres://user:password@host") as refusal:
        database_from(url)
    assert "hunter2" not in str(refusal.value)


def test_a_url_without_a_database_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="names no database"):
        database_from("postgres://me@db")


def test_the_embedded_server_s_own_url_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "socket_folder", lambda _project: Path("/home/Ada/My Code/socket"))
    database = database_from(server.database_url(Path("/unused"), "test_rotator"))
    assert (database["HOST"], database["PORT"], database["NAME"], database["USER"]) == (
        "/home/Ada/My Code/socket",
        5432,
        "test_rotator",
        "postgres",
    )
