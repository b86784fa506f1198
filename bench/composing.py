"""What ``r2m add`` costs beside merging again from nothing, with truncations kept of each expert where there are any.

    python -m bench.composing DIRECTORY --only METHOD… [--shares] [--blocks 2] [--repeats 1] [--json FILE]

Per method, as commands on files of ViT-L/14's blocks: a merge of three with ``--keep-factors`` where that can be, one
more added, and four merged from nothing; seconds of each, of the steps too, and bytes that are kept. Both results have
to be the same to the byte, or the exit code is 1. Beside them, on one thread, what a store could save at most where
nothing is kept: for the default, whose residuals all change, the sketches (Sᵀ Σ_j M_ji τ_j is Σ_j M_ji Sᵀ τ_j, so
that sketches of task vectors would do); for TSV-M all but the pass that makes four experts' bases orthogonal together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from bench.cases import write_checkpoints
from bench.machine import RESULTS, machine, write_json
from r2m_kernels import MergeConfig, analyze, spectra
from r2m_kernels._native.residuals import NativeResiduals

BAR = 0.6
# Method → its options, and whether truncations can be kept.
METHODS = {
    "star": ("--method star", True),
    "r2m without a core": ("--method r2m --real-rank 0", True),
    "mono_soup": ("--method mono_soup", True),
    "tsv_m": ("--method tsv_m", False),
    "r2m": ("--method r2m", False),
}


def run(directory: Path, *words: str) -> float:
    """Seconds of a command."""
    command = [sys.executable, "-m", "r2m", *words, "--quiet"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def steps(out: Path) -> dict[str, float]:
    """Seconds of each step of a merge."""
    return {one["step"]: one["seconds"] for one in json.loads((out / "r2m_report.json").read_text())["steps"]}


def composed(directory: Path, name: str) -> dict[str, Any]:
    """One method, once."""
    options, keeps = METHODS[name]
    experts = [("--expert", f"e{i}=expert{i}.safetensors") for i in range(4)]
    three, kept, four = directory / "three", directory / "three.factors", directory / "four"
    for place in (three, kept, four):
        shutil.rmtree(place, ignore_errors=True)
    words = ["merge", "--base", "base.safetensors", *options.split()]
    first = [word for expert in experts[:3] for word in expert]
    row: dict[str, Any] = {"kept": keeps}
    row["three"] = run(directory, *words, *first, "--out", "three", *["--keep-factors"] * keeps)
    row["three steps"] = steps(three)
    row["kept bytes of three"] = sum(one.stat().st_size for one in kept.iterdir()) if keeps else 0
    row["add"] = run(directory, "add", "three", *experts[3])
    row["four"] = run(directory, *words, *(word for expert in experts for word in expert), "--out", "four")
    row["add steps"], row["four steps"] = steps(three), steps(four)
    row["expert bytes"] = (directory / "expert0.safetensors").stat().st_size
    row["same bytes"] = (three / "model.safetensors").read_bytes() == (four / "model.safetensors").read_bytes()
    row["quotient"] = row["add"] / row["four"]
    return row


def shared(directory: Path) -> dict[str, Any]:
    """Of merges of four in memory, seconds in sketches and in joint bases."""
    names = ("base", "expert0", "expert1", "expert2", "expert3")
    base, *experts = (load_file(directory / f"{name}.safetensors") for name in names)
    torch.set_num_threads(1)
    parts = {
        "r2m": (MergeConfig.r2m(), NativeResiduals, ("sketch",)),
        "tsv_m": (MergeConfig.tsv_m(), spectra, ("_polar",)),
    }
    found: dict[str, Any] = {}
    for method, (config, place, functions) in parts.items():
        taken = dict.fromkeys(functions, 0.0)
        with contextlib.ExitStack() as stack:
            for name in functions:
                stack.enter_context(mock.patch.object(place, name, _timed(getattr(place, name), name, taken)))
            start = time.perf_counter()
            analyze(base, experts, config, backend="native").merge()
            whole = time.perf_counter() - start
        found[method] = {"merge": whole, **taken, "share": sum(taken.values()) / whole}
    return found


def _timed(function: Callable[..., Any], name: str, taken: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        taken[name] += time.perf_counter() - start
        return result

    return timed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=[], metavar="METHOD")
    parser.add_argument("--shares", action="store_true", help="what a store could save at most, too")
    parser.add_argument("--json", type=Path, default=RESULTS / "composing.json")
    asked = parser.parse_args()
    directory = asked.directory / str(asked.blocks)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "expert3.safetensors").exists():
        write_checkpoints(directory, asked.blocks, 4)
    known = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    known["machine"] = machine()
    wrong = False
    for name in asked.only:
        rows = [composed(directory, name) for _ in range(asked.repeats)]
        quotient = statistics.median(row["quotient"] for row in rows)
        wrong |= not all(row["same bytes"] for row in rows)
        known[f"{name}, {asked.blocks} blocks"] = {"quotient": quotient, "bar": BAR, "runs": rows}
        print(f"{name}: add / four from nothing {quotient:.2f}; same bytes {all(row['same bytes'] for row in rows)}")
        write_json(asked.json, known)
    if asked.shares:
        known[f"shares, {asked.blocks} blocks"] = found = shared(directory)
        print(*(f"{method}: {one['share']:.0%}" for method, one in found.items()))
        write_json(asked.json, known)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
