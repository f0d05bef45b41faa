"""Reads a list of leaked values, and makes the digests of the forms in which the columns store them."""

import csv
import io
import json
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from django.db import connections
from django.db.models import BinaryField, CharField, TextField, UUIDField

from rotator.exceptions import OptionError, TargetError
from rotator.fields.derivation import stores_randomly
from rotator.fields.model import AnyField, field_label
from rotator.postgres.leaked import LeakedValues

STANDARD_INPUT: Final = "-"
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
# The names that GitHub's secret scanning uses, to partners and in its API.
_JSON_KEYS: Final = ("token", "secret")
_HEX_PREFIX: Final = "\\x"
# What surrounds the value in each line of some files: none of these values would be found.
_DECORATIONS: Final = {
    "quotes around each value": re.compile(rb"""(["']).*\1"""),
    "NAME=value in each line": re.compile(rb"[A-Za-z_]\w*=[^=].*"),
}
_UUID: Final = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_ToBytes: TypeAlias = Callable[[bytes], bytes | None]
"""Returns the stored form of a value in UTF-8; None where the column cannot store it."""


def read_leaked(path: str, column: str, fields: Sequence[AnyField], database: str) -> LeakedValues:
    """Read a list of leaked values, which are compared with these fields.

    The path is that of a file, or ``-`` for the standard input. The column is that of a CSV file; it is empty
    for a file with one value in each line, or with the JSON of GitHub's secret scanning.

    Raises:
        OptionError: The file cannot be read, or has no values. No message contains a part of it.
        TargetError: A field stores the same value differently each time.
    """
    of_types = {type(each): each for each in fields}
    forms = [_to_bytes(each, database) for each in of_types.values()]
    # Hexadecimal digits can be base64, too, so each value has both forms.
    forms += [
        partial(_stored, each, database, _from_hex)
        for each in of_types.values()
        if isinstance(each, BinaryField)
    ]
    # The first line of a CSV file has the names of its columns.
    values, is_storable = LeakedValues(first=2 if column else 1, forms=len(forms)), False
    with _opened(path) as stream:
        for value in _read(stream, path, column):
            if value:
                stored = [form(value) for form in forms]
                is_storable = is_storable or any(each is not None for each in stored)
                values.add(stored)
            else:
                values.skip()
    if not len(values):
        raise OptionError(f"{_named(path)} has no values.")
    if not is_storable:
        labels = " or ".join(f"{field_label(each)} ({type(each).__name__})" for each in fields)
        raise OptionError(
            f"{_named(path)} has no value in a form that {labels} can store. Write each value as the "
            "application shows it, and those of binary fields as hexadecimal digits or base64."
        )
    return values


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    try:
        with Path(path).open("rb") as stream:
            yield stream
    except OSError as error:
        raise OptionError(f"Cannot read the leaked values from {path}: {error.strerror}.") from error


def _named(path: str) -> str:
    return "The standard input" if path == STANDARD_INPUT else f"The file {path}"


def _read(stream: BinaryIO, path: str, column: str) -> Iterator[bytes]:
    """Return the values of a file; a blank one for a line without a value."""
    if column:
        return _read_csv(stream, path, column)
    if stream.peek(1).lstrip()[:1] in (b"[", b"{"):  # type: ignore[attr-defined] # buffered
        return _read_json(stream, path)
    if path.lower().endswith(".csv"):
        raise OptionError(f"{path} is a CSV file. Name the column with the values with --leaked-column.")
    return _read_lines(stream, path)


def _read_lines(stream: BinaryIO, path: str) -> Iterator[bytes]:
    first, decorations, is_empty = next(stream, b""), list(_DECORATIONS), True
    for number, line in enumerate(chain([first.removeprefix(_BYTE_ORDER_MARK)], stream), 1):
        # No text of the server has one. In UTF-16, every character of a token does.
        if b"\0" in line:
            raise OptionError(
                f"{_named(path)} has a zero byte in line {number}. Convert it to a text file in UTF-8."
            )
        if value := line.strip():
            is_empty = False
            decorations = [each for each in decorations if _DECORATIONS[each].fullmatch(value)]
        yield value
    if decorations and not is_empty:
        raise OptionError(f"{_named(path)} has {decorations[0]}. Write the values alone, one in each line.")


def _read_csv(stream: BinaryIO, path: str, column: str) -> Iterator[bytes]:
    # Not closed with the wrapper, because the standard input stays open.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
    rows = csv.reader(text)
    try:
        header = next(rows, [])
        # The first line is not repeated: without a header, it has values.
        if column not in header:
            raise OptionError(f"{_named(path)} has no column '{column}' in its first line.")
        at = header.index(column)
        for row in rows:
            yield row[at].strip().encode() if at < len(row) else b""
    except csv.Error:
        raise OptionError(f"{_named(path)} is not a CSV file from line {rows.line_num}.") from None
    finally:
        text.detach()


def _read_json(stream: BinaryIO, path: str) -> Iterator[bytes]:
    try:
        found = json.load(stream)
    except (ValueError, RecursionError):
        raise OptionError(f"{_named(path)} begins like JSON, but is not valid JSON.") from None
    for entry in found if isinstance(found, list) else [found]:
        value = entry
        if isinstance(entry, dict):
            value = next((entry[key] for key in _JSON_KEYS if key in entry), None)
        if not isinstance(value, str):
            raise OptionError(
                f"{_named(path)} is not a list of strings, or of objects with a key "
                f"{' or '.join(_JSON_KEYS)}."
            )
        # Half of a character, as "\\ud800", is in no row.
        yield value.strip().encode(errors="surrogatepass")


def _to_bytes(field: AnyField, database: str) -> _ToBytes:
    if type(field) in (CharField, TextField):
        return lambda value: value
    if stores_randomly(field, database):
        raise TargetError(
            f"{field_label(field)} is a {type(field).__name__}, which stores the same value differently each "
            "time, so --leaked cannot find its rows. Rotate all of them."
        )
    convert = partial(_stored, field, database, field.to_python)
    if type(field) is UUIDField:
        # Most files have UUIDs in this form, and converting them by the field takes five times as long.
        return lambda value: value if _UUID.fullmatch(value) else convert(value)
    return convert


def _from_hex(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix(_HEX_PREFIX))


def _stored(field: AnyField, database: str, read: Callable[[str], object], value: bytes) -> bytes | None:
    """Return the bytes that the server's digest is made from."""
    try:
        prepared = field.get_db_prep_save(read(value.decode(errors="replace")), connections[database])
    except Exception:  # noqa: BLE001 - any error of a custom field
        return None
    # The driver's wrapper of binary values.
    prepared = getattr(prepared, "obj", prepared)
    if isinstance(prepared, bytes | bytearray | memoryview):
        return bytes(prepared)
    return str(prepared).encode() if isinstance(prepared, str | int | uuid.UUID) else None
