"""docs/speed.md's tables, made from committed results; their text is ``speed.md.j2``.

    python -m bench.compare [--page | --check]

Prints the Markdown; ``--page`` puts it between the marks in docs/speed.md, ``--check`` exits with 1 if it is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.machine import RESULTS, ROOT
from bench.markdown import render, update

# Of timed rows whose key does not say it all.
NAMES = {
    "r2m_kernels": "**r2m_kernels**",
    'r2m_kernels, svd="textbook"': 'r2m_kernels, `svd="textbook"`',
    'r2m_kernels, backend="torch"': 'r2m_kernels, `backend="torch"`',
    "torch.svd_lowrank": "plain PyTorch, `torch.svd_lowrank(q=r+8, niter=2)` per tensor",
    "torch.linalg.svd": "plain PyTorch, `torch.linalg.svd` per tensor",
    "textbook's products alone": "the products of a textbook randomized SVD (six a tensor) and nothing else",
    "r2m_kernels, default (rows)": "r2m_kernels, default: whole residuals weighted by row",
}
# Timed row → whose truncation error it has.
ERRORS = {
    "r2m_kernels": "r2m_kernels",
    'r2m_kernels, svd="textbook"': "textbook",
    "torch.svd_lowrank": "svd_lowrank",
}


def section(cpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> str:
    """All of it, marks included, from the contents of ``cpu.json`` and ``gpu_merges.json``."""
    machine, over_optimum = cpu["machine"], cpu["blocks"]["truncation_over_optimum"]
    errors = {name: f"{over_optimum[key]:.4f}" for name, key in ERRORS.items()} | {"torch.linalg.svd": "1.0000"}
    blocks = [
        [
            NAMES.get(name, name),
            f"{cpu['blocks']['over_ours'][name]:.2f}",
            f"{row['median']:.2f}",
            errors.get(name, ""),
        ]
        for name, row in sorted(cpu["blocks"]["timed"].items(), key=lambda item: item[1]["median"])
    ]
    commands = [
        [
            f"**{name}**" if name.startswith("r2m") else name,
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for name, row in sorted(cpu["files"]["medians"].items(), key=lambda item: item[1]["seconds"])
    ]
    merges = []
    for row in gpu["rows"]:
        if "seconds" in row:
            over = (row["rivals"][name].get("over_ours") for name in ("full_svd", "svd_lowrank", "torch backend"))
            error = f"{max(row['truncation_over_optimum'].values()):.3f}"
            numbers = ("" if x is None else f"{x:.0f}" for x in over)
            merges.append([row["job"], f"{row['seconds'] * 1e3:.0f}", error, *numbers])
    several = machine["cores"] > 1
    return render(
        Path(__file__).with_name("speed.md.j2"),
        cpu=cpu,
        gpu=gpu,
        cores=f"{machine['cores']} cores of an {machine['cpu']}" if several else f"one core of {machine['cpu']}",
        kernels=machine["backend"].split("(")[-1].rstrip(")"),
        missed=[bar for bar in cpu["bars"] if not bar["met"]],
        blocks=blocks,
        commands=commands,
        merges=merges,
    ).rstrip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--page", action="store_true")
    mode.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = section(*(json.loads((RESULTS / f"{name}.json").read_text()) for name in ("cpu", "gpu_merges")))
    if not (options.page or options.check):
        print(text)
        return 0
    page = ROOT / "docs" / "speed.md"
    before, (begin, *_, end) = page.read_text(), text.splitlines()
    if begin not in before or end not in before:
        print(f"bench.compare: {page} has no line {begin}", file=sys.stderr)
        return 1
    after = before[: before.index(begin)] + text + before[before.index(end) + len(end) :]
    return update(page, after, check=options.check, command="python -m bench.compare --page")


if __name__ == "__main__":
    raise SystemExit(main())
