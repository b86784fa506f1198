"""The three pictures: the table as bars, ROC curves, and a contact sheet of the forgeries.

Colours are Okabe and Ito's, which people with any kind of colour vision can tell apart. matplotlib is
imported when a picture is drawn, and draws into memory: no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from r2m.demo.camera import capture, capture_elsewhere
from r2m.demo.evaluation import Scores, group_auc, pooled
from r2m.demo.faces import Photographs, crop_face
from r2m.demo.forgeries import TRAINED, UNSEEN, forge
from r2m.demo.resampling import Picture
from r2m.demo.samples import GROUPS
from r2m.demo.table import COLUMNS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY, _SKY, _YELLOW, _ORANGE, _BLUE = "#8c8c8c", "#56b4e9", "#e69f00", "#d55e00", "#0072b2"
# What kind of detector, its colour, and which methods are of it.
_KINDS = (
    ("where all start", _GREY, ("base",)),
    ("one specialist", _SKY, ("FS specialist", "FR specialist", "EFS specialist")),
    ("not a merge: all data, or all models at once", _YELLOW, ("joint training", "ensemble")),
    ("merged", _BLUE, ("weight average", "task arithmetic", "CART")),
    ("merged by R2M", _ORANGE, ("R2M",)),
)
_COLOURS = {method: colour for _, colour, methods in _KINDS for method in methods}
# Method → line style, width: told apart without colour too.
_CURVES = {
    "FS specialist": ("-", 1.2),
    "FR specialist": ("--", 1.2),
    "EFS specialist": (":", 1.6),
    "joint training": ("-", 1.8),
    "ensemble": ("--", 1.8),
    "weight average": ("-", 1.8),
    "R2M": ("-", 2.4),
}
_EXPLAINED = {
    "FS": "FS: face swap",
    "FR": "FR: face reenactment",
    "EFS": "EFS: entire face synthesis",
    "in-distribution": "in-distribution: mean of these three",
    "cross": "cross: shifted forgeries, other camera",
    "unseen": "unseen: six forgeries nothing was trained on",
}


def draw_bars(rows: Sequence[Row]) -> bytes:
    """The table as bars that start at chance; a PNG file's content."""
    from matplotlib.patches import Patch

    figure = _new_figure(13.0, 8.4)
    panels = figure.subplots(2, 3, sharey=True)
    values = [value for row in rows for value in row.auc.values()]
    left = min(0.4, np.floor(min(values) * 10) / 10 - 0.1)  # room for the numbers of bars that point left
    names = [row.method for row in rows]
    for panel, column in zip(panels.flat, COLUMNS, strict=True):
        auc = [row.auc[column] for row in rows]
        colours = [_COLOURS[name] for name in names]
        panel.barh(names, [value - 0.5 for value in auc], left=0.5, color=colours, height=0.72)
        for place, value in enumerate(auc):
            end, gap = ("left", 0.008) if value >= 0.5 else ("right", -0.008)
            panel.text(value + gap, place, f"{value:.3f}", va="center", ha=end, fontsize=9)
        panel.axvline(0.5, color="black", linewidth=0.8)
        panel.set_xlim(left, 1.08)
        panel.set_xticks([tick for tick in np.arange(0, 1.01, 0.1).round(1) if tick >= left])
        panel.set_title(_EXPLAINED[column], fontsize=11)
        _tidy(panel)
        panel.tick_params(axis="y", length=0)
    panels[0, 0].invert_yaxis()  # shared: the first row of the table on top
    for panel in panels[1]:
        panel.set_xlabel("AUC (bars start at chance)")
    handles = [Patch(color=colour, label=label) for label, colour, _ in _KINDS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("How well each detector ranks forged faces above real ones, on people none has seen")
    return _png(figure)


def draw_roc(scores: Mapping[str, Mapping[str, Mapping[str, Scores]]]) -> bytes:
    """ROC curves by group, from method → group → ``real`` and forgeries → scores; a PNG file's content."""
    from sklearn.metrics import roc_curve

    figure = _new_figure(13.0, 5.0)
    panels = figure.subplots(1, len(GROUPS), sharey=True)
    for panel, group in zip(panels, GROUPS, strict=True):
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.8)
        for method, (style, width) in _CURVES.items():
            false_alarms, detected, _ = roc_curve(*pooled(scores[method][group]))
            label = f"{method}  {group_auc(scores[method][group]):.3f}"
            panel.plot(false_alarms, detected, color=_COLOURS[method], linestyle=style, linewidth=width, label=label)
        panel.set(title=group, xlabel="real photographs taken for forged", aspect="equal", xlim=(0, 1), ylim=(0, 1))
        panel.legend(loc="lower right", fontsize=8.5, title="AUC", title_fontsize=8.5, framealpha=0.9)
        _tidy(panel)
    panels[0].set_ylabel("forgeries found")
    figure.suptitle("ROC curves over all forgeries of a group; the thin black line is chance")
    return _png(figure)


def draw_forgeries(photographs: Photographs, people: Sequence[int], seed: int) -> bytes:
    """A contact sheet: four test people as photographed and forged, by both cameras; a PNG file's content."""
    blocks = {
        "usual camera, trained families": [("real", False), *((kind, False) for kind in TRAINED)],
        "cross: other camera, shifted forgeries": [("real", True), *((kind, True) for kind in TRAINED)],
        "unseen forgeries": [(kind, False) for kind in UNSEEN],
    }
    figure = _new_figure(16.0, 5.3)
    width_ratios = [len(block) for block in blocks.values()]
    parts = figure.subfigures(1, len(blocks), width_ratios=width_ratios, wspace=0.02, squeeze=False)[0]
    for part, (title, block) in zip(parts, blocks.items(), strict=True):
        part.suptitle(title, fontsize=12)
        panels = part.subplots(_SHOWN, len(block))
        for index in range(_SHOWN):
            for panel, (kind, elsewhere) in zip(panels[index], block, strict=True):
                picture = _example(photographs, people, index, kind, elsewhere, seed)
                panel.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                panel.set_axis_off()
                if index == 0:
                    # Two lines for all, so that the rows of the three parts stay level.
                    first, _, second = kind.rpartition(" ")
                    panel.set_title(f"{first}\n{second}", fontsize=10, linespacing=1.0)
    return _png(figure)


_SHOWN = 4


def _example(
    photographs: Photographs, people: Sequence[int], index: int, kind: str, elsewhere: bool, seed: int
) -> Picture:
    """One cell: in a row always the same crop and the same donor, so that only the forgery differs."""
    rng = np.random.default_rng([seed, index])
    picture = crop_face(photographs[people[index], 0], rng)
    donor = crop_face(photographs[people[(index + _SHOWN) % len(people)], 0], rng)
    if kind != "real":
        picture = forge(kind, picture, donor, rng, shifted=elsewhere)
    return (capture_elsewhere if elsewhere else capture)(picture, rng)


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # pyplot would choose a backend for the whole process and keep figures alive

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    # No software name or date inside: equal results give equal files.
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
