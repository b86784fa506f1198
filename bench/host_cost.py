"""What does a merge on a GPU cost the host? Launches, waits and allocations of whole merges, counted with no GPU.

    python -m bench.host_cost [--json FILE] [--job NAME ...] [--lines 15]

State dicts have the numbers of tensors that real models have, and tiny shapes: nothing here depends on sizes but which
way a truncation takes, and short sides of more than 64 are sketched. :mod:`bench.pretended_gpu` counts and computes;
a result that is not what the torch backend makes of the same inputs is told, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

import torch
import triton

from bench.cases import StateDict
from bench.machine import ROOT, machine, write_json
from bench.markdown import table
from bench.pretended_gpu import KINDS, Counts, DeviceTensor, host, pretended_gpu
from r2m_kernels import MergeConfig, merge

EXPERTS = 3
SKETCHED = 72  # width of a model whose truncations are sketched: up to 64 they are exact
NARROW = 4

Shapes = dict[str, tuple[int, ...]]


def vit(blocks: int, width: int) -> Shapes:
    """CLIP's image tower as transformers has it: 392 tensors in 24 blocks, which are ViT-L/14's."""
    wide = width + 8
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 6, 6),
        "embeddings.position_embedding.weight": (2 * width + 1, width),
        "visual_projection.weight": (width + 4, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for block in range(blocks):
        prefix = f"encoder.layers.{block}."
        norms += [f"{prefix}layer_norm1", f"{prefix}layer_norm2"]
        attention = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        for layer, shape in {**attention, "mlp.fc1": (wide, width), "mlp.fc2": (width, wide)}.items():
            shapes |= {f"{prefix}{layer}.weight": shape, f"{prefix}{layer}.bias": shape[:1]}
    return shapes | {f"{norm}.{name}": (width,) for norm in norms for name in ("weight", "bias")}


def cnn(layers: int, width: int) -> Shapes:
    """Convolutions, each with batch normalization: 6 tensors a layer, three of them statistics."""
    shapes: Shapes = {}
    for layer in range(layers):
        shapes[f"layers.{layer}.conv.weight"] = (width, width // 4, 2, 2) if layer % 2 else (width + 8, width, 1, 1)
        outputs = shapes[f"layers.{layer}.conv.weight"][:1]
        shapes |= {f"layers.{layer}.bn.{name}": outputs for name in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"layers.{layer}.bn.num_batches_tracked"] = ()
    return shapes


@dataclass(frozen=True)
class Job:
    """A merge.

    Attributes:
        shapes: of the base's tensors.
        config: how to merge.
        noise: of a task vector beside its directions, as a share of their length, so much that no residual is steep,
            which would be truncated once more, and that far more is cut off than bfloat16 rounds, as of what people
            fine-tune; 0: merged LoRA.
        bound: of the distance to the torch backend's result, relative to the update. Both round float32 sums once an
            element; where residuals are sketched, each backend by its own random numbers, a truncation may lose 2 per
            cent more than the optimum, and what is lost here is a tenth of the update at most, with more noise more.
    """

    shapes: Shapes
    config: MergeConfig
    noise: float = 0.15
    bound: float = 3e-2


ROWS = MergeConfig.r2m(rank=1.0, row_power=1.0)
JOBS = {
    "ViT-L default": Job(vit(24, SKETCHED), MergeConfig.r2m(), noise=0.45, bound=9e-2),
    "ViT-L rows": Job(vit(24, NARROW), ROWS, bound=1e-6),
    "ViT-L average": Job(vit(24, NARROW), MergeConfig.weight_average(), bound=1e-6),
    "ViT-L lora": Job(vit(24, SKETCHED), MergeConfig.r2m(), noise=0.0),
    "ViT-B default": Job(vit(12, SKETCHED), MergeConfig.r2m(), noise=0.45, bound=9e-2),
    "CNN default": Job(cnn(160, SKETCHED), MergeConfig.r2m(), noise=0.45, bound=9e-2),
    "CNN rows": Job(cnn(160, NARROW), ROWS, bound=1e-6),
}


def states(job: Job) -> list[StateDict]:
    """A base and experts: changes of a few directions, as fine-tuning makes them, and noise."""
    source = torch.Generator().manual_seed(0)

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0:
            return tensor + 1
        m, n = len(tensor), tensor[0].numel()
        directions = torch.randn(m, 4, generator=source) @ torch.randn(4, n, generator=source) / 2
        noise = torch.randn(m, n, generator=source) * job.noise
        return tensor + 0.002 * (directions + noise).view(tensor.shape)

    base = {
        name: torch.randn(shape, generator=source) * 0.02 if shape else torch.tensor(100)
        for name, shape in job.shapes.items()
    }
    return [base, *({name: changed(tensor) for name, tensor in base.items()} for _ in range(EXPERTS))]


def counted(job: Job) -> tuple[Counts, float]:
    """What a merge makes the host do, and how far its result is from the torch backend's, relative to the update."""
    base, *experts = states(job)
    ours = [{name: DeviceTensor(tensor) for name, tensor in state.items()} for state in (base, *experts)]
    with pretended_gpu() as counts:
        merged = merge(ours[0], ours[1:], job.config, backend="triton")
    expected = merge(base, experts, job.config, backend="torch")
    changes = [(expected[name] - tensor, host(merged[name]) - expected[name]) for name, tensor in base.items()]
    update, error = (sum(float(one.double().square().sum()) for one in of_one) for of_one in zip(*changes, strict=True))
    return counts, (error / update) ** 0.5


def measured(name: str) -> tuple[dict[str, Any], Counts]:
    """A job's row, and the counts by line."""
    start = time.perf_counter()
    counts, error = counted(JOBS[name])
    passed = error <= JOBS[name].bound
    tensors = len(JOBS[name].shapes)
    row = {"job": name, "tensors": tensors, "experts": EXPERTS, **counts.kinds, "error": error, "passed": passed}
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return row, counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host_cost", description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--job", action="append", choices=JOBS, help="only this one; may be repeated")
    parser.add_argument("--lines", type=int, default=0, help="also print so many lines of each kind, the first first")
    options = parser.parse_args()
    # As the tests do, and for the same reason.
    sys.path.append(str(ROOT / "tests" / "kernels"))
    importlib.import_module("interpreter").lose_no_time()
    rows = []
    for name in options.job or JOBS:
        row, counts = measured(name)
        rows.append(row)
        for kind in KINDS if options.lines else ():
            print(f"\n{name}: {counts.kinds[kind]} {kind}")
            for line, count in counts.lines[kind].most_common(options.lines):
                print(f"{count:8} {line}")
    head = ["job", "tensors", *KINDS, "error", "passed"]
    print(table(head, [[f"{row[one]:.1e}" if one == "error" else str(row[one]) for one in head] for row in rows]))
    if options.json:
        here = {**machine(), "triton": triton.__version__}
        write_json(options.json, {"machine": here, "jobs": rows})
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
