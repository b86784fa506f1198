"""Does a merge scale over processes as ``r2m plan`` predicts, and touch no bit? Real runs at 1 to 4, forecasts to 64.

    python -m bench.scaling [--blocks 24] [--repeats 3] [--json bench/results/scaling.json]

Runs interleaved: one process with all cores, then ``torchrun`` with 1 to 4 processes, whose outputs must be equal to
the bit. Beside them what was predicted from rates measured on the same machine, and a forecast for a 7B model in
bfloat16 (headers only: its files are holes).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from r2m import machine as this
from r2m.checkpoints.safetensors_file import plan_files
from r2m.forecast import Rates, Resources, measured_rates
from r2m.job import Job, open_job
from r2m.options import Options
from r2m.recipe import Expert, Recipe

from bench.cases import write_checkpoints
from bench.machine import RESULTS, machine, write_json
from r2m_kernels import MergeConfig
from r2m_kernels.streaming import TensorSpec

EXPERTS = 3
METHODS = {"r2m": MergeConfig.r2m(), "rows": MergeConfig.r2m(rank=1.0, row_power=3.0)}
PROCESSES = (1, 2, 3, 4)
FORECAST = (1, 2, 4, 8, 16, 32, 64)
BUDGET = "2GiB"


def run(directory: Path, method: str, processes: int | None) -> tuple[float, float]:
    """Seconds of a merge by one process with all cores, or by ``torchrun`` with some that share them.

    Returns:
        Of the whole command, and from when its processes begin with the merge.
    """
    cores = this.cores()
    command = [sys.executable, "-m"]
    if processes is not None:
        command += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    experts = [word for i in range(EXPERTS) for word in ("--expert", f"e{i}={directory / f'expert{i}.safetensors'}")]
    out = directory / (f"{method}-{processes}" if processes else method)
    threads = max(1, cores // (processes or 1))
    command += ["r2m", "merge", "--base", str(directory / "base.safetensors"), *experts, "--method", method]
    command += ["--out", str(out), "--overwrite", "--quiet", "--memory-budget", BUDGET]
    started = time.perf_counter()
    subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stderr=subprocess.DEVNULL,
        check=True,
    )
    whole = time.perf_counter() - started
    report = json.loads((out / "r2m_report.json").read_text())
    return whole, float(report["output"]["seconds"])


def same(directory: Path, method: str) -> bool:
    whole = (directory / method / "model.safetensors").read_bytes()
    outputs = (directory / f"{method}-{count}" / "model.safetensors" for count in PROCESSES)
    return all(path.read_bytes() == whole for path in outputs)


def opened(directory: Path, method: str, budget: str) -> Job:
    experts = Expert.each({f"e{i}": directory / f"expert{i}.safetensors" for i in range(EXPERTS)})
    recipe = Recipe(str(directory / "base.safetensors"), experts, METHODS[method])
    return open_job(recipe, Options(memory_budget=budget))


def predicted(directory: Path, method: str, rates: Rates, processes: int) -> float:
    job = opened(directory, method, BUDGET)
    cores = this.cores()
    forecast = job.forecast(directory, Resources(job.budget, processes, max(1, cores // processes)))
    return forecast.seconds(rates, cores)


def large_model(directory: Path) -> None:
    """A 7B model's files of bfloat16 in the layout of Llama: headers, and holes for data."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (32000, 4096), "head": (32000, 4096), "norm": (4096,)}
    for layer in range(32):
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}.attention.{name}"] = (4096, 4096)
        shapes |= {f"{layer}.mlp.gate": (11008, 4096), f"{layer}.mlp.up": (11008, 4096)}
        shapes |= {f"{layer}.mlp.down": (4096, 11008), f"{layer}.norm1": (4096,), f"{layer}.norm2": (4096,)}
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    (file,) = plan_files(specs, {}, 2**60)
    for name in ("base", *(f"expert{i}" for i in range(EXPERTS))):
        path = directory / f"{name}.safetensors"
        path.write_bytes(file.header)
        os.truncate(path, file.size)


def forecasts(directory: Path, rates: Rates) -> list[dict[str, Any]]:
    large_model(directory)
    rows = []
    for method in METHODS:
        job = opened(directory, method, "4GiB")
        for processes in FORECAST:
            forecast = job.forecast(directory, Resources(job.budget, processes))
            work = [share.used / rates.compute + share.flops / rates.flops for share in forecast.shares]
            rows.append(
                {
                    "method": method,
                    "processes": processes,
                    "seconds_of_merge": forecast.seconds(rates, processes) - rates.start,
                    "largest_share": max(work) / sum(work),
                    "read_bytes": forecast.read,
                    "spilled_bytes": sum(share.spill for share in forecast.shares),
                    "memory_bytes": max(share.memory for share in forecast.shares),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--forecast", action="store_true", help="from the rates in the JSON alone, nothing is run")
    options = parser.parse_args()
    if options.forecast:
        result = json.loads(options.json.read_text())
        with tempfile.TemporaryDirectory() as folder:
            result["forecast_7b"] = forecasts(Path(folder), Rates(**result["rates"]))
        write_json(options.json, result)
        return 0
    result: dict[str, Any] = {"machine": machine(), "blocks": options.blocks, "experts": EXPERTS, "budget": BUDGET}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        directory = Path(folder)
        write_checkpoints(directory, options.blocks, EXPERTS)
        os.sync()  # or the rate of writing is that of what is left of these files
        rates = measured_rates(directory / "base.safetensors", directory)
        rows = []
        for method in METHODS:
            times: dict[int | None, list[tuple[float, float]]] = {None: [], **{count: [] for count in PROCESSES}}
            for _ in range(options.repeats):
                for count, runs in times.items():
                    runs.append(run(directory, method, count))
            if not same(directory, method):
                print(f"{method}: outputs differ", file=sys.stderr)
                return 1
            alone = [statistics.median(values) for values in zip(*times[None], strict=True)]
            for count, runs in times.items():
                seconds = [statistics.median(values) for values in zip(*runs, strict=True)]
                row = {
                    "method": method,
                    "processes": count,
                    "seconds": seconds[0],
                    "seconds_of_merge": seconds[1],
                    "to_one_process": seconds[0] / alone[0],
                    "of_merge_to_one_process": seconds[1] / alone[1],
                    "predicted_of_merge": predicted(directory, method, rates, count or 1) - rates.start,
                }
                rows.append(row)
                print(row)
        large = directory / "large"
        large.mkdir()
        result |= {"runs": rows, "forecast_7b": forecasts(large, rates), "rates": rates.__dict__}
    write_json(options.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
