"""The parts of the documentation that repeat the code."""

import argparse
import re
from itertools import chain
from pathlib import Path

import pytest
from django.core.management import load_command_class

import rotator

PACKAGE = Path(rotator.__file__).parent
PROJECT = PACKAGE.parent
GUIDES = [
    PROJECT / "README.md",
    PROJECT / "CONTRIBUTING.md",
    PROJECT / "SECURITY.md",
    *sorted(path for path in (PROJECT / "docs").rglob("*.md") if path.name != "api.md"),
]
# Options that every command of Django has.
OF_DJANGO = {
    *("--help", "--version", "--verbosity", "--settings"),
    *("--pythonpath", "--traceback", "--no-color", "--force-color"),
}


def options_of(command: str) -> set[str]:
    parser = load_command_class("rotator", command).create_parser("manage.py", command)
    assert isinstance(parser, argparse.ArgumentParser)
    options = chain.from_iterable(action.option_strings for action in parser._actions)  # noqa: SLF001 - no public list
    return {option for option in options if option.startswith("--")} - OF_DJANGO


def section(command: str) -> str:
    text = (PROJECT / "docs" / "reference.md").read_text()
    (found,) = re.findall(rf"^## `manage\.py {command}\b.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("command", ["async_rotate", "find_secrets", "rotations", "verify_rotation"])
def test_the_reference_has_every_option_and_no_other(command: str) -> None:
    first_cells = re.findall(r"^\| (`--.*?) \|", section(command), re.MULTILINE)
    documented = set(re.findall(r"--[a-z-]+", " ".join(first_cells)))
    assert documented - OF_DJANGO == options_of(command)


def test_the_architecture_shows_every_module_and_no_other() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text()
    shown = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE))
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert shown == {
        name for name in modules if not name.startswith("migrations/") and not name.endswith("__init__.py")
    } | {"progress/__init__.py"}


def test_the_index_names_every_decision() -> None:
    folder = PROJECT / "docs" / "decisions"
    linked = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text())
    assert linked == sorted(path.name for path in folder.glob("0*.md"))


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().split()) <= 800


def anchors(guide: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", guide.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_lines_are_short_and_links_lead_somewhere(guide: Path) -> None:
    text = guide.read_text()
    assert [line for line in text.splitlines() if len(line) > 120] == []
    for name, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        linked = guide.parent / name if name else guide
        assert name.startswith("http") or linked.exists(), name
        assert not anchor or anchor in anchors(linked), f"{name}#{anchor}"


def test_no_text_installs_the_package_from_an_index() -> None:
    texts = [*(PROJECT / "docs").rglob("*.md"), PROJECT / "README.md", *PACKAGE.rglob("*.py")]
    advice = re.compile(r"install\S* ['\"]?django[-_]async[-_]rotator", re.IGNORECASE)
    assert [str(path.relative_to(PROJECT)) for path in texts if advice.search(path.read_text())] == []
