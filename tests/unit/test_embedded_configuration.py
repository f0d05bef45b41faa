from pathlib import Path

import pytest

from core.embedded.configuration import TUNING, initdb_arguments, server_arguments

_ROOT = Path(__file__).parents[2]


def test_the_server_listens_on_its_socket_alone() -> None:
    arguments = server_arguments(Path("/clone/data"), Path("/clone/socket"))
    assert "--listen_addresses=" in arguments
    assert '--unix_socket_directories="/clone/socket"' in arguments


def test_nothing_trades_durability_for_speed() -> None:
    assert not {"fsync", "full_page_writes", "synchronous_commit"} & TUNING.keys()


@pytest.mark.parametrize(("major", "expected"), [(15, "--locale=C"), (17, "--builtin-locale=C.UTF-8")])
def test_the_locale_is_one_that_the_major_version_has(major: int, expected: str) -> None:
    assert expected in initdb_arguments(Path("data"), major)


def test_docker_compose_says_the_same_to_its_server() -> None:
    compose = (_ROOT / "docker-compose.yml").read_text()
    assert [name for name, value in TUNING.items() if f"--{name}={value}" not in compose] == []
