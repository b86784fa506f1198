"""How much faster than full SVDs is the merge, at what error? One run, methods interleaved, correctness first.

    python -m bench.run [--blocks 1] [--experts 3] [--repeats 3] [--json FILE]

The job is that of ``merge`` with default options on Transformer blocks of ViT-L/14's size, in memory. The rivals do
the same merge in the plain way: residuals formed whole, each truncated by ``torch.linalg.svd`` or
``torch.svd_lowrank``. A time is printed only if the errors of the same run pass.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from r2m_kernels import MergeConfig, __version__, _torch, analyze, merge
from r2m_kernels.truncation import truncate_residuals, truncation_rank

WIDTH = 1024
BLOCK = {
    "attention.q": (WIDTH, WIDTH),
    "attention.k": (WIDTH, WIDTH),
    "attention.v": (WIDTH, WIDTH),
    "attention.out": (WIDTH, WIDTH),
    "mlp.up": (4 * WIDTH, WIDTH),
    "mlp.down": (WIDTH, 4 * WIDTH),
}
ERROR_BAR = 1.02  # of the optimum, the contract of the default settings
StateDict = dict[str, Tensor]


def checkpoints(blocks: int, experts: int) -> tuple[StateDict, list[StateDict]]:
    """A base and experts whose task vectors have a common part and singular values falling like k^-1/2."""
    generator = torch.Generator().manual_seed(0)

    def decaying(m: int, n: int) -> Tensor:
        size = min(m, n)
        weights = torch.arange(1, size + 1).rsqrt()
        left, right = torch.randn(m, size, generator=generator), torch.randn(size, n, generator=generator)
        return (left * weights) @ right / size

    base, states = {}, [{} for _ in range(experts)]
    for block in range(blocks):
        for name, (m, n) in BLOCK.items():
            key = f"blocks.{block}.{name}.weight"
            base[key] = 0.02 * torch.randn(m, n, generator=generator)
            common = decaying(m, n)
            for state in states:
                state[key] = base[key] + 0.02 * (0.6 * common + decaying(m, n))
    return base, states


def full_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def svd_lowrank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(x, q=rank + 8, niter=2)
    return u[:, :rank] * s[:rank], v[:, :rank].T


def plain_merge(base: StateDict, experts: list[StateDict], truncate: Callable[..., tuple[Tensor, Tensor]]) -> StateDict:
    """The default R²M merge of matrices as one would write it first: everything formed, one SVD a residual."""
    count = len(experts)
    tau = {name: torch.stack([expert[name] - tensor for expert in experts]) for name, tensor in base.items()}
    gram = sum(rows.flatten(1).double() @ rows.flatten(1).double().T for rows in tau.values())
    values, vectors = torch.linalg.eigh(gram)
    along = vectors[:, -1:] / values[-1].sqrt()
    core = (along @ along.T @ gram).mean(1).float()
    kept, squares, shared = {}, torch.zeros(count, dtype=torch.float64), 0.0
    for name, rows in tau.items():
        common = torch.einsum("i,imn->mn", core, rows)
        rank = truncation_rank(MergeConfig().rank, common.shape)
        factors = [truncate(row - common, rank) for row in rows]
        kept[name] = torch.stack([left @ right for left, right in factors])
        squares += kept[name].double().square().sum((1, 2))
        shared += float(common.double().square().sum())
    norms = squares.sqrt()
    scales = (norms.mean() / norms).float()
    term = math.sqrt(
        sum(float(torch.einsum("i,imn->mn", scales / count, rows).square().sum()) for rows in kept.values())
    )
    eta = MergeConfig().eta * math.sqrt(shared) / term
    return {
        name: tensor
        + torch.einsum("i,imn->mn", core, tau[name])
        + torch.einsum("i,imn->mn", eta / count * scales, kept[name])
        for name, tensor in base.items()
    }


def worst_error(base: StateDict, experts: list[StateDict]) -> float:
    """Largest ‖X − F‖ / optimum over tensors and experts: residuals formed whole, against full singular values."""
    mixing = analyze(base, experts, rank=1).real_subspace.mixing
    worst = 0.0
    for name, theta in base.items():
        thetas = [expert[name] for expert in experts]
        rank = truncation_rank(MergeConfig().rank, theta.shape)
        group = ([name], [theta], [[other] for other in thetas])
        (factors,) = truncate_residuals(*group, mixing, rank, MergeConfig(), _torch)
        tau = torch.stack([other.double() - theta.double() for other in thetas])
        residuals = torch.einsum("ji,jmn->imn", mixing, tau)
        for residual, left, right in zip(residuals, factors.left.double(), factors.right.double(), strict=True):
            optimum = torch.linalg.svdvals(residual)[rank:].norm()
            worst = max(worst, float((residual - left @ right).norm() / optimum))
    return worst


def machine() -> dict[str, object]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "r2m_kernels"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "r2m_kernels": __version__,
        "commit": commit + ("+changes" if changed.stdout.strip() else ""),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("bench/results/cpu_merge.json"))
    options = parser.parse_args()

    base, experts = checkpoints(options.blocks, options.experts)
    ours = merge(base, experts)
    exact = plain_merge(base, experts, full_svd)
    error = worst_error(base, experts)
    update = math.sqrt(sum(float((exact[name] - base[name]).square().sum()) for name in base))
    apart = math.sqrt(sum(float((exact[name] - ours[name]).square().sum()) for name in base)) / update
    print(f"truncation error, worst of all residuals: {error:.4f} x the optimum (bar {ERROR_BAR})")
    print(f"merged updates differ by {apart:.3f} of their norm (near-optimal truncations of a gapless spectrum do)")
    if not error <= ERROR_BAR:
        print("FAILED: no time is reported for a wrong result")
        return 1

    methods: dict[str, Callable[[], object]] = {
        "r2m_kernels": lambda: merge(base, experts),
        "full SVD": lambda: plain_merge(base, experts, full_svd),
        "svd_lowrank": lambda: plain_merge(base, experts, svd_lowrank),
        "weight average": lambda: merge(base, experts, MergeConfig.weight_average()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.repeats):
        for name, run in methods.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:>15}: {median:8.2f} s, {median / medians['r2m_kernels']:6.2f} x r2m_kernels")
    result = {
        "job": {
            "blocks": options.blocks,
            "experts": options.experts,
            "parameters": sum(t.numel() for t in base.values()),
        },
        "machine": machine(),
        "worst_truncation_error": error,
        "update_apart_from_full_svd": apart,
        "seconds": seconds,
        "ratio_to_r2m_kernels": {name: median / medians["r2m_kernels"] for name, median in medians.items()},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
