"""The tickets app."""

from django.apps import AppConfig


class TicketsConfig(AppConfig):
    """Registers the app with Django."""

    name = "tickets"
    default_auto_field = "django.db.models.BigAutoField"
