"""What can happen to a table while its secret is rotated, as strategies that Hypothesis draws from."""

from dataclasses import dataclass
from datetime import date, datetime
from enum import Enum, auto
from functools import partial
from typing import Final, TypeAlias, TypeVar

from hypothesis import strategies as st

_T = TypeVar("_T")

Key: TypeAlias = tuple[str, ...]
"""A row's key: for each column a text that the server reads as the column's type."""

PARTITIONS: Final = 3
_MOST_ROWS: Final = 50
_MOST_BATCH: Final = 20
_LENGTH: Final = 8

# All that a text of the server may hold.
_letters = st.characters(exclude_characters="\x00", exclude_categories=["Cs"])
_texts = st.text(_letters, max_size=_LENGTH) | st.text("aÄz _-%\"'\\", max_size=_LENGTH)
_zones = st.sampled_from(["", "Z", "+05:30", "-11:00"])


def _is_in_any_year(day: date) -> bool:
    """Whether there is this day in each year BC."""
    return (day.month, day.day) != (2, 29)


# The server's begin in 4714 BC.
_dates = st.dates(max_value=date(4000, 1, 1)).filter(_is_in_any_year).map(date.isoformat)
_moments = (
    st.datetimes(max_value=datetime(4000, 1, 1))  # noqa: DTZ001 - zones come later
    .filter(_is_in_any_year)
    .map(datetime.isoformat)
)
_infinite = st.sampled_from(["infinity", "-infinity"])


def _integers(bits: int) -> st.SearchStrategy[str]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).map(str)


KEY_TYPES: Final[dict[str, st.SearchStrategy[str]]] = {
    "smallint": _integers(16),
    "integer": _integers(32) | st.integers(-50, 50).map(str),
    "bigint": _integers(64),
    "uuid": st.uuids().map(str),
    "text": _texts,
    'text COLLATE "C"': _texts,
    'text COLLATE "en_US"': _texts,
    f"varchar({_LENGTH})": _texts,
    f"char({_LENGTH})": _texts,
    "date": _dates | _dates.map("{} BC".format) | _infinite,
    "timestamp": _moments | _moments.map("{} BC".format) | _infinite,
    "timestamptz": st.tuples(_moments, _zones, st.sampled_from(["", " BC"])).map("".join) | _infinite,
    "numeric": st.decimals(-(10**20), 10**20, places=5).map(str)
    | st.sampled_from(["NaN", "Infinity", "-Infinity", "1.0", "1.00", "-0", "1e-30", "1e30"]),
    "float8": st.floats().map(repr),
    "bytea": st.binary(max_size=_LENGTH).map(lambda value: f"\\x{value.hex()}"),
    "boolean": st.booleans().map(str),
    "inet": st.ip_addresses().map(str) | st.ip_addresses(v=4).map("{}/8".format),
    "interval": st.tuples(st.integers(-99, 99), st.integers(-99, 99), st.integers(-(10**6), 10**6)).map(
        lambda parts: "{} months {} days {} seconds".format(*parts)
    )
    | st.integers(1, 3).flatmap(lambda i: st.sampled_from([f"{i} months", f"{i * 30} days"])),
}
"""The types of the key's columns, with the values of each."""

VALUE_TYPES: Final = ("uuid", "text", "varchar(60)")


class Kind(Enum):
    """What another session does."""

    INSERT = auto()
    DELETE = auto()
    MOVE = auto()
    SAVE_STALE = auto()
    SAVE_FRESH = auto()
    TOUCH = auto()
    TRUNCATE = auto()
    TRUNCATE_LEAF = auto()
    REWRITE = auto()
    REPLACE = auto()
    VACUUM_FULL = auto()
    VACUUM_FREEZE = auto()
    DETACH = auto()
    DROP_LEAF = auto()
    ATTACH = auto()


CHANGES: Final = (
    Kind.INSERT,
    Kind.DELETE,
    Kind.MOVE,
    Kind.MOVE,
    Kind.SAVE_STALE,
    Kind.SAVE_STALE,
    Kind.SAVE_FRESH,
    Kind.TOUCH,
)
"""Those that change rows, and so may be part of a transaction of several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """One thing that another session does.

    Attributes:
        kind: The kind of it.
        modulus: The rows concerned are those whose number has this remainder when it is divided by this.
        remainder: The remainder.
        keys: The keys that rows get.
        stale: Whether inserted rows have an old value.
        nested: Whether it is done in a subtransaction; of an attached table, whether its rows are inserted in
            the transaction that attaches it.
        leaf: The number of the partition.
    """

    kind: Kind
    modulus: int
    remainder: int
    keys: tuple[Key, ...]
    stale: bool
    nested: bool
    leaf: int


@dataclass(frozen=True, kw_only=True, slots=True)
class During:
    """An edit during a run.

    Attributes:
        at: The number of the run's event upon which it is done.
        edit: The edit.
        in_thread: Whether the run continues during the edit.
        open_seconds: How long its transaction stays open then.
    """

    at: int
    edit: Edit
    in_thread: bool
    open_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotate:
    """One run.

    Attributes:
        stop_after: The number of rows after which it stops; None for no limit.
        kill_after: The number of events after which its process is killed; None for a run that is not.
        lost_at: The number of the event upon which it loses its connections; None for none.
        during: The edits of other sessions during the run, unless it is killed.
        batch: The number of rows of a range.
        concurrency: The number of workers.
    """

    stop_after: int | None
    kill_after: int | None
    lost_at: int | None
    during: tuple[During, ...]
    batch: int
    concurrency: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Late:
    """A transaction that is open when the rotation starts.

    Attributes:
        before: What it does before the start.
        after: What it does after that.
        end_at: The number of the event, of all runs, upon which it ends.
        commits: Whether it commits.
    """

    before: tuple[Edit, ...]
    after: tuple[Edit, ...]
    end_at: int
    commits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A table and what happens to it.

    Attributes:
        key_types: The types of the key's columns.
        value_type: The type of the secret.
        nullable: Whether it may be NULL; then every fourth row's is.
        partitioning: "", "hash" or "range", by the key's first column.
        pivot: The key at which the partitions of ranges are divided.
        is_apart: Whether one of the partitions is detached at first.
        rows: The keys of the rows at first.
        from_rows: Whether each new value is made for its row.
        slice_rows: The number of rows that one parameter set carries.
        late: The transaction that is open when the rotation starts; None for none.
        steps: What happens, before the rotation is completed.
    """

    key_types: tuple[str, ...]
    value_type: str
    nullable: bool
    partitioning: str
    pivot: Key
    is_apart: bool
    rows: tuple[Key, ...]
    from_rows: bool
    slice_rows: int
    late: Late | None
    steps: tuple[Edit | Rotate, ...]


def _edits(keys: st.SearchStrategy[Key], kinds: tuple[Kind, ...]) -> st.SearchStrategy[Edit]:
    modulus = st.integers(1, 5)
    return modulus.flatmap(
        lambda modulus: st.builds(
            Edit,
            kind=st.sampled_from(kinds),
            modulus=st.just(modulus),
            remainder=st.integers(0, modulus - 1),
            keys=st.lists(keys, min_size=1, max_size=4).map(tuple),
            stale=st.booleans(),
            nested=st.booleans(),
            leaf=st.integers(0, PARTITIONS - 1),
        )
    )


def _some(of: st.SearchStrategy[_T], least: int, most: int) -> st.SearchStrategy[tuple[_T, ...]]:
    """So many of them, each number as often; Hypothesis' own lists are mostly short."""
    return st.integers(least, most).flatmap(lambda count: st.tuples(*[of] * count))


def _runs(edits: st.SearchStrategy[Edit]) -> st.SearchStrategy[Rotate]:
    during = st.builds(
        During,
        at=st.integers(1, 6),
        edit=edits,
        in_thread=st.booleans(),
        open_seconds=st.sampled_from([0, 0.01, 0.05]),
    )
    batch = st.integers(1, 5) | st.integers(1, _MOST_BATCH)
    common = partial(st.builds, Rotate, batch=batch, concurrency=st.integers(1, 3))
    never = st.none()
    run = common(
        stop_after=st.integers(1, _MOST_ROWS // 2) | st.integers(1, 6) | never,
        kill_after=never,
        lost_at=st.integers(0, 7).map(lambda chance: None if chance else 3),
        during=_some(during, 1, 5),
    )
    killed = common(stop_after=never, kill_after=st.integers(1, 8), lost_at=never, during=st.just(()))
    # A process takes longer than a run.
    return st.integers(0, 5).flatmap(lambda chance: run if chance else killed)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """A table and what happens to it."""
    key_types = draw(st.lists(st.sampled_from(sorted(KEY_TYPES)), min_size=1, max_size=2).map(tuple))
    keys = st.tuples(*(KEY_TYPES[key_type] for key_type in key_types))
    partitioning = draw(st.sampled_from(["", "hash", "range"]))
    kinds = tuple(Kind)
    if partitioning:
        # Where there are partitions, they come and go more often than tables.
        kinds = (*(kind for kind in Kind if kind is not Kind.REPLACE), Kind.ATTACH, Kind.ATTACH, Kind.DETACH)
    else:
        kinds = tuple(
            kind
            for kind in Kind
            if kind not in {Kind.DETACH, Kind.ATTACH, Kind.DROP_LEAF, Kind.TRUNCATE_LEAF}
        )
    # Rows change far more often than tables.
    edits = _edits(keys, CHANGES) | _edits(keys, kinds)
    changes = _some(_edits(keys, CHANGES), 0, 3)
    # Of these no range has to wait for a row's lock, and so the run for the transaction until its end.
    inserts = _some(_edits(keys, (Kind.INSERT,)), 1, 3)
    edited = _some(edits, 0, 3)
    rounds = _some(st.tuples(_runs(edits), edited), 1, 3)
    late = st.builds(
        Late,
        before=inserts | changes,
        after=inserts | changes,
        end_at=st.just(1000) | st.integers(1, 20),
        commits=st.integers(0, 3).map(bool),
    )
    steps: list[Edit | Rotate] = [*draw(edited)]
    for run, between in draw(rounds):
        steps += [run, *between]
    return Scenario(
        key_types=key_types,
        value_type=draw(st.sampled_from(VALUE_TYPES)),
        nullable=draw(st.booleans()),
        partitioning=partitioning,
        pivot=draw(keys),
        is_apart=draw(st.booleans()),
        rows=draw(_some(keys, 0, _MOST_ROWS)),
        from_rows=draw(st.booleans()),
        slice_rows=draw(st.sampled_from([1, 2, 5, 2000])),
        late=draw(late | st.none()),
        steps=tuple(steps),
    )
