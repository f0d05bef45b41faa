"""The engine."""

import os
from pathlib import Path
from typing import Any

from django.db.backends.postgresql import base


class DatabaseWrapper(base.DatabaseWrapper):
    """Connects with the password of the moment, and has an option of its own."""

    def get_connection_params(self) -> dict[str, Any]:
        """Read the password, too."""
        password = Path(os.environ["TEST_VAULT"]).read_text()
        return {**super().get_connection_params(), "password": password, "MAX_CONNS": 4}

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:  # noqa: ANN401 - as Django has it
        """Keep the option from the driver, as django-db-geventpool does."""
        return super().get_new_connection({**conn_params, "MAX_CONNS": None})
