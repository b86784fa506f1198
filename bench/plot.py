"""Pictures of ``bench/results/cpu.json``: error against time, and time against experts, size and threads.

python -m bench.plot [--json FILE] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from bench.machine import RESULTS

FAMILIES = {"r2m_kernels": ("o", "tab:blue"), "textbook": ("s", "tab:gray"), "svd_lowrank": ("^", "tab:orange")}


def error_against_time(cpu: dict[str, Any], path: Path) -> None:
    """A panel a spectrum; further right is slower than our defaults, further up is worse than the optimum."""
    spectra = cpu["truncation"]["spectra"]
    figure, axes = pyplot.subplots(2, (len(spectra) + 1) // 2, figsize=(14, 7), sharex=True)
    for axis, (spectrum, rows) in zip(axes.flat, spectra.items(), strict=False):
        ours = rows["r2m_kernels"]["median"]
        for family, (marker, colour) in FAMILIES.items():
            points = [
                (row["median"] / ours, row["over_optimum"]) for name, row in rows.items() if name.startswith(family)
            ]
            points.sort()
            axis.plot(*zip(*points, strict=True), marker=marker, color=colour, label=family)
        axis.axvline(rows["full SVD"]["median"] / ours, color="tab:red", linestyle=":", label="full SVD")
        axis.axhline(1.02, color="black", linewidth=0.5)
        axis.set(title=spectrum, xscale="log", ylim=(0.998, 1.1))
    for axis in axes.flat[len(spectra) :]:
        axis.set_visible(False)
    axes[0, 0].legend()
    figure.supxlabel("time / time of our defaults, one thread")
    figure.supylabel("truncation error / optimum (1024 × 1024, rank 103); 1.02 is the promise")
    _save(figure, path)


def time_against(cpu: dict[str, Any], key: str, label: str, path: Path) -> None:
    """Seconds of a merge over one quantity, with a line of slope 1."""
    figure, axis = pyplot.subplots(figsize=(5, 4))
    for method, (marker, colour) in (("ours", FAMILIES["r2m_kernels"]), ("svd_lowrank", FAMILIES["svd_lowrank"])):
        points = sorted((int(value), row["median"]) for value, row in cpu["scaling"][key][method].items())
        axis.plot(*zip(*points, strict=True), marker=marker, color=colour, label=method)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds", xticks=[x for x, _ in points])
    axis.set_xticklabels([str(x) for x, _ in points])
    axis.minorticks_off()
    axis.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})  # the same numbers, the same file
    pyplot.close(figure)
    print(f"written to {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    pyplot.rcParams["svg.hashsalt"] = "r2m_kernels"
    cpu = json.loads(options.json.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    error_against_time(cpu, options.out / "cpu_error_time.svg")
    time_against(cpu, "experts", "experts", options.out / "cpu_time_experts.svg")
    time_against(cpu, "blocks", "Transformer blocks of ViT-L/14's size", options.out / "cpu_time_size.svg")
    time_against(cpu, "threads", "threads", options.out / "cpu_time_threads.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
