"""Test modules do not import each other: what they share has a module of its own."""

import re
from pathlib import Path

from django.conf import settings

# ast.parse() raises a SystemError when the garbage collector runs in it and formats a traceback.
_IMPORTS = re.compile(r"^\s*(?:from|import) (tests\.[^\n(]*(?:\([^)]*\))?)", re.MULTILINE)


def test_no_test_module_is_imported() -> None:
    tests = Path(settings.BASE_DIR) / "tests"
    importing = {
        f"{file.relative_to(tests)}: {imported}"
        for file in tests.rglob("*.py")
        for imported in _IMPORTS.findall(file.read_text())
        if re.search(r"\btest_", imported)
    }
    assert importing == set()
