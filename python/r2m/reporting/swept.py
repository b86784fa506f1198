"""The points of a sweep as a picture: AUC where the evaluation has them, what their reports say where it has not."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from r2m.options import SWEPT
from r2m.places import read_small
from r2m.reporting.figures import WIDTH, Draw, Picture, Rows, bars, bars_size, curves, picture
from r2m.reporting.standing import FRAMES
from r2m.shorten import shorten
from r2m.sweep import SWEEP_FILE
from r2m_kernels.errors import BadFile

_POINT, _AUC = "point", "auc"
# What is drawn of points whose AUC is not known: the first that they differ in.
_SAID = ("residual term/core", "core/mean", "core scale used", "eta used")


def sweep_rows(swept: Path) -> list[dict[str, str]]:
    """What ``sweep.csv`` says of each point.

    Raises:
        BadFile: there is none.
    """
    path = swept / SWEEP_FILE
    if not path.is_file():
        raise BadFile(f"{swept}: expected a directory of r2m sweep, with {SWEEP_FILE}")
    return list(csv.DictReader(read_small(path, str(path)).decode(errors="replace").splitlines()))


def swept_beside(measured: Mapping[str, Any]) -> Path | None:
    """The sweep that models of an evaluation are points of, if they are of one."""
    sources = [Path(one["source"]) for one in measured["models"].values()]
    above = {place for source in sources for place in list(source.parents)[:2] if (place / SWEEP_FILE).is_file()}
    return above.pop() if len(above) == 1 else None


def of_sweep(rows: Rows, swept: Path, measured: Mapping[str, Any] | None) -> Picture | None:
    """Every point; None where there is nothing of them but their names.

    Args:
        rows: of ``sweep.csv``.
        swept: where it lies.
        measured: an evaluation, which may have some of the points.
    """
    aucs = {} if measured is None else _point_aucs(rows, swept, measured)
    options = [key for key in (*SWEPT, *rows[0]) if key in rows[0] and _chosen(rows, key)]
    table = [{**row, _AUC: aucs.get(row[_POINT])} for row in rows]
    judged = [row for row in table if row[_AUC] is not None]
    lacking = f" Not in the evaluation: {len(table) - len(judged)} of {len(table)} points." if judged else ""
    if judged:
        what, values = "mean AUC of frames", {row[_POINT]: row[_AUC] for row in judged}
        text = "Chosen on these sets, a point is fitted to them: report another set's numbers for it."
    else:
        what = next((key for key in _SAID if len({row.get(key) for row in rows if _is_number(row.get(key))}) > 1), "")
        values = {row[_POINT]: float(row[what]) for row in rows if _is_number(row.get(what))}
        text = "No point is in the evaluation, so that nothing says how well they detect (r2m evaluate with --model of "
        text += "the points); this is what their reports say."
    if not values:
        return None
    draw, size = _drawn([row for row in table if row[_POINT] in values], options, values, what)
    title = f"{'AUC' if judged else 'Points'} over {' and '.join(options) or 'points'}"
    return picture("sweep", title, text + lacking, table, [draw], size)


def _chosen(rows: Rows, key: str) -> bool:
    """Whether a column is an option's that the points differ in."""
    return key in (*SWEPT, "method") and (key in SWEPT or len({row[key] for row in rows}) > 1)


def _drawn(rows: Rows, options: list[str], values: Mapping[str, float], what: str) -> tuple[Draw, tuple[float, float]]:
    """A line over the last option where it is a number and there are more than two points of it; else a bar a point."""
    last = options[-1] if options else None
    if last is None or len(rows) < 2 or not all(_is_number(row[last]) for row in rows):
        short = shorten(list(values))
        names = [short[point] for point in values]
        return lambda axes: bars(axes, names, {"": list(values.values())}, what), bars_size(len(values))

    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        title = ", ".join(f"{option} {row[option]}" for option in options[:-1] if row[option]) or "all"
        groups.setdefault(title, []).append((float(row[last]), values[row[_POINT]]))
    points = {title: sorted(group) for title, group in groups.items()}

    def draw(axes: Axes) -> None:
        curves(axes, points, last, what, "", "o-")

    return draw, (WIDTH, 3.0)


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def _point_aucs(rows: Rows, swept: Path, measured: Mapping[str, Any]) -> dict[str, float]:
    point_of = {os.path.realpath(swept / row[_POINT]): row[_POINT] for row in rows}
    aucs = {}
    for one in measured["models"].values():
        source = os.path.realpath(one["source"])
        point = point_of.get(source) or point_of.get(os.path.dirname(source))
        if point is not None and one["average"][FRAMES] is not None:
            aucs[point] = float(one["average"][FRAMES])
    return aucs
