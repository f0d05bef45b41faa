"""A server-side cursor over all tickets, and a bulk_update() for each batch that it gives."""

from itertools import islice

from common import Ticket, options, renew


def main() -> None:
    """Begin at the start; there is no place to go on from."""
    batch = options("iterator() and bulk_update()").batch
    cursor = Ticket.objects.order_by("pk").iterator(chunk_size=batch)
    while tickets := list(islice(cursor, batch)):
        Ticket.objects.bulk_update(renew(tickets), ["token"])


if __name__ == "__main__":
    main()
