"""Draws the figures of the benchmarks, for light and dark pages; needs the extra ``benchmark``."""

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

_WIDTH_INCHES: Final = 9.0
# On no background, this grey can be read on a white and on a dark page.
_GREY: Final = "#7d8590"
_OURS: Final = "#d1495b"
_LOOK: Final[dict[Any, object]] = {
    "svg.fonttype": "none",
    "savefig.transparent": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _GREY,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
}
_BAR_INCHES: Final = 0.32
# Below it, a fraction tells more than a decimal.
_SMALL_RATIO: Final = 0.1
# The part of the colour scale above which white text cannot be read.
_BRIGHT: Final = 0.7


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
    """Draw rows/s as bars, the fastest on top, each with its ratio to ours."""
    from matplotlib import rc_context  # noqa: PLC0415 - an extra, which only pictures need
    from matplotlib.figure import Figure  # noqa: PLC0415

    ordered = sorted(rates.items(), key=lambda found: found[1])
    with rc_context(_LOOK):
        figure = Figure(figsize=(_WIDTH_INCHES, 1.2 + _BAR_INCHES * len(ordered)), layout="constrained")
        axes = figure.subplots()
        colours = [_OURS if name == ours else _GREY for name, _ in ordered]
        drawn = axes.barh([name for name, _ in ordered], [rate for _, rate in ordered], color=colours)
        labels = [f"{rate:,.0f} ({_ratio(rate / rates[ours])})" for _, rate in ordered]
        axes.bar_label(drawn, labels=labels, padding=3)
        axes.set(xlabel="rows/s")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(_thousands)
        axes.margins(x=0.25)
        figure.suptitle(title)
        figure.savefig(file)


def _thousands(rate: float, _position: int | None = None) -> str:
    return f"{rate / 1000:,.0f}k"


def _ratio(ratio: float) -> str:
    return f"x{ratio:.2f}" if ratio >= _SMALL_RATIO else f"1/{1 / ratio:.0f}"


def lines_and_heat(
    file: Path,
    rates: Mapping[int, Sequence[float]],
    *,
    concurrencies: Sequence[int],
    title: str,
) -> None:
    """Draw rows/s by concurrency: a line for each batch, and a heat map.

    Args:
        file: The picture's file.
        rates: For each batch, the rates in the order of the concurrencies.
        concurrencies: The numbers of workers.
        title: The title above both.
    """
    from matplotlib import rc_context  # noqa: PLC0415 - an extra, which only pictures need
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context(_LOOK):
        figure = Figure(figsize=(1.5 * _WIDTH_INCHES, 0.6 * _WIDTH_INCHES), layout="constrained")
        left, right = figure.subplots(1, 2)
        for batch, found in rates.items():
            left.plot(concurrencies, found, marker="o", label=f"--batch {batch:,}")
        left.set(xlabel="--concurrency", ylabel="rows/s", ylim=(0, None), xticks=list(concurrencies))
        left.yaxis.set_major_formatter(_thousands)
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
                colour = "black" if image.norm(rate) > _BRIGHT else "white"
                right.text(column, row, _thousands(rate), ha="center", va="center", color=colour)
        figure.colorbar(image, ax=right, label="rows/s", format=_thousands)
        figure.suptitle(title)
        figure.savefig(file)
