"""The app's name and label, as Django wants them."""

from django.apps import AppConfig
from django.core.checks import Tags, register


class RotatorConfig(AppConfig):
    """The reusable app that rotates leaked columns."""

    name = "rotator"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks."""
        from rotator.checks import check_databases, check_setting  # noqa: PLC0415 - models must be ready

        register(check_setting)
        register(check_databases, Tags.compatibility)
