"""The project that the rotator ships in: settings, pages and the embedded PostgreSQL."""
