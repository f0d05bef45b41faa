"""The engine."""

import os
from pathlib import Path
from typing import Any

from django.db.backends.postgresql import base


class DatabaseWrapper(base.DatabaseWrapper):
    """Connects with the password of the moment."""

    def get_connection_params(self) -> dict[str, Any]:
        """Read the password, too."""
        return super().get_connection_params() | {"password": Path(os.environ["TEST_VAULT"]).read_text()}
