"""docker-compose.yml and the Dockerfile name only what the project has; no engine runs in the tests."""

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from django.core.management import get_commands
from django.test import Client
from ruamel.yaml import YAML

PROJECT = Path(__file__).parents[2]
DOCKERFILE = (PROJECT / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE: dict[str, Any] = YAML(typ="safe").load(PROJECT / "docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
IMAGES_VARIABLES = {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"}
README = (PROJECT / "README.md").read_text()
GUIDE = (PROJECT / "docs" / "install.md").read_text()


def _written(command: str | list[str]) -> str:
    return command if isinstance(command, str) else " ".join(command)


def _assert_known(command: str) -> None:
    for name in re.findall(r"manage\.py (\w+)", command):
        assert name == "help" or name in get_commands(), name
    for name in re.findall(r"--app (\S+)", command):
        assert find_spec(name) is not None, name


def test_commands_are_those_of_the_project() -> None:
    assert set(OURS) == {"migrate", "app", "worker"}
    for service in OURS.values():
        _assert_known(_written(service["command"]))
    (command,) = re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)
    _assert_known(command.replace('", "', " "))


def test_one_service_migrates_and_the_others_wait_for_it() -> None:
    assert [name for name, service in OURS.items() if "migrate" in _written(service["command"])] == [
        "migrate"
    ]
    for name in ("app", "worker"):
        assert OURS[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for service in SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"]


def test_variables_are_read_by_the_project() -> None:
    sources = "".join(path.read_text() for path in (PROJECT / "core").glob("*.py"))
    for name, service in SERVICES.items():
        for variable in service.get("environment", {}):
            assert variable in IMAGES_VARIABLES if name not in OURS else f'"{variable}"' in sources, variable
    used = set(re.findall(r"\$\{(\w+)", (PROJECT / "docker-compose.yml").read_text()))
    given = set(re.findall(r"^(\w+)=", (PROJECT / ".env.example").read_text(), re.MULTILINE))
    assert used == given


def test_paths_and_extras_of_the_dockerfile_are_there() -> None:
    ignored = (PROJECT / ".dockerignore").read_text().split()
    for words in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        for path in words.split():
            assert (PROJECT / path).exists(), path
            assert path not in ignored
    (constraints, extras) = re.findall(r"--constraint (\S+) --editable '\.\[(.*)\]'", DOCKERFILE)[0]
    assert (PROJECT / constraints).exists()
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    for file in project["tool"]["setuptools"]["dynamic"]["readme"]["file"]:
        assert re.search(rf"^COPY .*{file}", DOCKERFILE, re.MULTILINE), file


def test_the_guide_names_services_and_profiles_that_there_are() -> None:
    commands = re.findall(r"^ +docker compose .*$", GUIDE.replace("\\\n", ""), re.MULTILINE)
    assert len(commands) == 2
    (in_readme,) = re.findall(r"^ +docker compose .*$", README.replace("\\\n", ""), re.MULTILINE)
    assert re.search(r"run .*--build app .*create_tickets .*&& python manage\.py async_rotate", in_readme)
    commands.append(in_readme)
    assert re.search(r"^ +cp \.env\.example \.env$", README, re.MULTILINE)
    for command in commands:
        _assert_known(command)
        for profile in re.findall(r"--profile (\w+)", command):
            assert any(profile in service.get("profiles", []) for service in SERVICES.values())
        for name in re.findall(r"run (?:--\S+ )*(\w+)|--scale (\w+)", command):
            assert set(name) & set(OURS), command


def test_the_root_leads_to_the_admin() -> None:
    response = Client().get("/")
    assert (response.status_code, response["Location"]) == (302, "/admin/")
