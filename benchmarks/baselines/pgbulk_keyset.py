"""Batches in the order of the key, django-pgbulk's update(), and a file that says which was the last."""

import pgbulk
from common import PlaceFile, Ticket, options, renew


def main() -> None:
    """Go on after the last ticket."""
    chosen = options("keyset and django-pgbulk")
    file = PlaceFile(chosen.place)
    in_order = Ticket.objects.order_by("pk")
    while tickets := list(in_order.filter(pk__gt=file.place.last_id)[: chosen.batch]):
        pgbulk.update(Ticket, renew(tickets), ["token"])
        file.place.last_id = tickets[-1].pk
        file.keep()


if __name__ == "__main__":
    main()
