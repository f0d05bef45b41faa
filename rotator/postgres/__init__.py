"""Every SQL statement of the rotator, and nothing of Django."""
