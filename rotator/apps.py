"""The app's name and label, as Django wants them."""

from django.apps import AppConfig


class RotatorConfig(AppConfig):
    """The reusable app that rotates leaked columns."""

    name = "rotator"
    default_auto_field = "django.db.models.BigAutoField"
