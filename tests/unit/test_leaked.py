"""Lists of leaked values: the formats of files, the forms of values, and the numbers of lines."""

import io
import json
import sys
import uuid
from pathlib import Path

import pytest

from rotator.exceptions import OptionError, TargetError
from rotator.fields.leaked import read_leaked
from rotator.fields.model import AnyField
from rotator.postgres.leaked import LeakedValues
from rotator.postgres.ledger import digest_of
from tests.shop.models import ByInteger, Client, Order

TEXT = Order._meta.get_field("api_key")
UUID = uuid.UUID("01234567-89ab-4def-8123-456789abcdef")


def read(path: Path | str, column: str = "", *, fields: tuple[AnyField, ...] = (TEXT,)) -> LeakedValues:
    return read_leaked(str(path), column, fields, "default")


def assert_has(values: LeakedValues, *stored: str | bytes) -> None:
    assert list(values.digests) == [digest_of(each, values.salt) for each in stored]


@pytest.mark.parametrize(
    ("name", "column", "content", "lines"),
    [
        ("keys", "", b"one\ntwo\nthree", ["1-3"]),
        ("keys", "", b"\xef\xbb\xbf one \r\n\r\n\ntwo\n three\t\n\n", ["1-5"]),
        ("keys.csv", "key", b'\xef\xbb\xbfid,key\n1,one\n2,\n3,"two"\n4,three\n', ["2-5"]),
        ("keys.txt", "key", b"key\none\ntwo\nthree\n", ["2-4"]),
        ("keys.json", "", b'["one", "two", "three"]', ["1-3"]),
        ("alerts", "", b' [{"token": "one", "type": "a"}, {"secret": "two"}, {"token": "three"}]', ["1-3"]),
    ],
    ids=["lines", "blank lines", "csv", "csv of one column", "json", "github"],
)
def test_formats(tmp_path: Path, name: str, column: str, content: bytes, lines: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    values = read(tmp_path / name, column)
    assert_has(values, "one", "two", "three")
    for position in range(3):
        values.mark(position)
    assert values.lines(found=True, most=9) == lines
    assert values.lines(found=False, most=9) == []


@pytest.mark.parametrize("stored", [("c2VjcmV0LTE=", "c2VjcmV0MQ=="), ('"one"', "two"), ("KEY=one", "=two")])
def test_values_may_have_quotes_and_equals_signs(tmp_path: Path, stored: tuple[str, str]) -> None:
    (tmp_path / "keys").write_text("\n".join(stored))
    assert_has(read(tmp_path / "keys"), *stored)


def test_the_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"one\ntwo\n"))))
    assert_has(read("-"), "one", "two")


def test_each_list_has_its_own_salt(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n")
    assert read(tmp_path / "keys").salt != read(tmp_path / "keys").salt


@pytest.mark.parametrize(
    ("name", "column", "content", "said"),
    [
        ("keys", "", "\n \n", "has no values"),
        ("keys.csv", "", "key\nsecret-1\n", "Name the column"),
        ("keys.csv", "key", "secret-1\nsecret-2\n", "has no column 'key'"),
        ("keys", "", '["secret-1", ', "not valid JSON"),
        ("keys", "", '[{"value": "secret-1"}]', "a key token or secret"),
        ("keys.csv", "key", f'key\n"{"secret-1" * 20_000}"\n', "not a CSV file from line 2"),
        ("keys", "", f"[{'[' * 100_000}", "not valid JSON"),
        ("keys", "", "secret-1\ns\0e\0", "has a zero byte in line 2. Convert it to a text file in UTF-8"),
        (
            "keys",
            "",
            "\nKEY_1=secret-1\nKEY_2=secret-2=\n",
            "has NAME=value in each line. Write the values alone",
        ),
        ("keys", "", "\"secret-1\"\n'secret-2'\n", "has quotes around each value. Write the values alone"),
        ("missing", "", None, "No such file"),
    ],
)
def test_a_file_that_is_not_valid_is_not_quoted(
    tmp_path: Path, name: str, column: str, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(OptionError, match=said) as raised:
        read(tmp_path / name, column)
    assert "secret-" not in str(raised.value)


def test_half_of_a_character_is_in_no_row(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('["one\\ud800", "two"]')
    _, two = read(tmp_path / "keys.json").digests
    assert len(read(tmp_path / "keys.json")) == 2
    assert two


def test_values_have_the_form_that_their_columns_store(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{UUID.hex.upper()}\nnot a uuid\n")
    values = read(path, fields=(ByInteger._meta.get_field("as_uuid"),))
    assert values.digests[0] == digest_of(str(UUID), values.salt)
    # Whatever the second value is, no column has it.
    assert len(values) == 2

    path.write_text("secret\n")
    assert_has(read(path, fields=(ByInteger._meta.get_field("as_custom"),)), "<terces")
    path.write_text("\\x0a0b\nCgs=\n")
    values = read(path, fields=(ByInteger._meta.get_field("as_bytes"),))
    assert [values.digests.count(digest_of(b"\n\x0b", values.salt)), values.forms] == [2, 2]
    path.write_text("0a0b\n")
    values = read(path, fields=(ByInteger._meta.get_field("as_bytes"),))
    # The digits are base64, too.
    assert set(values.digests) == {digest_of(each, values.salt) for each in (b"\n\x0b", b"\xd1\xad\x1b")}
    path.write_text("0042\n")
    assert_has(read(path, fields=(ByInteger._meta.get_field("as_integer"),)), "42")


def test_values_in_a_form_that_no_column_stores_are_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\nsecret too\n")
    fields = tuple(each for each in ByInteger._meta.concrete_fields if each.name in ("as_uuid", "as_bytes"))
    with pytest.raises(OptionError) as refused:
        read(tmp_path / "keys", fields=fields)
    assert str(refused.value) == (
        f"The file {tmp_path / 'keys'} has no value in a form that shop.ByInteger.as_uuid (UUIDField) or "
        "shop.ByInteger.as_bytes (BinaryField) can store. Write each value as the application shows it, and "
        "those of binary fields as hexadecimal digits or base64."
    )


def test_a_value_has_a_digest_for_each_kind_of_field(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{UUID}\nsecret\n")
    chosen = ("as_char", "as_text", "as_uuid", "as_custom")
    fields = tuple(field for field in ByInteger._meta.concrete_fields if field.name in chosen)
    values = read(tmp_path / "keys", fields=fields)
    assert (len(values), values.forms) == (2, 4)
    assert digest_of("secret", values.salt) in values.digests[4:]
    assert digest_of("<terces", values.salt) in values.digests[4:]


def test_a_field_that_stores_values_differently_each_time_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    with pytest.raises(TargetError, match="stores the same value differently each time"):
        read(tmp_path / "keys", fields=(Client._meta.get_field("encrypted"),))


def test_lines_are_named_in_ranges() -> None:
    values = LeakedValues()
    for number in range(10):
        values.add([str(number).encode()])
    assert values.lines(found=False, most=9) == ["1-10"]
    for position in (0, 3, 4, 9):
        values.mark(position)
    assert values.found == 4
    assert values.lines(found=True, most=9) == ["1", "4-5", "10"]
    assert values.lines(found=False, most=9) == ["2-3", "6-9"]
    assert values.lines(found=False, most=1) == ["2-3"]


def test_the_message_of_a_json_error_is_not_chained(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(json.dumps(["secret-1"])[:-1])
    with pytest.raises(OptionError) as raised:
        read(tmp_path / "keys")
    assert raised.value.__suppress_context__
