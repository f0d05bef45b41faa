"""The project's settings with this engine."""

from core.settings import *  # noqa: F403 - as Django's settings are extended
from core.settings import DATABASES

DATABASES["default"]["ENGINE"] = "tests.faults.vault"
