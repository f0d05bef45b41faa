"""The signal that an application gets when rows have new values."""

from typing import Final

from django.dispatch import Signal

range_rotated: Final = Signal()
"""Sent after each commit of rows with new values, to purge caches or notify owners.

The sender is the model. Receivers get ``rotation`` (the rotation's id), ``database`` (Django's alias) and
``rows`` (the number of rows with new values). Two more arguments identify the rows with ``after < key <=
through``: each is a list of the key's columns as JSON types, and ``after`` is None at the table's start. For
rows that were committed late, ``through`` is None, and ``keys`` is a list of such lists. No argument contains
a new value.

Receivers can be plain functions or coroutines. The worker waits for them before its next range. Their
exceptions are logged, and the rotation continues. A crash between the commit and the signal loses the signal.
A receiver that needs every range reads the checkpoints, :class:`rotator.models.CompletedRange`.
"""
