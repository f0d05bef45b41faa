"""The chart of a rotation as SVG paths: rows/s over time, latency, and the times in which it was held."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from rotator.progress.text import count, duration, moment, rate

POINTS: Final = 180
_HEIGHT: Final = 100
_STEPS: Final = (1, 2, 5, 10)
_SMALLEST_UNIT: Final = 0.0001
_LABEL_PART: Final = 12.0
_PERCENT: Final = 100
_MILLISECONDS: Final = 1000
_DAY_SECONDS: Final = 86_400


class Point(NamedTuple):
    """The figures of one part of the time, numbered from 0; None where nothing was measured."""

    at: int
    rows_per_second: float | None
    commit_seconds: float | None
    baseline_seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A time in which something held the rotation; one that lasts ends at the latest measurement."""

    names: str
    began_at: datetime
    ended_at: datetime


def draw(
    points: Sequence[Point], held: Sequence[Held], *, began_at: datetime, ended_at: datetime
) -> dict[str, object]:
    """Return the chart between two times as JSON types; without points, an empty one."""
    rates = {each.at: each.rows_per_second for each in points if each.rows_per_second is not None}
    commits = {each.at: each.commit_seconds for each in points if each.commit_seconds is not None}
    baselines = {each.at: each.baseline_seconds for each in points if each.baseline_seconds is not None}
    rows_top, latency_top = _top(rates.values()), _top([*commits.values(), *baselines.values()])
    # A short rotation has fewer measurements than the chart has points.
    near = max(2, 2 * POINTS // max(len(points), 1))
    rows = _runs(rates, rows_top, near)
    seconds = max((ended_at - began_at).total_seconds(), 1.0)
    following = [*(_part(each.began_at, began_at, seconds) for each in held[1:]), _PERCENT]
    bands = [_band(each, began_at, seconds, end) for each, end in zip(held, following, strict=False)]
    return {
        "rows": _path(rows),
        "area": _area(rows),
        "rows_top": f"{count(round(rows_top))} rows/s" if rows_top >= 1 else "",
        "commits": _path(_runs(commits, latency_top, near)),
        "baseline": _path(_runs(baselines, latency_top, near)),
        "latency_top": f"{latency_top * _MILLISECONDS:g} ms" if latency_top else "",
        "bands": bands,
        "times": [_time(began_at + timedelta(seconds=seconds * part / 2), seconds) for part in range(3)],
        "summary": _summary(rates, held, began_at, ended_at),
    }


def _top(values: Iterable[float]) -> float:
    """Return the end of an axis: the next of 1, 2, 5, 10, 20, … of the unit."""
    highest = max(values, default=0.0)
    if highest <= 0:
        return 0.0
    unit = max(_SMALLEST_UNIT, 10.0 ** math.floor(math.log10(highest)))
    return next((step * unit for step in _STEPS if step * unit >= highest), 10 * unit)


def _path(runs: list[list[str]]) -> str:
    return " ".join("M" + " L".join(run) for run in runs)


def _area(runs: list[list[str]]) -> str:
    parts = []
    for run in runs:
        first, last = run[0].split(",")[0], run[-1].split(",")[0]
        parts.append(f"M{first},{_HEIGHT} L{' L'.join(run)} L{last},{_HEIGHT} Z")
    return " ".join(parts)


def _runs(values: Mapping[int, float], top: float, near: int) -> list[list[str]]:
    """Return the coordinates of each part of a line without a gap, i.e. of points that are near enough."""
    runs = list[list[str]]()
    if not top:
        return runs
    last: int | None = None
    for at, value in values.items():
        if last is None or at - last > near:
            runs.append([])
        runs[-1].append(f"{at},{_HEIGHT * (1 - value / top):.1f}")
        last = at
    for run in runs:
        if len(run) == 1:
            left, height = run[0].split(",")
            run.append(f"{int(left) + 1},{height}")
    return runs


def _part(at: datetime, began_at: datetime, seconds: float) -> float:
    return max(0.0, (at - began_at).total_seconds() / seconds * _PERCENT)


def _band(held: Held, began_at: datetime, seconds: float, following: float) -> dict[str, str]:
    """Return one band of a chart of so many seconds; the next band begins at ``following`` percent."""
    start = _part(held.began_at, began_at, seconds)
    held_seconds = (held.ended_at - held.began_at).total_seconds()
    width = min(_PERCENT - start, max(0.3, held_seconds / seconds * _PERCENT))
    return {
        "x": f"{start:.2f}%",
        "width": f"{width:.2f}%",
        # A longer label would cover the next band.
        "label": held.names if following - start >= _LABEL_PART else "",
        "text": f"{moment(held.began_at)}, for {duration(held_seconds)}: {held.names}",
    }


def _time(at: datetime, seconds: float) -> str:
    text = moment(at)
    return text[11:19] if seconds < _DAY_SECONDS else text[5:16]


def _summary(rates: Mapping[int, float], held: Sequence[Held], began_at: datetime, ended_at: datetime) -> str:
    if not rates:
        return "Nothing was measured yet."
    known = list(rates.values())
    spoken = f"Rows per second from {moment(began_at)} to {moment(ended_at)}: "
    spoken += f"{rate(known[-1])} at the end, {rate(max(known))} at most."
    return f"{spoken} Held {count(len(held))} time{'s' * (len(held) != 1)}." if held else spoken
