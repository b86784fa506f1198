"""Pictures of the benchmark, from its JSON; and a contact sheet of every forgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from r2m.demo.camera import capture
from r2m.demo.faces import crop_face, read_photographs
from r2m.demo.forgeries import UNSEEN as UNSEEN_BY_CODE
from r2m.demo.forgeries import forge

matplotlib.use("agg")
from matplotlib import pyplot

from bench.quality import settings
from bench.quality.forgeries import FURTHER_FORGERIES
from bench.quality.groups import UNSEEN, crop, natural_photographs
from bench.quality.tables import AVERAGE, DEFAULT, TRAINED, named, shown

Content = Mapping[str, Any]
# Okabe and Ito's colours.
BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072b2", "#d55e00", "#009e73", "#8c8c8c", "#cc79a7"


def draw_all(content: Content, out: Path) -> list[Path]:
    """Every picture that the content has numbers for, into a directory."""
    pyplot.rcParams["svg.hashsalt"] = "r2m_kernels"
    regimes = [regime for regime in UNSEEN if regime in content["sections"]]
    drawn = {f"{regime}.svg": differences(content, regime) for regime in regimes}
    if any("many" in of_run for of_run in content["studies"].values()):
        drawn["experts.svg"] = experts(content["studies"])
    drawn["forgeries.png"] = contact_sheet()
    for name, figure in drawn.items():
        metadata = {"Date": None} if name.endswith("svg") else {"Software": None}
        figure.savefig(out / name, dpi=110, metadata=metadata)  # the same numbers, the same file
        pyplot.close(figure)
    return [out / name for name in drawn]


def differences(content: Content, name: str) -> Any:
    """Paired difference of rows to the weight average, with its interval, in two groups of one regime."""
    which, section = shown(content, name)
    groups = ("in-distribution", UNSEEN[name])
    plain = {row for row, kind in content["methods"].items() if kind != "ablation"} | set(TRAINED[-2:])
    rows = [row for row in section["rows"] if row in plain and row != AVERAGE]
    size = (11, 0.24 * len(rows) + 1.3)
    figure, axes = pyplot.subplots(1, len(groups), figsize=size, sharey=True, layout="constrained")
    for axis, group in zip(axes, groups, strict=True):
        for place, row in enumerate(rows):
            gain = section["rows"][row]["minus"][AVERAGE][group]
            colour = ORANGE if row == DEFAULT else GREY if row in TRAINED else BLUE
            axis.plot([gain["low"], gain["high"]], [place, place], color=colour, linewidth=2)
            axis.plot(gain["mean"], place, "o", color=colour, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=group, xlabel="AUC minus the weight average's, 95 % interval", xlim=(-0.1, 0.1))
        axis.grid(axis="x", linewidth=0.3)
    axes[0].set_yticks(range(len(rows)), map(named, rows))
    axes[0].invert_yaxis()
    figure.suptitle(f"{name}: {len(section['runs'])} {which} runs; what leaves the frame is worse than −0.1")
    return figure


def experts(studies: Content) -> Any:
    """AUC over all six families with one to six specialists."""
    merges = {
        architecture: [one for run, of in studies.items() if run.startswith(architecture) for one in of.get("many", ())]
        for architecture in settings.REGIMES
    }
    merges = {architecture: of for architecture, of in merges.items() if of}
    figure, axes = pyplot.subplots(
        1, len(merges), figsize=(4.5 * len(merges), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (architecture, of) in zip(axes[0], merges.items(), strict=True):
        counts = sorted({len(one["experts"]) for one in of})
        for row, colour in zip(of[0]["auc"], (GREY, BLUE, GREEN, PURPLE, ORANGE, "black"), strict=False):
            heights = [
                np.mean([one["auc"][row]["six families"] for one in of if len(one["experts"]) == count])
                for count in counts
            ]
            width = 2.5 if row == DEFAULT else 1.2
            axis.plot(counts, heights, marker="o", color=colour, label=named(row), linewidth=width)
        axis.set(title=architecture, xlabel="specialists merged")
        axis.grid(linewidth=0.3)
    axes[0][0].set_ylabel("AUC, all six families")
    axes[0][0].legend(fontsize=8)
    return figure


def contact_sheet(columns: int = 6) -> Any:
    """Real pictures, and the same ones in every forgery, as the camera saves them; faces above, things below."""
    photographs, things = read_photographs(), natural_photographs()
    kinds: Sequence[str] = ("real", *settings.MAIN, *settings.FURTHER, *UNSEEN_BY_CODE)

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
