"""The same merge in the plain way, by other truncations; in this process, or as a script from file to file.

    python -m bench.rivals {average,svd_lowrank} BASE EXPERT… OUT

``average`` is what a user would write without a package: load, add, divide, save. The peers' own code, which needs the
environment of ``make bench-peers``, is called in ``bench/peers.py``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

StateDict = dict[str, Tensor]
Truncate = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# The textbook's defaults, of svd_lowrank and of svd="textbook" alike.
OVERSAMPLING, ITERATIONS = 8, 2
SHARE = 0.1  # of the short side, that a residual is truncated to


def full_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """By ``torch.linalg.svd``."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def svd_lowrank(x: Tensor, rank: int, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """By ``torch.svd_lowrank``, which is seeded by torch's global generator."""
    u, s, v = torch.svd_lowrank(x, q=rank + OVERSAMPLING, niter=iterations)
    return u[:, :rank] * s[:rank], v[:, :rank].mT


def textbook_products(residuals: Sequence[Tensor], ranks: Sequence[int]) -> None:
    """The products of the textbook's randomized SVD and nothing else: no start, no QR, no SVD, residuals formed.

    X·Ω, then XᵀQ and XQ for every power iteration, then QᵀX; contiguous (short side, width) blocks throughout.
    """
    for x, rank in zip(residuals, ranks, strict=True):
        block = x.new_full((x.shape[1], rank + OVERSAMPLING), 0.01)
        tall = x @ block
        for _ in range(ITERATIONS):
            block = x.mT @ tall
            tall = x @ block
        tall.mT @ x


def rank_of(tensor: Tensor, share: float = SHARE) -> int:
    """The rank of a matrix: a share of the short side, rounded up."""
    return math.ceil(share * min(tensor.shape))


def residuals_of(base: StateDict, experts: Sequence[StateDict]) -> dict[str, Tensor]:
    """Residuals of a merge, formed whole: name → (N, m, n)."""
    return {name: rows - common for name, (rows, common) in _parts(base, experts)[0].items()}


def _parts(base: StateDict, experts: Sequence[StateDict]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Name → task vectors (N, m, n) and core (m, n); and the core's coefficients (N,)."""
    tau = {name: torch.stack([expert[name] - tensor for expert in experts]) for name, tensor in base.items()}
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for rows in tau.values():
        flat = rows.flatten(1).double()
        gram += flat @ flat.T
    values, vectors = torch.linalg.eigh(gram)
    along = vectors[:, -1:] / values[-1].sqrt()
    core = (along @ along.T @ gram).mean(1).float()
    return {name: (rows, torch.einsum("i,imn->mn", core, rows)) for name, rows in tau.items()}, core


def plain_merge(base: StateDict, experts: Sequence[StateDict], truncate: Truncate) -> StateDict:
    """R²M with truncated residuals as one would write it first: everything formed, one truncation a residual."""
    count = len(experts)
    parts, _ = _parts(base, experts)
    kept, squares, shared = {}, torch.zeros(count, dtype=torch.float64), 0.0
    for name, (rows, common) in parts.items():
        factors = [truncate(row - common, rank_of(common)) for row in rows]
        kept[name] = torch.stack([left @ right for left, right in factors])
        squares += kept[name].double().square().sum((1, 2))
        shared += float(common.double().square().sum())
    norms = squares.sqrt()
    scales = (norms.mean() / norms).float()
    term = math.sqrt(
        sum(float(torch.einsum("i,imn->mn", scales / count, rows).square().sum()) for rows in kept.values())
    )
    eta = 0.6 * math.sqrt(shared) / term
    return {
        name: tensor + parts[name][1] + torch.einsum("i,imn->mn", eta / count * scales, kept[name])
        for name, tensor in base.items()
    }


def average(experts: Sequence[StateDict]) -> StateDict:
    """The mean of the experts."""
    return {name: torch.stack([expert[name] for expert in experts]).mean(0) for name in experts[0]}


def main(arguments: Sequence[str]) -> int:
    """From files to a file."""
    method, base, *experts, out = arguments
    states = [load_file(path) for path in experts]
    if method == "average":
        merged = average(states)
    elif method == "svd_lowrank":
        merged = plain_merge(load_file(base), states, svd_lowrank)
    else:
        raise SystemExit(f"bench.rivals: expected average or svd_lowrank, got {method!r}")
    save_file(merged, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
