"""A Django database engine that brings its own PostgreSQL for development, the demo and the tests."""
