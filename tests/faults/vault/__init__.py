"""A database engine whose password is read from a file at each connect, as from a vault."""
