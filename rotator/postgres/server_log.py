"""Whether the server's own log would show new values: it prints the parameters of statements."""

from typing import Final

from psycopg import AsyncConnection

from rotator.postgres.failures import answered

# PostgreSQL's manual, chapter "Error Reporting and Logging", and those of the two modules. Where this role
# may change log_parameter_max_length, guard() does so for each of its transactions, and nothing shows.
_QUERY: Final = (
    "SELECT name || ' = ' || setting FROM pg_settings WHERE"
    " (CASE name WHEN 'log_statement' THEN setting IN ('mod', 'all')"
    " WHEN 'log_min_duration_statement' THEN setting <> '-1'"
    " WHEN 'log_min_duration_sample' THEN setting <> '-1'"
    " WHEN 'log_transaction_sample_rate' THEN setting <> '0' ELSE false END"
    " AND current_setting('log_parameter_max_length') <> '0'"
    " AND NOT has_parameter_privilege('log_parameter_max_length', 'SET'))"
    " OR (name = 'auto_explain.log_min_duration' AND setting <> '-1'"
    " AND COALESCE(current_setting('auto_explain.log_parameter_max_length', true), '0') <> '0')"
    " OR (name = 'pgaudit.log_parameter' AND setting = 'on') ORDER BY name"
)


async def settings_that_show_values(connection: AsyncConnection) -> tuple[str, ...]:
    """The settings that make the server log new values, e.g. ``log_statement = all``; mostly none."""
    async with answered(connection):
        cursor = await connection.execute(_QUERY)
        return tuple([setting async for (setting,) in cursor])
