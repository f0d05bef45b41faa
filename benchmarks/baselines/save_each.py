"""Django's save() for each ticket, with a file that says which was the last."""

from uuid import uuid4

from common import PlaceFile, Ticket, options


def main() -> None:
    """Go on after the last ticket that was saved."""
    file = PlaceFile(options("save() for each ticket").place)
    for ticket in Ticket.objects.filter(pk__gt=file.place.last_id).order_by("pk").iterator():
        ticket.token = uuid4()
        ticket.save(update_fields=["token"])
        file.place.last_id = ticket.pk
        file.keep()


if __name__ == "__main__":
    main()
