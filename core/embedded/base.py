"""Django's PostgreSQL engine, with a server that starts when a connection is first wanted."""

from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db.backends.postgresql import base, features

from core.embedded.configuration import PORT


class DatabaseFeatures(features.DatabaseFeatures):
    """PostgreSQL's features, where what every embedded server has is known without asking it."""

    # Django's checks of the models read it, and they are not to start a server.
    supports_nulls_distinct_unique_constraints = True


class DatabaseWrapper(base.DatabaseWrapper):
    """PostgreSQL on the embedded server's unix socket."""

    features_class = DatabaseFeatures

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
