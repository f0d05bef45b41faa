"""The signal by which an application hears of rows that have new values."""

from typing import Final

from django.dispatch import Signal

range_rotated: Final = Signal()
"""Sent after each commit of rows with new values, to purge caches or notify owners.

The sender is the model. Receivers get ``rotation`` (the rotation's id), ``database`` (Django's alias),
``rows`` (how many rows got new values) and which: ``after`` and ``through``, lists of the key's columns as
JSON has them, for the rows with ``after < key <= through`` (``after`` is None at the table's start); or
``keys``, a list of such lists, for rows that were committed late (then ``through`` is None). Never a value.

Receivers may be plain functions or coroutines. The worker waits for them before its next range. Their
exceptions are logged and change nothing. Of a crash between the commit and the signal nobody hears: what has
to hear of every range reads the checkpoints, :class:`rotator.models.CompletedRange`.
"""
