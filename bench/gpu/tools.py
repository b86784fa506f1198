"""Where a merge's time goes, and whether a sanitizer is content: torch.profiler, ncu, nsys, compute-sanitizer.

    python -m bench.gpu --only tools
    python -m bench.gpu.tools [--large]     # the merge that the tools look at

What is not on the machine is said and passes. Beside what the profiler counts stand the counts of ``bench.host_cost``,
which has no GPU.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import shutil
import subprocess
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import StateDict, block_shapes
from bench.gpu import checks
from bench.gpu.merges import seconds
from bench.gpu.record import Record, Session, table
from bench.gpu.usual import MODELS, TINY
from bench.machine import RESULTS, ROOT
from r2m_kernels import MergeConfig, merge

# Of the runtime's calls: those in which the host waits.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
# Kernels that ncu looks at, the first launch of each with each grid, and what it counts.
KERNELS = "task_gram|row_grams|form_residuals|residual_gram|residual_product|unit_rows|units_(gram|factor|product)"
KERNELS += "|vectors_gram|inverse_factor|triangular_product|lengths|weigh_rows|combine"
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes.sum": "memory_bytes",
    "lts__t_bytes.sum": "l2_bytes",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__inst_executed_pipe_tensor.sum": "tensor_instructions",
    "launch__registers_per_thread": "registers",
}
LARGE = [sys.executable, "-m", "bench.gpu.tools", "--large"]
SMALL = [sys.executable, "-m", "bench.gpu.tools"]
COUNTS = [*("ncu", "--target-processes", "all", "--clock-control", "none", "--csv"), "--metrics", ",".join(METRICS)]
# Name → command, and seconds at most.
TOOLS: dict[str, tuple[list[str], float]] = {
    "ncu": ([*COUNTS, "--kernel-name", f"regex:{KERNELS}", "--launch-count", "100", *LARGE], 100),
    "compute-sanitizer memcheck": (["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *SMALL], 60),
    "compute-sanitizer racecheck": (["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *SMALL], 60),
    "nsys": (["nsys", "profile", "--stats=true", "--force-overwrite=true", "--output=/tmp/r2m_nsys", *LARGE], 60),
}


def profiled(session: Session, states: list[StateDict], config: MergeConfig, counted: str) -> dict[str, Any]:
    """A merge's wall time, how long kernels ran in it, and what the host asked for, beside the counts without a GPU."""
    base, *experts = states
    work = functools.partial(merge, base, experts, config, backend="triton")
    wall = seconds(session, work, repeats=5)
    activities = [ProfilerActivity.CPU, *([] if session.rehearsal else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as recorded:
        work()
        session.synchronize()
    events = recorded.events() or []
    on_device = [one for one in events if one.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((one.time_range.start, one.time_range.end) for one in on_device)
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
    names = [one.name for one in events]
    row: dict[str, Any] = {
        "passed": True,
        "busy_milliseconds": busy / 1e3 if spans else None,
        "span_milliseconds": (until - spans[0][0]) / 1e3 if spans else None,
        "wall_milliseconds": None if wall is None else wall * 1e3,  # when nobody looks on
        "wall_minus_busy_milliseconds": wall * 1e3 - busy / 1e3 if wall is not None and spans else None,
        "kernels": sum("memcpy" not in one.name.lower() and "memset" not in one.name.lower() for one in on_device),
        "waits": sum(name in WAITS for name in names),
        "launches": sum("LaunchKernel" in name for name in names),
    }
    known = json.loads((RESULTS / "host_cost.json").read_text(encoding="utf-8"))["jobs"]
    without = next((one for one in known if one["job"] == counted), {})
    row["without_a_gpu"] = {key: without.get(key) for key in ("waits", "triton_launches", "aten_kernels")}
    return row


def looked_at(session: Session, name: str) -> dict[str, Any]:
    """What a tool found; that it is not there is no failure."""
    command, limit = TOOLS[name]
    if shutil.which(command[0]) is None:
        print(f"{command[0]}: not on this machine", flush=True)
        return {"found": False, "passed": True}
    if session.rehearsal:
        return {"found": True, "passed": True, "left_out": "a rehearsal has no GPU"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=min(limit, session.left() - 2)
        )
    except subprocess.TimeoutExpired:
        return {"found": True, "passed": True, "left_out": "it took too long"}
    row: dict[str, Any] = {"found": True, "exit_code": done.returncode, "tail": (done.stdout + done.stderr)[-4000:]}
    # A profiler that this user may not use says so and finds nothing; a sanitizer's errors are ours.
    row["passed"] = done.returncode != 9
    if name == "ncu":
        row["kernels"] = counted_by_ncu(done.stdout)
    return row


def counted_by_ncu(text: str) -> list[dict[str, Any]]:
    """The first launch of each kernel with each grid, with what :data:`METRICS` call it."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    ids: dict[tuple[str, str], str] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        kernel, grid = key = row.get("Kernel Name", ""), row.get("Grid Size", "")
        metric = METRICS.get(row.get("Metric Name", ""))
        if metric and ids.setdefault(key, row["ID"]) == row["ID"]:
            value = float(row["Metric Value"].replace(",", ""))
            found.setdefault(key, {"kernel": kernel, "grid": grid})[metric] = value
    return list(found.values())


def run(session: Session, record: Record) -> bool:
    made = (TINY if session.rehearsal else MODELS)["ViT-L/14"]
    states = made(3, checks.generator(session.device, seed=0), torch.float32)
    jobs = {"ViT-L default": MergeConfig.r2m(), "ViT-L rows": MergeConfig.r2m(rank=1.0)}
    for name, config in jobs.items():
        if record.time_for(name, 8):
            record.attempt(functools.partial(profiled, session, states, config, name), job=name)
    states.clear()
    session.free_cache()
    times = [f"{time}_milliseconds" for time in ("busy", "span", "wall", "wall_minus_busy")]
    keys = (*times, "kernels", "launches", "waits")
    lines = [[row["job"], *(row.get(key) for key in keys)] for row in record.rows]
    table(["profiled merge", "busy ms", "span ms", "wall ms", "wall - busy ms", *keys[len(times) :]], lines)
    for name in TOOLS:
        if record.time_for(name, 15):
            record.attempt(functools.partial(looked_at, session, name), tool=name)
    lines = [
        [row["tool"], row.get("found"), row.get("exit_code"), row.get("left_out")]
        for row in record.rows
        if "tool" in row
    ]
    table(["tool", "found", "exit code", "left out"], lines)
    return record.close()


def main() -> None:
    """A merge on this GPU for a tool to look at: small, with odd rows, or of ViT-L/14's matrices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="matrices of ViT-L/14")
    large = parser.parse_args().large
    shapes = block_shapes(1024) if large else {"even": (384, 256), "odd": (257, 131), "small": (40, 72)}
    source = checks.generator(torch.device("cuda"), seed=0)
    states: list[StateDict] = [{} for _ in range(4)]
    for name, shape in shapes.items():
        base, experts = checks.inputs(shape, torch.float32, 3, source)
        for state, tensor in zip(states, (base, *experts), strict=True):
            state[name] = tensor
            state[f"{name}.bias"] = tensor[0].clone()
    for config in (MergeConfig.r2m(), MergeConfig.r2m(rank=1.0)):
        merge(states[0], states[1:], config, backend="triton")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
