"""The project's settings, with an application to rotate."""

from core.settings import *  # noqa: F403 - all of them
from core.settings import DATABASES
from core.settings import INSTALLED_APPS as PROJECT_APPS

INSTALLED_APPS = [*PROJECT_APPS, "tests.shop"]

_DATABASE = DATABASES["default"]
DATABASES = {
    "default": _DATABASE,
    # Another database of the same server, and another way to the first.
    "other": {**_DATABASE, "NAME": f"{_DATABASE['NAME']}_other"},
    "direct": {**_DATABASE, "TEST": {"MIRROR": "default"}},
}
