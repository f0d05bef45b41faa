"""``flush`` for the tests, which truncates only the tables that a test has written to.

Django's own truncates all tables after each test that commits, and then creates content types and permissions
again. Both take longer than most tests.
"""

from typing import Any

from django.core.management.commands import flush
from django.db import connections

# No test changes the rows of the last two, which exist since the tables were created. TRUNCATE removes the
# pages of a table and its estimated number of rows: a table without both is as if it had just been truncated.
_WRITTEN_TABLES = (
    "SELECT oid::regclass::text FROM pg_class"
    " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    " AND relname NOT IN ('django_migrations', 'django_content_type', 'auth_permission')"
    " AND (pg_relation_size(oid) > 0 OR reltuples >= 0)"
)


class Command(flush.Command):
    def handle(self, **options: Any) -> None:  # noqa: ANN401
        with connections[options["database"]].cursor() as cursor:
            cursor.execute(_WRITTEN_TABLES)
            if written := [name for (name,) in cursor.fetchall()]:
                cursor.execute(f"TRUNCATE {', '.join(written)} CASCADE")
