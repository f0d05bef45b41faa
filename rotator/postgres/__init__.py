"""Every SQL statement of the rotator, and nothing of Django.

Functions take connections in autocommit mode. Errors of the driver become those of :mod:`rotator.exceptions`.
"""
