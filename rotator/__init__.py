"""Give every row of a live PostgreSQL table a new secret."""

__version__ = "0.1.0"
