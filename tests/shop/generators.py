"""What the tests name with --generator, good and bad."""

import asyncio
import hashlib
import secrets
import time
import uuid
from typing import NoReturn

from django.db.models import Model
from django.utils.crypto import get_random_string
from django.utils.functional import lazystr


def token() -> str:
    return secrets.token_urlsafe(16)


def short() -> str:
    return secrets.token_hex(8)


def letters() -> str:
    return get_random_string(32)


def number() -> int:
    return secrets.randbelow(2**31)


def big_number() -> int:
    return secrets.randbelow(2**63)


def blob() -> bytes:
    return secrets.token_bytes(24)


def key_file() -> bytes:
    """A value whose beginning says nothing."""
    return b"-----BEGIN PRIVATE KEY-----\n" * 3 + blob()


def token_and_checksum() -> dict[str, str]:
    new_values = token()
    return {"token": new_values, "checksum": hashlib.sha256(new_values.encode()).hexdigest()}


def named_after(order: Model) -> str:
    """A value that shows for which row it was made."""
    return f"{order.pk}-{secrets.token_hex(8)}"


def uuid_for_row(_row: Model) -> uuid.UUID:
    """A value that takes its row, and needs nothing of it."""
    return uuid.uuid4()


def uuid_for_namesake(row: Model) -> uuid.UUID:
    """A value that is made only if the row has its own values."""
    if vars(row)["rotator_key"] != 3 or vars(row)["rotator_place"] != 5:
        raise ValueError
    return uuid.uuid4()


def token_for_row(_row: Model) -> str:
    return token()


def token_and_digit() -> dict[str, str]:
    return {"token": token(), "checksum": digit()}


def two_keys_for_row(_row: Model) -> dict[str, str]:
    return two_keys()


def digit() -> str:
    """One of a few values, so that a row often gets the one that it has."""
    return str(secrets.randbelow(5))


def digit_for_row(_row: Model) -> str:
    return digit()


def hashed() -> dict[str, str]:
    return {"secret": hashlib.sha256(token().encode()).hexdigest()}


def constant() -> str:
    return "the same for everybody"


def none() -> None:
    return None


def too_long() -> str:
    return "x" * 1000


def raising() -> NoReturn:
    raise RuntimeError(secrets.token_hex())


def none_for_row(_row: Model) -> None:
    return None


def constant_for_row(_row: Model) -> str:
    return constant()


def wrong_mapping(_row: Model) -> dict[str, str]:
    return {"nothing": token()}


def empty() -> str:
    return ""


def half_of_a_character() -> str:
    return token() + "\ud800"


def in_memory() -> memoryview:
    return memoryview(blob())


def pair() -> tuple[str, str]:
    return token(), token()


def pair_for_row(_row: Model) -> tuple[str, str]:
    return pair()


def in_list() -> list[str]:
    return [token()]


def in_set() -> set[str]:
    return {token()}


def no_text() -> object:
    return object()


def in_mapping() -> dict[str, dict[str, str]]:
    return {"api_key": {"key": token()}}


def lazy_text() -> object:
    return lazystr(token())


def few_bytes() -> bytes:
    return secrets.token_bytes(8)


def exiting() -> str:
    raise SystemExit(token())


def cancelling() -> str:
    raise asyncio.CancelledError(token())


def slow() -> str:
    """As slow as a hash for passwords, on the scale of a test."""
    time.sleep(0.004)
    return token()


def slow_for_row(_row: Model) -> str:
    return slow()


def two(first: str, second: str) -> str:
    return first + second


async def coroutine() -> str:
    return token()


class Later:
    """Good for a while, which is how generators fail that a trial cannot find out."""

    new_values = 0

    def __call__(self) -> str:
        type(self).new_values += 1
        return token() if self.new_values < 25 else "x" * 1000


later = Later()


def two_keys() -> dict[str, str]:
    return {"api_key": token(), "webhook_secret": token()}


def named_after_hash(row: Model) -> str:
    """The same, in no more letters for any key."""
    return hashlib.sha256(str(row.pk).encode()).hexdigest()[:16] + secrets.token_hex(8)


class LateUuid:
    """Good for a thousand, in each process."""

    new_values = 0

    def __call__(self) -> uuid.UUID | None:
        type(self).new_values += 1
        return uuid.uuid4() if self.new_values < 1000 else None


late_uuid = LateUuid()


def bits() -> str:
    return f"{secrets.randbits(128):0128b}"


def bits_for_row(_row: Model) -> str:
    return bits()


def large_number() -> str:
    return f"{secrets.randbelow(10**9) + 100}.125"


def large_number_for_row(_row: Model) -> str:
    return large_number()


def uuid_text() -> str:
    return str(uuid.uuid4())


def uuid_text_for_row(_row: Model) -> str:
    return uuid_text()
