"""Sizes are printed as the server prints them."""

import pytest
from django.db import connection

from rotator.progress.text import size

SIZES = sorted(
    {near + 2**power * part // 7 for power in range(0, 62, 3) for part in (7, 11, 20) for near in (-1, 0, 1)}
)


@pytest.mark.django_db
def test_sizes_are_those_of_pg_size_pretty() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT n, pg_size_pretty(n) FROM unnest(%s::bigint[]) AS n", [SIZES])
        expected = dict(cursor.fetchall())
    assert {number: size(number) for number in SIZES} == expected
