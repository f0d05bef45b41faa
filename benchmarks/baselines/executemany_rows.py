"""Workers on asyncio that send each row's new token as a parameter set of executemany()."""

import asyncio
import os
from uuid import uuid4

from common import options
from psycopg_pool import AsyncConnectionPool

_UPDATE = "UPDATE tickets_ticket SET token = %s WHERE id = %s"
_IDS = "SELECT id FROM tickets_ticket WHERE id > %s ORDER BY id LIMIT %s"


async def rotate(batch: int, workers: int) -> None:
    """Begin at the start; there is no place to go on from."""
    queue: asyncio.Queue[list[int] | None] = asyncio.Queue(2 * workers)
    url = os.environ["DATABASE_URL"]
    async with AsyncConnectionPool(url, min_size=workers + 1, max_size=workers + 1, open=False) as pool:

        async def work() -> None:
            while ids := await queue.get():
                async with pool.connection() as connection, connection.cursor() as cursor:
                    await cursor.executemany(_UPDATE, [(uuid4(), key) for key in ids])

        async with asyncio.TaskGroup() as tasks:
            for _ in range(workers):
                tasks.create_task(work())
            last_id = 0
            async with pool.connection() as connection:
                while ids := [key async for (key,) in await connection.execute(_IDS, (last_id, batch))]:
                    await queue.put(ids)
                    last_id = ids[-1]
            for _ in range(workers):
                await queue.put(None)


def main() -> None:
    """Read the options and run."""
    chosen = options("executemany() with a parameter set for each row")
    asyncio.run(rotate(chosen.batch, chosen.threads))


if __name__ == "__main__":
    main()
