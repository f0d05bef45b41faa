"""One run of a rotation, from owning it to leaving it; asyncio and the database, nothing of Django."""
