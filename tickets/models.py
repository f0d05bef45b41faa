"""Tickets: a big table with a secret in every row."""

import uuid

from django.db import models
from django.utils import timezone


class Ticket(models.Model):
    """A ticket. Its token allows its holder to read and change it, so nothing prints the token."""

    id = models.BigAutoField(primary_key=True)
    title = models.CharField(max_length=200)
    created_at = models.DateTimeField(default=timezone.now)
    token = models.UUIDField(unique=True, default=uuid.uuid4, editable=False)

    def __str__(self) -> str:
        """Return the title, and never the token."""
        return self.title
