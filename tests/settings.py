"""The project's settings, with an application to rotate."""

import os

from core.database import database_from
from core.settings import *  # noqa: F403 - all of them
from core.settings import INSTALLED_APPS as PROJECT_APPS

INSTALLED_APPS = [*PROJECT_APPS, "tests.shop"]
ROOT_URLCONF = "tests.urls"

# Not DATABASE_URL: that may be exported for a server on which no test is to run.
_DATABASE = database_from(os.environ.get("TEST_DATABASE_URL", ""))
DATABASES = {
    "default": _DATABASE,
    # Another database of the same server, and another way to the first.
    "other": {**_DATABASE, "NAME": f"{_DATABASE['NAME']}_other"},
    "direct": {**_DATABASE, "TEST": {"MIRROR": "default"}},
}
