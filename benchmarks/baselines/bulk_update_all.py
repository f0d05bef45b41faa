"""All tickets in memory, and one call of bulk_update()."""

from common import Ticket, options, renew


def main() -> None:
    """Load all, and write them in batches, in the one transaction that bulk_update() opens."""
    batch = options("bulk_update() of all tickets").batch
    Ticket.objects.bulk_update(renew(list(Ticket.objects.all())), ["token"], batch_size=batch)


if __name__ == "__main__":
    main()
