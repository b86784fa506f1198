"""Adapters merged by their factors against the copy of a file, and against merges of the models PEFT would unload.

    python -m bench.adapters [DIRECTORY] [--blocks 24] [--repeats 7] [--json bench/results/adapters.json]

A tower of ViT-L/14's size in float32 and three LoRAs of rank 16 on q, k, v and the output projection. Every merge is a
process of its own; seconds are those of the merge alone, and memory is its peak beyond the imports. A copy reads the
base in pieces and writes them to a new file, which is brought to the disk as a merge's is. Copies and merges by
factors are interleaved; what is compared with them in time or memory runs once.
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

NAMES = ("fs", "fr", "efs")
RANK, WIDTH, PATCHES = 16, 1024, 257
PIECE = 2**24
COPY = "copy of the base"
ADAPTERS, AVERAGE, MODELS = "adapters", "weight average of the models", "models"
SMALL = "512MiB"
# Name → experts are adapters, method, memory budget.
MERGES: dict[str, tuple[bool, str, str | None]] = {
    ADAPTERS: (True, "r2m", None),
    AVERAGE: (False, "weight_average", None),
    MODELS: (False, "r2m", None),
    f"{ADAPTERS}, {SMALL}": (True, "r2m", SMALL),
    f"{AVERAGE}, {SMALL}": (False, "weight_average", SMALL),
}
ONCE = tuple(name for name in MERGES if name != ADAPTERS)  # copy and adapters in pairs, what else takes long once


def write_inputs(directory: Path, blocks: int) -> None:
    """A base, adapters of PEFT's layout, and the models that they make of it."""
    import torch
    from r2m.arrangement import arrange
    from r2m.checkpoints.reader import open_checkpoint
    from r2m.recipe import Arrangement
    from safetensors.torch import save_file

    from bench.cases import block_shapes
    from r2m_kernels import MergeConfig

    source = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (WIDTH, 3, 14, 14),
        "position_embed": (1, PATCHES, WIDTH),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for block in range(blocks):
        for name, shape in block_shapes(WIDTH).items():
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{block}.{name}"] = (WIDTH,)
    base = {name: 0.02 * torch.randn(shape, generator=source) for name, shape in shapes.items()}
    save_file(base, directory / "base.safetensors")
    targets = [name.removesuffix(".weight") for name in base if ".attention." in name and name.endswith(".weight")]
    for name in NAMES:
        folder = directory / name
        folder.mkdir()
        factors = {
            f"base_model.model.{target}.lora_{side}.weight": 0.02 * torch.randn(shape, generator=source)
            for target in targets
            for side, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
        }
        save_file(factors, folder / "adapter_model.safetensors")
        about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
        (folder / "adapter_config.json").write_text(json.dumps(about))
        opened = open_checkpoint(directory / "base.safetensors", "base")
        adapter = open_checkpoint(folder, name, adapters=True)
        view = arrange(opened, {name: adapter}, MergeConfig(), Arrangement()).experts[name]
        save_file({key: view.read(key) for key in view.specs}, directory / f"{name}.safetensors")


def copied(source: Path, target: Path) -> dict[str, float]:
    """Seconds of a copy."""
    started = time.perf_counter()
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as written:
        while piece := read.read(PIECE):
            written.write(piece)
        os.fsync(written.fileno())
    return {"seconds": time.perf_counter() - started, "taken": 0}


def merged(directory: Path, name: str) -> dict[str, float]:
    """Seconds and bytes of a merge in this process, which must not have imported torch."""
    from r2m.commands.process import settle_memory

    settle_memory()
    from r2m.merge import merge_files
    from r2m.options import Options
    from r2m.recipe import Expert, Recipe

    from bench.memory import peak
    from r2m_kernels.config import make_config

    adapters, method, budget = MERGES[name]
    paths = {one: str(directory / (one if adapters else f"{one}.safetensors")) for one in NAMES}
    recipe = Recipe(str(directory / "base.safetensors"), Expert.each(paths), make_config(method, {}))
    seconds, taken = peak(lambda: merge_files(recipe, directory / "out", Options(memory_budget=budget)))
    report = json.loads((directory / "out" / "r2m_report.json").read_text())
    read = sum(step["bytes_read"] for step in report["steps"])
    return {"seconds": seconds, "taken": taken, "read": read}


def run(directory: Path, name: str, threads: int) -> dict[str, float]:
    """One run; what it wrote is gone."""
    target = directory / "copy"
    if name == COPY:
        found = copied(directory / "base.safetensors", target)
        target.unlink()
        return found
    command = [sys.executable, "-m", "bench.adapters", str(directory), "--run", name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    subprocess.run(["rm", "-r", str(directory / "out")], check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: float(value) for key, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inputs", type=Path, metavar="DIR", help="where they stay for another run; 0 repeats: no run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=MERGES, help="one merge, in this process")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(merged(options.directory, options.run)))
        return 0
    from bench.machine import RESULTS, machine, write_json

    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        directory = options.inputs or Path(folder)
        if not (directory / "base.safetensors").exists():
            script = f"from bench.adapters import *; write_inputs(Path({str(directory)!r}), {options.blocks})"
            subprocess.run([sys.executable, "-c", script], check=True)
        if options.repeats == 0:
            return 0
        os.sync()  # or the rate of writing is that of what is left of these files
        size = (directory / "base.safetensors").stat().st_size
        runs: dict[str, list[dict[str, float]]] = {}
        for repeat in range(options.repeats):
            for name in (COPY, *MERGES):
                if repeat == 0 or name not in ONCE:
                    runs.setdefault(name, []).append(run(directory, name, options.threads))
                    print(name, runs[name][-1], flush=True)
    rows: dict[str, dict[str, Any]] = {
        name: {
            "seconds": statistics.median(one["seconds"] for one in found),
            "peak_bytes": max(one["taken"] for one in found),
            "bytes_read": found[0].get("read"),
            "runs": found,
        }
        for name, found in runs.items()
    }
    fast, average = rows[ADAPTERS], rows[AVERAGE]
    little, little_average = rows[f"{ADAPTERS}, {SMALL}"], rows[f"{AVERAGE}, {SMALL}"]
    bars = {
        "adapters / copy, at most 1.3": fast["seconds"] / rows[COPY]["seconds"],
        "models / adapters, at least 4": rows[MODELS]["seconds"] / fast["seconds"],
        "peak of adapters / of the average, at most 1": fast["peak_bytes"] / average["peak_bytes"],
        f"the same under {SMALL}": little["peak_bytes"] / little_average["peak_bytes"],
    }
    result: dict[str, Any] = {"machine": machine(), "blocks": options.blocks, "rank": RANK, "adapters": len(NAMES)}
    result |= {"base_bytes": size, "threads": options.threads, "bars": bars, "rows": rows}
    write_json(options.json or RESULTS / "adapters.json", result)
    print(json.dumps(bars, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
