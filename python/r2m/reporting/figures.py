"""Pictures of a merge, each with the numbers behind it. On a page they are SVG, beside it PNG and CSV."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Readable on white and on black alike: the page has both, and a picture one colour of text.
_GREY = "#7a7a7a"
_STYLE = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), _GREY),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), _GREY),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "legend.framealpha": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "r2m",  # equal pictures have equal bytes
}
# Told apart by people who see no red or no green (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
_SHORT = 22  # letters of a name
Rows = Sequence[Mapping[str, Any]]
Points = Iterable[tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        name: of its files.
        title: what it is.
        text: how to read it, in a sentence or two.
        rows: the numbers, one mapping per line of a table.
        svg, png: the picture.
    """

    name: str
    title: str
    text: str
    rows: Rows
    svg: str
    png: bytes


def picture(
    name: str, title: str, text: str, rows: Rows, draw: Callable[[Axes], None], size: tuple[float, float] = (7.0, 3.4)
) -> Picture:
    """Draw one; ``draw`` gets the axes."""
    with rc_context(cast(Any, _STYLE)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    markup = svg.getvalue()
    markup = markup[markup.index("<svg") :]
    # Several pictures share a page: names inside one must not be those inside another.
    markup = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", markup)
    return Picture(name, title, text, rows, markup, png.getvalue())


def colour(index: int) -> str:
    """Of a series."""
    return _COLOURS[index % len(_COLOURS)]


def bars(axes: Axes, names: Sequence[str], series: Mapping[str, Sequence[float]], label: str) -> None:
    """Groups of bars: a group for each name, a bar in it for each series."""
    width = 0.8 / len(series)
    for number, (title, values) in enumerate(series.items()):
        middles = [index + (number - (len(series) - 1) / 2) * width for index in range(len(names))]
        axes.bar(middles, values, width, label=title, color=colour(number))
    axes.set_xticks(range(len(names)), [short(name) for name in names])
    axes.axhline(0, color=_GREY, linewidth=0.8)
    finish(axes, "", label, legend=len(series) > 1)


def curves(axes: Axes, series: Mapping[str, Points], x: str, y: str, style: str = "-", *, limit: int = _SHORT) -> None:
    """A line for each series through its points (x, y)."""
    for index, (title, points) in enumerate(series.items()):
        axes.plot(*zip(*points, strict=True), style, label=short(title, limit), color=colour(index))
    finish(axes, x, y)


def finish(axes: Axes, x: str, y: str, *, legend: bool = True) -> None:
    """What the axes are, and the legend above the picture, where it hides nothing."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)


def heatmap(
    axes: Axes, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], low: float
) -> None:
    """A matrix with its numbers, from ``low`` to 1, written in it."""
    axes.imshow(np.array(values, dtype=float), vmin=low, vmax=1.0, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), [short(name) for name in columns], rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [short(name) for name in rows])
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = "–" if value is None else f"{value:.2f}"
            light = value is not None and value < (low + 1.0) / 2
            axes.text(j, i, text, ha="center", va="center", color="white" if light else "black")
    axes.spines[:].set_visible(False)


def short(name: str, limit: int = _SHORT) -> str:
    """A name that fits below a bar: its end, which tells paths apart. No markup of matplotlib's."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name).replace("$", r"\$")
    return plain if len(plain) <= limit else "…" + plain[-limit + 1 :]
