"""Batches in the order of the key, and threads that bulk_update() them."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Semaphore

from common import Ticket, options, renew
from django.db import connection


def main() -> None:
    """Begin at the start: nothing records which batches in flight were committed."""
    chosen = options("threads and bulk_update()")
    room = Semaphore(2 * chosen.threads)

    def write(tickets: list[Ticket]) -> None:
        try:
            Ticket.objects.bulk_update(renew(tickets), ["token"])
        finally:
            room.release()

    last_id, batches = 0, []
    in_order = Ticket.objects.order_by("pk")
    with ThreadPoolExecutor(chosen.threads) as threads, closing(connection):
        while tickets := list(in_order.filter(pk__gt=last_id)[: chosen.batch]):
            # Not more of them in memory than are being written.
            room.acquire()
            batches.append(threads.submit(write, tickets))
            last_id = tickets[-1].pk
        for batch in batches:
            batch.result()


if __name__ == "__main__":
    main()
