"""Tickets in Django's admin, without their tokens."""

from typing import TYPE_CHECKING

from django.contrib import admin
from django.http import HttpRequest

from tickets.models import Ticket

if TYPE_CHECKING:
    TicketModelAdmin = admin.ModelAdmin[Ticket]
else:
    # Only the type stubs know ModelAdmin as a generic class.
    TicketModelAdmin = admin.ModelAdmin


@admin.register(Ticket)
class TicketAdmin(TicketModelAdmin):
    """Shows and edits everything but the token."""

    fields = ("title", "created_at")
    list_display = ("id", "title", "created_at")
    list_display_links = ("id", "title")
    search_fields = ("title",)
    ordering = ("-id",)
    # A search would otherwise count the whole table a second time.
    show_full_result_count = False

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        """Refuse filters on the token.

        Django allows every local field in the query string: ``?token__startswith=a`` would let a user
        who sees the list guess a token digit by digit.
        """
        if lookup.partition("__")[0] == "token":
            return False
        return super().lookup_allowed(lookup, value, request)
