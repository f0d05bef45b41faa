#!/usr/bin/env python
"""Django's command-line entry point for this project."""

import os
import sys

from django.core.management import execute_from_command_line

from core.database import DatabaseUrlError
from core.embedded.errors import EmbeddedServerError

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
    try:
        execute_from_command_line(sys.argv)
    except (DatabaseUrlError, EmbeddedServerError) as error:
        # Each is a sentence on what to do, to which a traceback adds nothing.
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        # Before a command listens to it, all there is to say is that it came: 128 + SIGINT.
        sys.exit(130)
