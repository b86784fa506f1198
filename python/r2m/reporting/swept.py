"""The points of a sweep as a picture: AUC where the evaluation has them, what their reports say where it has not."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from r2m.places import read_small
from r2m.reporting.figures import WIDTH, Draw, Picture, Rows, bars_size, curves, dots, picture
from r2m.reporting.standing import FRAMES
from r2m.sweep import SWEEP_FILE
from r2m_kernels.errors import BadFile

_POINT, _AUC, _METHOD = "point", "auc", "method"
# What reports say of a point; of those whose AUC is not known the first is drawn that they differ in.
_SAID = ("residual term/core", "core/mean", "core scale used", "eta used")
_LEAST = 0.02  # of an axis: what differs by less is all but the same
Judged = tuple[float, list[float] | None]  # an AUC and its interval


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
    options = [key for key in rows[0] if key not in (_POINT, *_SAID) and len({row[key] for row in rows}) > 1]
    table = [{**row, _AUC: aucs[row[_POINT]][0] if row[_POINT] in aucs else None} for row in rows]
    if aucs:
        what, values = "mean AUC of frames", aucs
        text = "Chosen on these sets, a point is fitted to them: report another set's numbers for it."
        lacking = len(rows) - len(aucs)
        text += f" Of {len(rows)} points {lacking} are not in the evaluation." if lacking else ""
    else:
        what = next((key for key in _SAID if len({row.get(key) for row in rows if _is_number(row.get(key))}) > 1), "")
        values = {row[_POINT]: (float(row[what]), None) for row in rows if _is_number(row.get(what))}
        text = "No point is in the evaluation, so that nothing says how well they detect (r2m evaluate with --model of "
        text += "the points); this is what their reports say."
    if not values:
        return None
    draw, size = _drawn([row for row in table if row[_POINT] in values], options, values, what)
    title = f"{'AUC' if aucs else 'Points'} over {' and '.join(options) or 'points'}"
    return picture("sweep", title, text, table, [draw], size)


def _drawn(rows: Rows, options: list[str], values: Mapping[str, Judged], what: str) -> tuple[Draw, tuple[float, float]]:
    """Lines over the last option where it is a number in all points; else a dot for each point, the largest first."""
    last = options[-1] if options else None
    if last is None or len(rows) < 2 or not all(_is_number(row[last]) for row in rows):
        ranked = dict(sorted(values.items(), key=lambda item: -item[1][0]))
        names = [name.replace(f"{_METHOD}=", "") for name in ranked]
        found = [value for value, _ in ranked.values()]
        ends = [interval for _, interval in ranked.values()]
        return lambda axes: dots(axes, names, found, ends, what), bars_size(len(values), 2)

    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        title = ", ".join(f"{option} {row[option]}" for option in options[:-1] if row[option]) or "all"
        groups.setdefault(title, []).append((float(row[last]), values[row[_POINT]][0]))
    points = {title: sorted(group) for title, group in groups.items()}

    def draw(axes: Axes) -> None:
        curves(axes, points, last, what, "", "o-")
        axes.yaxis.set_major_formatter("{x:.3g}")
        low, high = axes.get_ylim()
        missing = max(0.0, _LEAST - (high - low)) / 2
        axes.set_ylim(low - missing, high + missing)

    return draw, (WIDTH, 3.0)


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def _point_aucs(rows: Rows, swept: Path, measured: Mapping[str, Any]) -> dict[str, Judged]:
    point_of = {os.path.realpath(swept / row[_POINT]): row[_POINT] for row in rows}
    aucs = {}
    for one in measured["models"].values():
        source = os.path.realpath(one["source"])
        point = point_of.get(source) or point_of.get(os.path.dirname(source))
        if point is not None and one["average"][FRAMES] is not None:
            aucs[point] = float(one["average"][FRAMES]), one.get("average_intervals", {}).get(FRAMES)
    return aucs
