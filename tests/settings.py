"""The project's settings, with an application to rotate."""

from core.settings import *  # noqa: F403 - all of them
from core.settings import INSTALLED_APPS as PROJECT_APPS

INSTALLED_APPS = [*PROJECT_APPS, "tests.shop"]
