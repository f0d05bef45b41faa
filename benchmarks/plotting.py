"""Pictures of what the benchmarks found; matplotlib comes with the extra ``benchmark``."""

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

_WIDTH_INCHES: Final = 9.0
_BAR_INCHES: Final = 0.32


def picture(text: str) -> Path:
    """Read an option's file, before anything is measured.

    Raises:
        ArgumentTypeError: It cannot be written, or nothing is there to draw with.
    """
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("drawing takes matplotlib: pip install -e '.[project,benchmark]'")
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"'{path.parent}' is no folder")
    return path


def bars(file: Path, rates: Mapping[str, float], *, title: str, ours: str) -> None:
    """Draw rows a second as bars on a logarithmic scale, the fastest on top."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, which only pictures need

    ordered = sorted(rates.items(), key=lambda found: found[1])
    figure = Figure(figsize=(_WIDTH_INCHES, 1.2 + _BAR_INCHES * len(ordered)), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:red" if name == ours else "tab:blue" for name, _ in ordered]
    drawn = axes.barh([name for name, _ in ordered], [rate for _, rate in ordered], color=colours)
    axes.bar_label(drawn, labels=[f"{rate:,.0f}" for _, rate in ordered], padding=3)
    axes.set(xscale="log", xlabel="rows a second", title=title)
    axes.margins(x=0.2)
    figure.savefig(file)


def lines_and_heat(
    file: Path,
    rates: Mapping[int, Sequence[float]],
    *,
    concurrencies: Sequence[int],
    title: str,
) -> None:
    """Draw rows a second by concurrency, a line for each batch, and beside it the same as a heat map.

    Args:
        file: Where to.
        rates: For each batch, the rates in the order of the concurrencies.
        concurrencies: What was tried.
        title: Above both.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, which only pictures need

    figure = Figure(figsize=(1.5 * _WIDTH_INCHES, 0.6 * _WIDTH_INCHES), layout="constrained")
    left, right = figure.subplots(1, 2)
    for batch, found in rates.items():
        left.plot(concurrencies, found, marker="o", label=f"--batch {batch:,}")
    left.set(xlabel="--concurrency", ylabel="rows a second", ylim=(0, None), xticks=list(concurrencies))
    left.legend()
    image = right.imshow(list(rates.values()), aspect="auto", cmap="viridis")
    right.set(
        xlabel="--concurrency",
        ylabel="--batch",
        xticks=range(len(concurrencies)),
        xticklabels=[str(concurrency) for concurrency in concurrencies],
        yticks=range(len(rates)),
        yticklabels=[f"{batch:,}" for batch in rates],
    )
    for row, found in enumerate(rates.values()):
        for column, rate in enumerate(found):
            right.text(column, row, f"{rate / 1000:,.0f}k", ha="center", va="center", color="white")
    figure.colorbar(image, ax=right, label="rows a second")
    figure.suptitle(title)
    figure.savefig(file)


def timeline(
    file: Path, latencies: Sequence[tuple[float, float]], workers: Sequence[tuple[float, int]], *, title: str
) -> None:
    """Draw the application's latencies over time, with each change of the pace.

    Args:
        file: Where to.
        latencies: When each transaction ended, and its latency in ms.
        workers: When the number of workers changed, and to which.
        title: Above it.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, which only pictures need

    start = min(at for at, _ in [*latencies, *workers])
    figure = Figure(figsize=(_WIDTH_INCHES, 0.5 * _WIDTH_INCHES), layout="constrained")
    axes = figure.subplots()
    axes.plot([at - start for at, _ in latencies], [latency for _, latency in latencies], ".", markersize=2)
    for at, number in workers:
        axes.axvline(at - start, color="tab:red", linewidth=0.5)
        axes.annotate(str(number), (at - start, 1.0), xycoords=("data", "axes fraction"), color="tab:red")
    axes.set(xlabel="seconds", ylabel="latency in ms", yscale="log", title=title)
    figure.savefig(file)
