"""Do merges stay within ``--memory-budget``, or does ``r2m plan`` say the higher figure before? Every method, measured.

    python -m bench.memory [DIRECTORY] [--only METHOD…] [--budgets 64MiB…] [--threads 1…] [--formats pth…] [--again]

Base and three experts of 1.2 times the budget: a large matrix, many of 4 MiB, some small tensors. Each merge is a
process of its own, whose peak beyond its imports the kernel tells. Rows go into the JSON one by one, so that a run may
be cut off; what is there already is measured again with ``--again`` alone. Format pth is written from the tensors of a
whole merge to safetensors: its peak is at least that one's. Inputs stay in DIRECTORY, where one is given, for the next
run. Imports nothing heavy, and nothing that settles memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

EXPERTS = ("a", "b", "c")
BUDGETS = ("64MiB", "256MiB", "1GiB")
THREADS = (1, 2, 4)
SHORT, ALIKE = 640, (4096, 256)  # the large matrix's short side; each of the many
SHARE, PLANNED = 1.2, 0.1  # of the budget; what a higher figure may be off


class Case(NamedTuple):
    """One merge."""

    method: str
    format: str
    threads: int
    budget: str


def shapes(budget: int) -> dict[str, tuple[int, ...]]:
    """Of a base whose merge with three experts reads 1.2 times the budget."""
    elements = int(0.3 * budget) // 4
    large = (max(SHORT, elements // 3 // SHORT), SHORT)
    count = (elements - math.prod(large)) // math.prod(ALIKE)
    many: dict[str, tuple[int, ...]] = {f"blocks.{index}.weight": ALIKE for index in range(count)}
    return {"large.weight": large, **many, "norm.weight": (768,), "norm.running_mean": (768,), "small.weight": (96, 12)}


def write_inputs(directory: Path, budget: int) -> None:
    """Files of a base and its experts."""
    import torch
    from safetensors.torch import save_file

    from bench.cases import decaying

    source = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=source) for name, shape in shapes(budget).items()}
    save_file(base, directory / "base.safetensors")
    for name in EXPERTS:
        noise = {key: torch.rand(tensor.shape, generator=source) for key, tensor in base.items() if tensor.ndim == 1}
        moved = {key: decaying(*tensor.shape, source) for key, tensor in base.items() if tensor.ndim == 2} | noise
        state = {key: tensor + 0.02 * moved[key] for key, tensor in base.items()}
        save_file(state, directory / f"{name}.safetensors")


def status(field: str) -> int:
    """Bytes that the kernel tells of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds that something takes, and bytes beyond what this process holds before, as the kernel tells its peak."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    started = time.perf_counter()
    work()
    return time.perf_counter() - started, status("VmHWM") - before


def measured(directory: Path, case: Case) -> dict[str, int]:
    """What the plan says, and what the merge takes beyond this process's imports, in bytes."""
    from r2m.commands.process import settle_memory

    settle_memory()
    from r2m.merge import merge_files, plan_merge
    from r2m.options import Options
    from r2m.recipe import Expert, Recipe

    from r2m_kernels.config import make_config

    experts = Expert.each({name: str(directory / f"{name}.safetensors") for name in EXPERTS})
    recipe = Recipe(str(directory / "base.safetensors"), experts, make_config(case.method, {}), format=case.format)
    options = Options(memory_budget=case.budget)
    _, taken = peak(lambda: merge_files(recipe, directory / "out", options))
    planned, _ = plan_merge(recipe, directory / "planned", options)
    return {"taken": taken, "planned": planned.shares[0].memory, "over": len(planned.over)}


def run(directory: Path, case: Case) -> dict[str, Any]:
    """A row."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for name in ("base", *EXPERTS):
            os.link(directory / f"{name}.safetensors", Path(scratch, f"{name}.safetensors"))
        command = [sys.executable, "-m", "bench.memory", scratch, "--case", json.dumps(case)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{case}\n{done.stderr[-2000:]}")
    return {**case._asdict(), **json.loads(done.stdout.splitlines()[-1])}


def judged(row: dict[str, Any], budget: int) -> dict[str, Any]:
    """With the quotients that bars are on, and whether they are met."""
    share, planned = row["taken"] / budget, row["planned"] / row["taken"]
    told = share <= SHARE or abs(planned - 1) <= PLANNED
    return {**row, "of_budget": round(share, 3), "planned_of_taken": round(planned, 3), "met": told}


def main() -> int:
    from bench.machine import RESULTS, machine, write_json
    from r2m_kernels.checks import byte_size
    from r2m_kernels.config import OFFERED

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", default=list(OFFERED), metavar="METHOD")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--formats", nargs="+", default=["pth"])
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    rows: dict[Case, dict[str, Any]] = {}
    if options.json.exists():
        known = json.loads(options.json.read_text())["runs"]
        rows = {Case(*(row[field] for field in Case._fields)): row for row in known}
    with tempfile.TemporaryDirectory() as folder:
        for budget in options.budgets:
            size = byte_size("budget", budget)
            cases = [
                Case(method, kind, threads, budget)
                for kind in options.formats
                for threads in options.threads
                for method in options.only
            ]
            left = [case for case in cases if options.again or case not in rows]
            if not left:
                continue
            directory = Path(options.directory or folder, budget)
            if not Path(directory, f"{EXPERTS[-1]}.safetensors").exists():
                directory.mkdir(exist_ok=True)
                script = f"from bench.memory import *; write_inputs(Path({str(directory)!r}), {size})"
                subprocess.run([sys.executable, "-c", script], check=True)
            for case in left:
                rows[case] = judged(run(directory, case), size)
                print(json.dumps(rows[case]), flush=True)
                result = {"machine": machine(), "runs": list(rows.values())}
                write_json(options.json, result)
    missed = [row for row in rows.values() if not row["met"]]
    print(f"{len(rows)} merges, {len(missed)} neither within {SHARE} x the budget nor told to {PLANNED:.0%} before")
    return 1 if missed else 0


if __name__ == "__main__":
    if "--case" in sys.argv:
        at = sys.argv.index("--case")
        print(json.dumps(measured(Path(sys.argv[1]), Case(*json.loads(sys.argv[at + 1])))))
    else:
        raise SystemExit(main())
