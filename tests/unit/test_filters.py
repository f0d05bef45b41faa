"""Filters: each lookup of each field, with values that fit and values that do not."""

import re
import uuid

import pytest
from django.contrib.postgres import fields as postgres
from django.db import models
from django.db.models import Transform
from django.test.utils import isolate_apps

from rotator.exceptions import OptionError
from rotator.fields.filters import row_condition
from rotator.options import Selection


class Fussy(Exception):  # noqa: N818 - any name
    pass


class FussyField(models.CharField):  # type: ignore[type-arg]
    """Raises an error of its own for most values."""

    def get_prep_value(self, value: object) -> object:
        if value not in (None, "5"):
            raise Fussy
        return value


FIELDS = {
    "array": postgres.ArrayField(models.IntegerField()),
    "binary": models.BinaryField(),
    "boolean": models.BooleanField(),
    "char": models.CharField(max_length=9),
    "date": models.DateField(),
    "date_time": models.DateTimeField(),
    "decimal": models.DecimalField(max_digits=5, decimal_places=2),
    "duration": models.DurationField(),
    "float": models.FloatField(),
    "fussy": FussyField(max_length=9),
    "hstore": postgres.HStoreField(),
    "integer": models.IntegerField(),
    "integers": postgres.IntegerRangeField(),
    "ip": models.GenericIPAddressField(),
    "json": models.JSONField(),
    "time": models.TimeField(),
    "times": postgres.DateTimeRangeField(),
    "uuid": models.UUIDField(),
}
TRANSFORMED = ("exact", "in", "range", "gt", "isnull")
VALUES = (
    "5",
    "x",
    "1,2,6",
    "{1,2}",
    "2026-01-01T00:00:00Z",
    "10.0.0.0/8",
    r"\x00",
    "9" * 23,
    "(",
    str(uuid.UUID(int=1)),
    "a\0b",
    "x\ny",
)


def _model() -> type[models.Model]:
    with isolate_apps("tests.shop"):
        fields = {name: field.clone() for name, field in FIELDS.items()}
        meta = type("Meta", (), {"app_label": "shop", "managed": False})
        return type("Filtered", (models.Model,), {**fields, "__module__": __name__, "Meta": meta})


MODEL = _model()


def _condition(filters: str) -> bytes:
    found = row_condition(MODEL, Selection(filters=(filters,)), rotated=(), database="default")
    return b"" if found is None else found.as_bytes()


def _names(name: str) -> list[str]:
    names = [name]
    for lookup, of in MODEL._meta.get_field(name).get_lookups().items():
        is_transform = isinstance(of, type) and issubclass(of, Transform)
        names += (
            [f"{name}__{lookup}__{last}" for last in TRANSFORMED] if is_transform else [f"{name}__{lookup}"]
        )
    return names


@pytest.mark.parametrize("name", FIELDS)
def test_every_lookup_gives_a_condition_or_one_sentence(name: str) -> None:
    sentences, compiled = list[str](), 0
    for lookup in _names(name):
        for value in VALUES:
            try:
                _condition(f"{lookup}={value}")
                compiled += 1
            except OptionError as error:
                sentences.append(str(error))
    assert compiled
    assert [sentence for sentence in sentences if "\n" in sentence or not sentence.endswith(".")] == []


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        (
            "integer__range=5",
            "integer__range needs the first and the last value. Write it as integer__range=1,9.",
        ),
        ("date__range=1,2,6", "date__range needs the first and the last value. Write it as date__range=1,9."),
        ("binary=x", "binary must be hexadecimal digits, not 'x'."),
        (
            "binary__contains=00",
            "binary__contains: a binary field has only these lookups: exact, in, isnull, ",
        ),
        ("array__in={1,2}", "array__in={1,2} is not a valid filter of this model: "),
        ("ip=10.0.0.0/8", "ip=10.0.0.0/8 is not a valid filter of this model: "),
        ("fussy=x", "fussy=x is not a valid filter of this model: Fussy."),
    ],
)
def test_a_value_that_does_not_fit_is_refused(filters: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=f"^--filter {re.escape(sentence)}"):
        _condition(filters)


def test_bytes_of_another_encoding_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^--filter: a filter must be valid Unicode\.$"):
        _condition("char=half \udcff")


def test_several_keys_are_a_list() -> None:
    assert b"a,b" in _condition("json__has_keys=a,b").replace(b"'", b"").replace(b" ", b"")


def test_binary_values_are_hexadecimal_digits() -> None:
    assert b"bytea" in _condition("binary=00ff")
    assert _condition("binary=00ff") == _condition(r"binary=\x00ff") != _condition("binary=00fe")
