"""Pictures of the benchmark, from its JSON; and a contact sheet of every forgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from r2m.demo.camera import capture
from r2m.demo.faces import crop_face, read_photographs
from r2m.demo.forgeries import UNSEEN, forge

matplotlib.use("agg")
from matplotlib import pyplot

from bench.quality import settings
from bench.quality.forgeries import FURTHER_FORGERIES
from bench.quality.groups import crop, natural_photographs
from bench.quality.tables import against, reported, rows_of, runs_of

Content = Mapping[str, Any]
# Okabe and Ito's colours.
BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072b2", "#d55e00", "#009e73", "#8c8c8c", "#cc79a7"
SHOWN = ("in-distribution", "unseen")


def draw_all(content: Content, out: Path) -> list[Path]:
    """Every picture that the content has numbers for, into a directory."""
    pyplot.rcParams["svg.hashsalt"] = "r2m_kernels"
    drawn = {"quality_differences.svg": differences(content), "quality_sweeps.svg": sweeps(content)}
    if "many" in content:
        drawn["quality_experts.svg"] = experts(content)
    if "analysis" in content:
        drawn["quality_features.svg"] = features(content)
    drawn["quality_forgeries.png"] = contact_sheet()
    for name, figure in drawn.items():
        metadata = {"Date": None} if name.endswith("svg") else {"Software": None}
        figure.savefig(out / name, dpi=110, metadata=metadata)  # the same numbers, the same file
        pyplot.close(figure)
    return [out / name for name in drawn]


def differences(content: Content) -> Any:
    """Paired difference of every row to the weight average, with its interval, in two groups."""
    runs = runs_of(content, reported(content))
    rows = [row for row in rows_of(content) if row != "weight average" and row != "base" and "specialist" not in row]
    figure, axes = pyplot.subplots(
        1, len(SHOWN), figsize=(13, 0.27 * len(rows) + 1.5), sharey=True, layout="constrained"
    )
    for axis, group in zip(axes, SHOWN, strict=True):
        for place, row in enumerate(rows):
            gain = against(content, row, "weight average", group, runs)
            colour = ORANGE if row == "R2M" else GREY if row in ("joint training", "ensemble") else BLUE
            axis.plot([gain["low"], gain["high"]], [place, place], color=colour, linewidth=2)
            axis.plot(gain["mean"], place, "o", color=colour, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=group, xlabel="AUC minus the weight average's, 95 % interval", xlim=(-0.12, 0.12))
        axis.grid(axis="x", linewidth=0.3)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    figure.suptitle(f"{len(runs)} {reported(content)} runs; what leaves the frame is worse than −0.12")
    return figure


def sweeps(content: Content) -> Any:
    """AUC over rank, η and scale."""
    curves: Mapping[str, Any] = content["sweeps"]
    names = list(next(iter(curves.values())))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for architecture, colour in (("cnn", BLUE), ("vit", ORANGE)):
            chosen = [curve[name] for run, curve in curves.items() if run.startswith(architecture)]
            if not chosen:
                continue
            places = [point[0] for point in chosen[0]]
            for group, style in zip(SHOWN, ("-", "--"), strict=True):
                heights = np.mean([[point[1][group] for point in curve] for curve in chosen], axis=0)
                axis.plot(
                    places, heights, style, marker="o", markersize=3, color=colour, label=f"{architecture}, {group}"
                )
        axis.set(title=name, xlabel="value")
        axis.grid(linewidth=0.3)
    axes[0].set_ylabel("AUC")
    axes[0].legend(fontsize=7)
    return figure


def experts(content: Content) -> Any:
    """AUC over all six families with one to six specialists."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, architecture in zip(axes, ("cnn", "vit"), strict=True):
        merges = [
            one for run, of_run in content["many"].items() if run.startswith(architecture) for one in of_run["merges"]
        ]
        rows = list(merges[0]["auc"])
        counts = sorted({len(one["experts"]) for one in merges})
        for row, colour in zip(rows, (GREY, BLUE, GREEN, PURPLE, "black", ORANGE), strict=False):
            heights = [
                np.mean([one["auc"][row]["six families"] for one in merges if len(one["experts"]) == count])
                for count in counts
            ]
            axis.plot(counts, heights, marker="o", color=colour, label=row, linewidth=2.5 if row == "R2M" else 1.2)
        axis.set(title=architecture, xlabel="specialists merged")
        axis.grid(linewidth=0.3)
    axes[0].set_ylabel("AUC, all six families")
    axes[0].legend(fontsize=8)
    return figure


def features(content: Content) -> Any:
    """How alike the features of two models are, on real and on forged pictures."""
    runs = [one["features"] for one in content["analysis"].values()]
    names = runs[0]["models"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, kind in zip(axes, ("real", "fake"), strict=True):
        mean = np.mean([one[kind] for one in runs], axis=0)
        axis.imshow(mean, vmin=0, vmax=1, cmap="cividis")
        for i, j in np.ndindex(mean.shape):
            axis.text(
                j, i, f"{mean[i, j]:.2f}", ha="center", va="center", color="white" if mean[i, j] < 0.6 else "black"
            )
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"cosine of features, {kind} pictures")
    return figure


def contact_sheet(columns: int = 6) -> Any:
    """Real pictures, and the same ones in every forgery, as the camera saves them; faces above, things below."""
    photographs, things = read_photographs(), natural_photographs()
    kinds: Sequence[str] = ("real", *settings.MAIN, *settings.FURTHER, *UNSEEN)

    def made(kind: str, place: int, *, face: bool) -> Any:
        rng = np.random.default_rng(place)
        if face:
            picture, donor = crop_face(photographs[5 * place, 0], rng), crop_face(photographs[5 * place + 1, 0], rng)
        else:
            picture, donor = crop(things[place], rng), crop(things[place + 1], rng)
        if kind in FURTHER_FORGERIES:
            picture = np.clip(FURTHER_FORGERIES[kind](picture, donor, rng), 0, 1)
        elif kind != "real":
            picture = forge(kind, picture, donor, rng)
        return capture(picture, rng)

    figure, axes = pyplot.subplots(2, 1, figsize=(13, 13), layout="constrained")
    for axis, face in zip(axes, (True, False), strict=True):
        sheet = np.vstack([np.hstack([made(kind, place, face=face) for kind in kinds]) for place in range(columns)])
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(48 * np.arange(len(kinds)) + 24, kinds, rotation=20, fontsize=8)
        axis.set_yticks([])
    figure.suptitle("FS, FR, EFS, FE, DD and RT are trained on; the six after them are unseen")
    return figure
