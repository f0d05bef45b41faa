"""Rows with keys of every kind, and a rotation of them that is killed and resumed."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from django.db import connection as django_connection
from django.db.models import Model

from rotator.api import prepare
from rotator.fields.model import key_fields
from rotator.fields.target import table_path
from rotator.options import RunOptions, Selection
from rotator.postgres.table import Column, TargetTable
from tests.integration.killed import rotate_until_killed
from tests.integration.outcomes import assert_completed
from tests.integration.rotation_tables import Database
from tests.shop import models

ROWS = 60
LETTERS = 'äZa-_ %"'
BATCH = 7
START = datetime(2026, 11, 1, 12, tzinfo=UTC)

KEYS: dict[type[Model], Callable[[int], dict[str, Any]]] = {
    models.ByInteger: lambda i: {"id": i * 1000 - 5000},
    models.BySmallInteger: lambda i: {"id": i - 30},
    models.ByBigInteger: lambda i: {"id": (i - 5) * 10**17},
    models.ByUuid: lambda _: {"id": uuid.uuid4()},
    models.ByChar: lambda i: {"id": LETTERS[i % 8] + str(i)},
    models.ByMoment: lambda i: {"id": START + timedelta(microseconds=i * 7919)},
    models.ByDecimal: lambda i: {"id": Decimal(i) / 7 + Decimal(10) ** 17},
    models.ByPair: lambda i: {"shop": f"shop {i % 3}", "number": i},
}


def table_of(model: type[Model], *fields: str) -> TargetTable:
    """The table of a model, for the account that is kept of it."""
    return TargetTable(
        path=table_path(model),
        key=tuple(Column(name=str(field.column), type_name="text") for field in key_fields(model)),
        columns=tuple(
            Column(name=str(field.column), type_name="text")
            for field in model._meta.concrete_fields
            if field.name in fields
        ),
    )


def make_rows(model: type[Model], key_of: Callable[[int], dict[str, Any]]) -> None:
    model._default_manager.bulk_create(
        model(**key_of(i), nullable="x" if i % 4 else None) for i in range(ROWS)
    )


def rotate_killed_and_resumed(
    database: Database, *labels: str, rows: int = ROWS, selection: Selection | None = None
) -> None:
    """Rotate, die in the middle, and go on."""
    chosen = selection or Selection()
    options = RunOptions(batch=BATCH, concurrency=2, vacuum=False, pace="full")
    name = str(django_connection.settings_dict["NAME"])
    rotate_until_killed(name, list(labels), chosen, options=options, ranges=3)
    done = sum(rows for *_, rows in database.checkpoints())
    assert 0 < done < rows
    prepared = prepare(labels, "default", options, chosen)
    outcome = prepared.rotate(lambda _event: None)
    assert outcome.resumed
    assert_completed(outcome, rows=rows)
