"""Django's PostgreSQL engine, with a server that starts when a connection is first wanted."""

from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db.backends.postgresql import base

from core.embedded.configuration import PORT


class DatabaseWrapper(base.DatabaseWrapper):
    """PostgreSQL on the embedded server's unix socket."""

    def get_connection_params(self) -> dict[str, Any]:
        """Django's parameters, with the server running behind them.

        Raises:
            ImproperlyConfigured: This system has no embedded server.
            EmbeddedServerError: The server cannot be started.
        """
        try:
            # Imported late: the locks and accounts it stands on exist on POSIX only.
            from core.embedded.server import socket_folder  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ImproperlyConfigured(
                "There is no embedded PostgreSQL on this system: set DATABASE_URL to a server of yours."
            ) from error
        # The port too: libpq would take a PGPORT of the user's.
        self.settings_dict.update(HOST=str(socket_folder(settings.BASE_DIR)), PORT=str(PORT))
        return super().get_connection_params()
