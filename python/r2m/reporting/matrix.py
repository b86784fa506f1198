"""A matrix of numbers as a map: coloured cells with the numbers in them, as a table on a page and as a picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

_MAP = colormaps["viridis"]
_NONE = "#d9d9d9"  # of a cell without a number
Place = tuple[int, int]


@dataclass(frozen=True)
class Cell:
    """One of them: its text, its colours, what it says when it is pointed at, and whether it has a frame."""

    text: str
    ground: str
    ink: str
    title: str
    framed: bool


@dataclass(frozen=True)
class Matrix:
    """A map of numbers.

    Attributes:
        rows, columns: names of them.
        values: (rows, columns); None: there is none.
        low, high: where the colours begin and end.
        titles: place → what is said of a cell that is pointed at.
        framed: places with a frame.
        corner: what rows and columns are.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float
    high: float = 1.0
    titles: Mapping[Place, str] = field(default_factory=dict)
    framed: Collection[Place] = ()
    corner: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Of a picture, in inches."""
        letters = max(map(len, self.rows), default=0), max(map(len, self.columns), default=0)
        return 0.5 + 0.075 * letters[0] + 0.48 * len(self.columns), 0.4 + 0.075 * letters[1] + 0.24 * len(self.rows)

    def table(self) -> list[tuple[str, list[Cell]]]:
        """Row by row: its name and its cells."""
        return [(row, [self._cell((i, j)) for j in range(len(self.columns))]) for i, row in enumerate(self.rows)]

    def _cell(self, place: Place) -> Cell:
        value = self.values[place[0]][place[1]]
        ground = _NONE if value is None else _ground(value, self.low, self.high)
        return Cell(number(value), ground, _ink(ground), self.titles.get(place, ""), place in self.framed)

    def draw(self, axes: Axes) -> None:
        """As a picture."""
        for i, (_, cells) in enumerate(self.table()):
            for j, cell in enumerate(cells):
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=cell.ground, linewidth=0))
                if cell.framed:
                    axes.add_patch(Rectangle((j - 0.45, i - 0.42), 0.9, 0.84, fill=False, edgecolor="#d55e00", lw=1.8))
                axes.text(j, i, cell.text, ha="center", va="center", color=cell.ink)
        axes.set_xlim(-0.5, len(self.columns) - 0.5)
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_xticks(range(len(self.columns)), self.columns, rotation=90)
        axes.set_yticks(range(len(self.rows)), self.rows)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)


def number(value: float | None, digits: int = 2) -> str:
    """As papers have numbers below 1: ``.82``, ``−.07``, ``1.00``; a dash for none."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}f}"
    sign = "−" if value < 0 and float(text) else ""
    return sign + text.removeprefix("0")


def signed(value: float | None, digits: int = 3) -> str:
    """The same of a difference: ``+.021``; what rounds to nothing has no sign."""
    text = number(value, digits)
    return f"+{text}" if value is not None and round(value, digits) > 0 else text


def _ground(value: float, low: float, high: float) -> str:
    share = float(np.clip((value - low) / (high - low), 0, 1))
    return "#{:02x}{:02x}{:02x}".format(*(round(255 * one) for one in _MAP(share)[:3]))


def _ink(ground: str) -> str:
    """Black or white, whichever is read better: 4.58 : 1 at least on any colour, by WCAG's definition."""
    channels = np.array([int(ground[index : index + 2], 16) / 255 for index in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"
