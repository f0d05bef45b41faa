"""``flush`` for the tests, which empties only the tables that a test has written to.

Django's own truncates all tables after each test that commits, and then creates content types and permissions
again. Both take longer than most tests.
"""

from typing import Any

from django.core.management.commands import flush
from django.db import connections

# TRUNCATE creates new files for a table, its indexes and its TOAST table, so the rows of the rotator's own
# tables are deleted while these are small. TRUNCATE removes the pages of a table and its estimated number of
# rows: a table without both is as if it had just been truncated. No test changes the rows of the last three.
_WRITTEN_TABLES = (
    "SELECT oid::regclass::text, relname ~ '^rotator_' AND pg_relation_size(oid) < 131072 FROM pg_class"
    " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    " AND relname NOT IN ('django_migrations', 'django_content_type', 'auth_permission')"
    " AND (pg_relation_size(oid) > 0 OR reltuples >= 0)"
)


class Command(flush.Command):
    def handle(self, **options: Any) -> None:  # noqa: ANN401
        with connections[options["database"]].cursor() as cursor:
            cursor.execute(_WRITTEN_TABLES)
            written = cursor.fetchall()
            statements = [f"DELETE FROM {name}" for name, is_small in written if is_small]
            if truncated := [name for name, is_small in written if not is_small]:
                statements.append(f"TRUNCATE {', '.join(truncated)} CASCADE")
            # In one transaction, at whose end the references are checked.
            if statements:
                cursor.execute("; ".join(statements))
