"""Tickets: a big table with a secret in every row."""

import uuid

from django.db import models
from django.utils import timezone


class Ticket(models.Model):
    """A ticket. Whoever holds its token may read and change it, so nothing here prints one."""

    id = models.BigAutoField(primary_key=True)
    title = models.CharField(max_length=200)
    created_at = models.DateTimeField(default=timezone.now)
    token = models.UUIDField(unique=True, default=uuid.uuid4, editable=False)

    def __str__(self) -> str:
        """Return the title, and never the token."""
        return self.title
