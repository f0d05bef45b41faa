"""Django's Paginator, and a bulk_update() for each page, with a file that says which was the last."""

from common import PlaceFile, Ticket, options, renew
from django.core.paginator import Paginator


def main() -> None:
    """Continue after the last page; for each page the server skips all rows before it."""
    chosen = options("Paginator and bulk_update()")
    file = PlaceFile(chosen.place)
    pages = Paginator(Ticket.objects.order_by("pk"), chosen.batch)
    for number in range(file.place.page + 1, pages.num_pages + 1):
        Ticket.objects.bulk_update(renew(list(pages.page(number))), ["token"])
        file.place.page = number
        file.keep()


if __name__ == "__main__":
    main()
