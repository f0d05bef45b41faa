"""Roles as the operating guide describes them, and roles with settings for the application."""

import re
from pathlib import Path

from tests.acceptance.harness import PROJECT

_GUIDE: Path = PROJECT / "docs" / "operating.md"

# Each would break a rotation if it reached its sessions.
ROLE_SETTINGS = (
    "transaction_timeout = '60ms'",
    "lock_timeout = '1ms'",
    "idle_session_timeout = '300ms'",
    "idle_in_transaction_session_timeout = '1ms'",
    "default_transaction_isolation = serializable",
    "default_transaction_deferrable = on",
    "standard_conforming_strings = off",
    "enable_indexscan = off",
    "enable_tidscan = off",
    "enable_mergejoin = off",
    "enable_nestloop = off",
    "enable_sort = off",
)


def documented_grants(role: str) -> list[str]:
    """Return the GRANT statements of the operating guide, for this role and the tickets."""
    grants = re.findall(r"^ {4}(GRANT .*;)$", _GUIDE.read_text(), re.MULTILINE)
    assert len(grants) >= 4
    names = {"shop_order": "tickets_ticket", "api_key": "token", "rotating": role}
    return [re.sub("|".join(names), lambda found: names[found[0]], grant) for grant in grants]
