"""The chart of a rotation as SVG paths: rows/s over time, latency, and the times in which it was held."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from rotator.progress.text import count, duration, moment, rate

POINTS: Final = 180
_HEIGHT: Final = 100
_STEPS: Final = (1, 2, 5, 10)
_LABEL_PART: Final = 12.0
_PERCENT: Final = 100
_MILLISECONDS: Final = 1000
_DAY_SECONDS: Final = 86_400


class Point(NamedTuple):
    """The figures of one part of the time; None where nothing was measured.

    Attributes:
        at: The number of the part, from 0.
        rows_per_second: The rate.
        commit_seconds: The time of a small commit.
        baseline_seconds: The same without the rotation.
    """

    at: int
    rows_per_second: float | None
    commit_seconds: float | None
    baseline_seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A time in which something held the rotation.

    Attributes:
        names: The names of what held it.
        began_at: Its start.
        ended_at: Its end, or the latest measurement of one that lasts.
    """

    names: str
    began_at: datetime
    ended_at: datetime

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.ended_at - self.began_at).total_seconds()


def draw(
    points: Sequence[Point], held: Sequence[Held], *, began_at: datetime, ended_at: datetime
) -> dict[str, object]:
    """Return the parts of the chart as JSON types; without points, an empty chart.

    Args:
        points: The figures, at most ``POINTS``.
        held: The times in which the rotation was held.
        began_at: The time of the left edge.
        ended_at: The time of the right edge.
    """
    rates = {point.at: point.rows_per_second for point in points}
    commits = {point.at: point.commit_seconds for point in points}
    baselines = {point.at: point.baseline_seconds for point in points}
    rows_top = _top(rates)
    latency_top = _top({at: _larger(commits[at], baselines[at]) for at in commits})
    seconds = max((ended_at - began_at).total_seconds(), 1.0)
    following = [*(_part(each.began_at, began_at, seconds) for each in held[1:]), _PERCENT]
    bands = [_band(each, began_at, seconds, end) for each, end in zip(held, following, strict=False)]
    return {
        "rows": _path(rates, rows_top),
        "area": _area(rates, rows_top),
        "rows_top": f"{count(round(rows_top))} rows/s" if rows_top >= 1 else "",
        "commits": _path(commits, latency_top),
        "baseline": _path(baselines, latency_top),
        "latency_top": f"{latency_top * _MILLISECONDS:g} ms" if latency_top else "",
        "bands": bands,
        "times": [_time(began_at + timedelta(seconds=seconds * part / 2), seconds) for part in range(3)],
        "summary": _summary(rates, held, began_at, ended_at),
    }


def _larger(one: float | None, other: float | None) -> float | None:
    return max((each for each in (one, other) if each is not None), default=None)


def _top(values: dict[int, float | None]) -> float:
    """Return the end of an axis: the next of 1, 2, 5, 10, 20, … of the unit."""
    highest = max((value for value in values.values() if value is not None), default=0.0)
    if highest <= 0:
        return 0.0
    unit = 10.0 ** len(str(int(highest))) / 10 if highest >= 1 else 0.0001
    while unit * 10 < highest:
        unit *= 10
    return next((step * unit for step in _STEPS if step * unit >= highest), 10 * unit)


def _path(values: dict[int, float | None], top: float) -> str:
    return " ".join("M" + " L".join(run) for run in _runs(values, top))


def _area(values: dict[int, float | None], top: float) -> str:
    parts = []
    for run in _runs(values, top):
        first, last = run[0].split(",")[0], run[-1].split(",")[0]
        parts.append(f"M{first},{_HEIGHT} L{' L'.join(run)} L{last},{_HEIGHT} Z")
    return " ".join(parts)


def _runs(values: dict[int, float | None], top: float) -> list[list[str]]:
    """Return the coordinates of each part of a line without a gap."""
    runs = list[list[str]]()
    last: int | None = None
    if not top:
        return runs
    # A short rotation has fewer measurements than the chart has points.
    known = [at for at, value in values.items() if value is not None]
    near = max(2, 2 * POINTS // max(len(values), 1))
    for at in known:
        value = values[at] or 0.0
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
    """Return one band.

    Args:
        held: The time in which the rotation was held.
        began_at: The time of the left edge.
        seconds: The time of the whole chart.
        following: The place at which the next band begins, in percent.
    """
    start = _part(held.began_at, began_at, seconds)
    width = min(_PERCENT - start, max(0.3, held.seconds / seconds * _PERCENT))
    return {
        "x": f"{start:.2f}%",
        "width": f"{width:.2f}%",
        # A longer label would cover the next band.
        "label": held.names if following - start >= _LABEL_PART else "",
        "text": f"{moment(held.began_at)}, for {duration(held.seconds)}: {held.names}",
    }


def _time(at: datetime, seconds: float) -> str:
    text = moment(at)
    return text[11:19] if seconds < _DAY_SECONDS else text[5:16]


def _summary(
    rates: dict[int, float | None], held: Sequence[Held], began_at: datetime, ended_at: datetime
) -> str:
    known = [value for value in rates.values() if value is not None]
    if not known:
        return "Nothing was measured yet."
    spoken = f"Rows per second from {moment(began_at)} to {moment(ended_at)}: "
    spoken += f"{rate(known[-1])} at the end, {rate(max(known))} at most."
    return f"{spoken} Held {count(len(held))} time{'s' * (len(held) != 1)}." if held else spoken
