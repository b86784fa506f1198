"""Pictures of a merge, each with the numbers behind it: SVG or a table on a page, beside it PNG, PDF and CSV.

A picture is drawn once. Its ink is black on paper and the page's own colour of text on the page, in light and in dark.
Panels have the width of a telephone and letters of 12 pixels there; wider pages have more of them in a row.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from r2m.reporting.matrix import Matrix
from r2m.shorten import shorten

# What is found again in an SVG, to become a colour of the page's style; on paper nearly black, and grey.
_INK, _FAINT = "#010203", "#7a7a7b"
_ON_PAGE = {_INK: "currentColor", _FAINT: "var(--faint)"}
_STYLE = {
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _FAINT),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(("font.size", "axes.labelsize", "legend.fontsize"), 9.0),  # 12 pixels
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9.0),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.titlelocation": "left",
    "xaxis.labellocation": "left",
    "axes.titlesize": 10.0,
    "font.family": ["DejaVu Sans"],
    "legend.frameon": False,
    "text.parse_math": False,  # names are names
    "svg.fonttype": "none",
    "svg.hashsalt": "r2m",  # equal pictures have equal bytes
    "pdf.fonttype": 42,  # TrueType: publishers take no other
}
# Told apart by people who see no red or no green, and at 3 : 1 at least on the page's white and on its black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#7f6fd6")
OTHERS = "#8a8a8a"
WIDTH = 3.55  # inches of a panel: 341 pixels
_IN_A_ROW = 4  # panels on paper
_LETTERS = 16  # of a name beside a bar
Rows = Sequence[Mapping[str, Any]]
Points = Iterable[tuple[float, float]]
Draw = Callable[[Axes], None]


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        name: of its files.
        title: what it is.
        text: how to read it, in a sentence or two.
        rows: the numbers, one mapping per line of a table.
        files: suffix → the picture as a file.
        panels: SVG of each part.
        matrix: what the page shows as a table, instead of panels.
    """

    name: str
    title: str
    text: str
    rows: Rows
    files: Mapping[str, bytes]
    panels: Sequence[str] = ()
    matrix: Matrix | None = field(default=None)


def picture(
    name: str, title: str, text: str, rows: Rows, panels: Sequence[Draw], size: tuple[float, float] = (WIDTH, 2.6)
) -> Picture:
    """Small multiples: one SVG for each panel, and all of them on one sheet.

    Args:
        name, title, text, rows: as :class:`Picture` has them.
        panels: each gets the axes it draws on.
        size: of a panel, in inches.
    """
    parts = []
    for number, draw in enumerate(panels):
        figure = _sheet([draw], size)
        parts.append(_svg(figure, name if len(panels) == 1 else f"{name}-{number}"))
    return Picture(name, title, text, rows, _files(_sheet(panels, size)), parts)


def matrix_picture(name: str, title: str, text: str, rows: Rows, matrix: Matrix) -> Picture:
    """A matrix: a table with coloured cells on the page, a picture beside it."""
    return Picture(name, title, text, rows, _files(_sheet([matrix.draw], matrix.size)), matrix=matrix)


def drawn(draw: Draw, size: tuple[float, float]) -> dict[str, bytes]:
    """Suffix → one picture as a file."""
    return _files(_sheet([draw], size))


def _sheet(panels: Sequence[Draw], size: tuple[float, float]) -> Figure:
    columns = min(_IN_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(cast(Any, _STYLE)):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        for number, draw in enumerate(panels, start=1):
            draw(figure.add_subplot(rows, columns, number))
    return figure


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    with rc_context(cast(Any, _STYLE)), warnings.catch_warnings():
        # On the page the reader's fonts have the letter; on paper there is a box.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(file, format=kind, **options)
    return file.getvalue()


def _svg(figure: Figure, name: str) -> str:
    markup = _saved(figure, "svg", metadata={"Date": None, "Creator": None}).decode()
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup[markup.index("<svg") :], flags=re.DOTALL)
    for colour_, on_page in _ON_PAGE.items():
        markup = markup.replace(colour_, on_page)
    markup = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 system-ui, sans-serif", markup)
    # Several pictures share a page: names inside one must not be those inside another.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", markup)


def _files(figure: Figure) -> dict[str, bytes]:
    png = _saved(figure, "png", dpi=150, facecolor="white")
    figure.set_layout_engine("none")  # everything has its place by now
    no_date = {"CreationDate": None, "Creator": None, "Producer": None}
    return {"png": png, "pdf": _saved(figure, "pdf", facecolor="white", metadata=no_date)}


def colour(index: int) -> str:
    """Of a series; those after the last are grey."""
    return _COLOURS[index] if index < len(_COLOURS) else OTHERS


def bars(axes: Axes, names: Sequence[str], series: Mapping[str, Sequence[float]], title: str) -> None:
    """Bars from left to right with their numbers: a group for each name, a bar in it for each series."""
    height = 0.8 / len(series)
    most = max((abs(value) for values in series.values() for value in values), default=1.0) or 1.0
    for number, (label, values) in enumerate(series.items()):
        middles = [index + (number - (len(series) - 1) / 2) * height for index in range(len(names))]
        axes.barh(middles, values, height, label=label, color=colour(number))
        for middle, value in zip(middles, values, strict=True):
            axes.text(max(value, 0) + 0.02 * most, middle, f"{value:.3g}", va="center")
    axes.set_yticks(range(len(names)), list(shorten(names, limit=_LETTERS).values()))
    axes.invert_yaxis()
    low = min(0.0, *(value for values in series.values() for value in values))
    axes.set_xlim(low * 1.1, most * 1.25)
    axes.axvline(0, color=_FAINT, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    if len(series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.12), ncols=len(series))
    finish(axes, "", "", title)


def dots(
    axes: Axes, names: Sequence[str], values: Sequence[float], ends: Sequence[Sequence[float] | None], title: str
) -> None:
    """Dots with their numbers and intervals, for what is compared beside one another and not with 0."""
    for place, (value, interval) in enumerate(zip(values, ends, strict=True)):
        if interval is not None:
            axes.plot(interval, [place, place], color=colour(0), linewidth=1.2)
        axes.plot([value], [place], "o", color=colour(0), markersize=5)
        axes.annotate(f"{value:.3g}", (value, place), (0, 5), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(names)), list(shorten(names, limit=2 * _LETTERS).values()))
    axes.set_ylim(len(names) - 0.5, -0.8)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_FAINT, alpha=0.3, linewidth=0.6)
    finish(axes, "", "", title)


def bars_size(count: int, series: int = 1) -> tuple[float, float]:
    """Inches of a panel with so many groups of bars."""
    return WIDTH, 0.9 + count * (0.12 + 0.17 * series)


def curves(axes: Axes, series: Mapping[str, Points], x: str, y: str, title: str, style: str = "-") -> None:
    """A line for each series through its points (x, y)."""
    handles = [
        axes.plot(*zip(*points, strict=True), style, color=colour(index))[0]
        for index, points in enumerate(series.values())
    ]
    finish(axes, x, y, title)
    if len(series) > 1:
        legend(axes, handles, list(series), loc="best")


def legend(axes: Axes, handles: Sequence[Any], names: Sequence[str], **where: Any) -> None:
    """What the lines are, those of the colours; matplotlib leaves out what begins with an underscore."""
    shown = [f"\u200b{name}" if name.startswith("_") else name for name in names[: len(_COLOURS)]]
    axes.legend(handles[: len(shown)], shown, handlelength=1.4, borderaxespad=0.2, labelspacing=0.3, **where)


def finish(axes: Axes, x: str, y: str, title: str) -> None:
    """What the axes are, and what is in the picture."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
