"""Test modules do not import each other: what they share has a module of its own."""

import ast
from pathlib import Path

from django.conf import settings


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_test_module_is_imported() -> None:
    tests = Path(settings.BASE_DIR) / "tests"
    importing = {
        f"{file.relative_to(tests)}: {name}"
        for file in tests.rglob("*.py")
        for name in imported(file)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[1:3])
    }
    assert importing == set()
