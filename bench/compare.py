"""The README's tables of speed, made from committed results.

    python -m bench.compare [--readme | --check]

Prints the Markdown; ``--readme`` puts it between the marks in README.md, ``--check`` exits with 1 if it is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bench.machine import RESULTS, ROOT

BEGIN, END = "<!-- bench:begin, written by `python -m bench.compare --readme` -->", "<!-- bench:end -->"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def cpu_text(cpu: dict[str, Any]) -> list[str]:
    """Blocks in memory, commands on files, and the bars."""
    machine, blocks, files = cpu["machine"], cpu["blocks"], cpu["files"]
    cores = (
        f"{machine['cores']} cores of an {machine['cpu']}" if machine["cores"] > 1 else f"one core of {machine['cpu']}"
    )
    kernels = machine["backend"].split("(")[-1].rstrip(")") if "(" in machine["backend"] else machine["backend"]
    text = [
        f"**On a CPU** ({cores}, {kernels}, torch {machine['torch']}, {machine['date']}; `make bench`, "
        "`bench/results/cpu.json`; medians of interleaved runs). Two Transformer blocks of ViT-L/14's size "
        f"({blocks['parameters'] / 1e6:.1f} M parameters), three experts, float32 in memory, "
        "residuals truncated (`MergeConfig.r2m_truncated()`):",
        "",
    ]
    errors = {
        "r2m_kernels": blocks["truncation_over_optimum"]["r2m_kernels"],
        'r2m_kernels, svd="textbook"': blocks["truncation_over_optimum"]["textbook"],
        "torch.svd_lowrank": blocks["truncation_over_optimum"]["svd_lowrank"],
        "torch.linalg.svd": 1.0,
    }
    names = {
        "r2m_kernels": "**r2m_kernels**",
        'r2m_kernels, svd="textbook"': 'r2m_kernels, `svd="textbook"`',
        'r2m_kernels, backend="torch"': 'r2m_kernels, `backend="torch"`',
        "torch.svd_lowrank": "plain PyTorch, `torch.svd_lowrank(q=r+8, niter=2)` per tensor",
        "torch.linalg.svd": "plain PyTorch, `torch.linalg.svd` per tensor",
        "textbook's products alone": "the products of a textbook randomized SVD (six a tensor) and nothing else",
        "r2m_kernels, default (rows)": "r2m_kernels, default: whole residuals weighted by row",
        "r2m_kernels, weight average": "r2m_kernels, weight average",
    }
    rows = sorted(blocks["timed"].items(), key=lambda item: item[1]["median"])
    text += table(
        ["merge", "time, relative", "seconds", "truncation error / optimum"],
        [
            [
                names[name],
                f"{blocks['over_ours'][name]:.2f}",
                f"{row['median']:.2f}",
                f"{errors[name]:.4f}" if name in errors else "",
            ]
            for name, row in rows
        ],
    )
    text += [
        "",
        f"Whole commands from file to file, {files['blocks']} such blocks, three experts, each in a process of its own "
        "(start-up and `import torch` included):",
        "",
    ]
    medians = sorted(files["medians"].items(), key=lambda item: item[1]["seconds"])
    text += table(
        ["command", "seconds", "CPU seconds", "peak memory, MB"],
        [
            [
                f"**{name}**" if name.startswith("r2m") else name,
                f"{row['seconds']:.1f}",
                f"{row['cpu_seconds']:.1f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
            ]
            for name, row in medians
        ],
    )
    missed = [bar for bar in cpu["bars"] if not bar["met"]]
    met = (
        f"{len(cpu['bars']) - len(missed)} of the {len(cpu['bars'])} bars this project set itself were met in that run"
    )
    text += ["", met + ("; missed: " if missed else ".")]
    for bar in missed:
        bound = f"at most {bar['at_most']:g}" if "at_most" in bar else f"at least {bar['at_least']:g}"
        text += [f"* {bar['name']}: {bar['value']:.3f}, {bound}"]
    return text


def gpu_text(merges: dict[str, Any]) -> list[str]:
    """Whole merges on a GPU."""
    machine = merges["machine"]
    text = [
        f"**On a GPU** ({machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}; `make gpu`, "
        "`bench/results/gpu_*.json`). State dicts on the GPU, residuals truncated; full SVDs and `svd_lowrank` timed "
        "on one block of one expert and scaled, truncations alone, which favours them:",
        "",
    ]
    rows = []
    for row in merges["rows"]:
        if "seconds" not in row:
            continue
        rivals, worst = row["rivals"], max(row["truncation_over_optimum"].values())
        over = (rivals[name].get("over_ours") for name in ("full_svd", "svd_lowrank", "torch backend"))
        rows.append(
            [
                row["job"],
                f"{row['seconds'] * 1e3:.0f}",
                f"{worst:.3f}",
                *("" if x is None else f"{x:.0f}" for x in over),
            ]
        )
    header = [
        "merge",
        "ms",
        "truncation error / optimum",
        "full SVD / ours",
        "svd_lowrank / ours",
        'backend="torch" / ours',
    ]
    return text + table(header, rows)


def section() -> str:
    """All of it, marks included."""
    content = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("cpu", "gpu_merges")}
    return "\n".join([BEGIN, "", *cpu_text(content["cpu"]), "", *gpu_text(content["gpu_merges"]), "", END])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--readme", action="store_true")
    mode.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme, text = ROOT / "README.md", section()
    if not (options.readme or options.check):
        print(text)
        return 0
    before = readme.read_text()
    if BEGIN not in before or END not in before:
        print(f"bench.compare: {readme} has no line {BEGIN}", file=sys.stderr)
        return 1
    after = before[: before.index(BEGIN)] + text + before[before.index(END) + len(END) :]
    if options.check and after != before:
        print(
            f"bench.compare: {readme} differs from bench/results; run python -m bench.compare --readme", file=sys.stderr
        )
        return 1
    if options.readme:
        readme.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
