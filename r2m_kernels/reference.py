"""The whole method, naive and in float64: the definition that every backend is tested against.

Task vectors, the Real subspace's basis and residuals are all formed explicitly and truncated by a full SVD, in
words as close to the README's formulas as code can be. It imports nothing of this package and is not fast.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def merge(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    *,
    real_rank: int | None = 1,
    center: bool = False,
    residual: str = "core",
    rank: float | int = 1.0,
    core_scale: float = 1.0,
    core_mode: str = "restored",
    eta: float = 1.0,
    eta_mode: str = "constant",
    norm_match: bool = True,
    layer_weight: str = "none",
    ranks: Sequence[tuple[str, float | int]] = (),
    exclude: Sequence[str] = (),
    keep: Sequence[str] = (),
    average: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    spectrum: str = "truncate",
    core_spectrum: str = "keep",
    elementwise: str = "none",
    density: float = 0.2,
    row_power: float = 3.0,
    scale: str = "none",
) -> dict[str, Tensor]:
    """Merge state dicts; options mean what :class:`r2m_kernels.MergeConfig` says, with an exact SVD; no ``"dare"``.

    Returns:
        Floating-point tensors in float64, others as in the base.
    """
    count = len(experts)
    share = torch.tensor([1.0] * count if weights is None else list(weights), dtype=torch.float64)
    share = share / share.sum()

    def meant(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    floating = {
        name: tensor.double() for name, tensor in base.items() if tensor.is_floating_point() and not meant(name, keep)
    }
    statistics = [
        name for name in floating if name.split(".")[-1] in ("running_mean", "running_var") or meant(name, average)
    ]
    matrices = [
        name
        for name, tensor in floating.items()
        if tensor.ndim >= 2 and tensor.numel() and name not in statistics and not meant(name, exclude)
    ]
    vectors = [name for name in floating if name not in matrices and name not in statistics]

    # Task vectors, (N, numel) per tensor.
    tau = {
        name: torch.stack([expert[name].double().reshape(-1) - tensor.reshape(-1) for expert in experts])
        for name, tensor in floating.items()
    }
    gamma = dict.fromkeys(matrices, 1.0)
    if layer_weight == "frobenius":
        gamma = {name: 1.0 / float(tau[name].square().sum() or math.inf) for name in matrices}

    # The Real subspace: top-k right singular vectors of the weighted, perhaps centred, task matrix.
    weighted = torch.cat([math.sqrt(gamma[name]) * tau[name] for name in matrices] or [torch.zeros(count, 0)], 1)
    weighted = weighted.double()
    centered = weighted - share @ weighted if center else weighted
    # An expert that counts twice is two rows, or one that is longer by the root of two.
    length = (count * share).sqrt().unsqueeze(1)
    left, singular, _ = torch.linalg.svd(length * centered, full_matrices=False)
    significant = int((singular**2 > 16 * 2.0**-24 * weighted.square().sum()).sum())
    if real_rank is None:
        core = share
        projector = torch.eye(count, dtype=torch.float64)
    else:
        k = min(real_rank, significant)
        # Right singular vector v = (centred task matrix)ᵀ u / σ, so ⟨v, τ_j⟩ gives coefficients of the centred rows.
        along = length * left[:, :k] / singular[:k]
        if center:
            along = along - share.unsqueeze(1) * along.sum(0)
        projector = along @ (along.T @ weighted @ weighted.T)
        core = projector @ share

    def core_of(name: str) -> Tensor:
        return core @ tau[name]

    def residuals_of(name: str) -> Tensor:
        if residual == "own":
            return tau[name] - projector.T @ tau[name]
        return tau[name] - core_of(name)

    # Truncated residuals of matrices, deviations from the mean for vectors.
    kept: dict[str, Tensor] = {}
    for name in matrices:
        shape = floating[name].shape
        m, n = shape[0], math.prod(shape[1:])
        own = next((of_glob for glob, of_glob in ranks if meant(name, [glob])), rank)
        r = own if isinstance(own, int) else max(1, math.ceil(own * min(m, n) * (1 - 1e-12)))
        u, s, vh = torch.linalg.svd(residuals_of(name).reshape(count, m, n), full_matrices=False)
        if spectrum == "rescale":  # STAR
            inside = s.cumsum(1) - s < rank * s.sum(1, keepdim=True) * (1 - 1e-12)
            s = s * inside * s.sum(1, keepdim=True) / (s * inside).sum(1, keepdim=True).clamp_min(1e-300)
            r = min(m, n)
        elif spectrum == "orthogonal":  # TSV-M
            r = min(r, max(1, min(m, n) // count))
            u, vh = _together(u[..., :r]), _together(vh[:, :r].mT).mT
        kept[name] = ((u[..., :r] * s[:, None, :r]) @ vh[:, :r]).reshape(count, -1)
    for name in vectors:
        kept[name] = tau[name] - share @ tau[name]

    def squares(names: Sequence[str], rows: Mapping[str, Tensor]) -> Tensor:
        return sum((rows[name].square().sum(1) for name in names), torch.zeros(count, dtype=torch.float64))

    # Norm matching. What is shorter than rounding of float32 inputs counts as zero.
    longest = float(squares([*matrices, *vectors], tau).max().sqrt())
    norms = squares([*matrices, *vectors], kept).sqrt()
    norms[norms <= 64 * 2.0**-24 * longest] = 0.0
    scales = torch.zeros(count, dtype=torch.float64)
    present = norms > 0
    scales[present] = (share @ norms) / norms[present] if norm_match else 1.0

    # Strength of the residual term.
    lengths_of_all = float(share @ squares(matrices, tau).sqrt())
    length_of_mean = math.sqrt(sum(float((share @ tau[name]).square().sum()) for name in matrices))
    restored = (lengths_of_all / max(length_of_mean, lengths_of_all / 16)) ** 0.5 if lengths_of_all > 0 else 1.0
    lam = core_scale * {"mean": 1.0, "sum": count, "restored": restored}[core_mode]
    core_norm = abs(lam) * math.sqrt(sum(float(core_of(name).square().sum()) for name in matrices))
    term_norm = math.sqrt(sum(float(((share * scales) @ kept[name]).square().sum()) for name in matrices))
    longest_matrix = float(squares(matrices, tau).max().sqrt())
    if term_norm <= 64 * 2.0**-24 * longest_matrix * float(share @ scales):
        term_norm = 0.0
    strength = {
        "constant": eta,
        "sum": eta * count,
        "core_norm": eta * core_norm,
        "relative": eta * core_norm / term_norm if term_norm > 0 else 0.0,
    }[eta_mode]

    agreeing: dict[str, Tensor] = {}
    if elementwise == "ties":
        everything = torch.cat([tau[name] for name in [*matrices, *vectors]], 1).abs()
        smallest = everything.sort(1).values[:, everything.shape[1] - int(everything.shape[1] * density) - 1]
        if density == 1:
            smallest = torch.zeros(count, dtype=torch.float64)
        for name in [*matrices, *vectors]:
            rows = torch.where(tau[name].abs() >= smallest[:, None], tau[name], 0.0)
            agree = (rows * (share @ rows) > 0).double() * share[:, None]
            agreeing[name] = (agree * rows).sum(0) / agree.sum(0).clamp_min(1e-300)

    merged: dict[str, Tensor] = {}
    for name, tensor in base.items():
        if name not in floating:
            merged[name] = tensor.double() if tensor.is_floating_point() else tensor.clone()
            continue
        if name in statistics:
            update = share @ tau[name]
        elif elementwise == "ties":
            update = lam * agreeing[name]
        else:
            shared = core_of(name) if name in matrices else share @ tau[name]
            if core_spectrum == "flat" and name in matrices:  # Iso-C
                shape = floating[name].shape
                u, s, vh = torch.linalg.svd(count * shared.reshape(shape[0], -1), full_matrices=False)
                shared = (s.mean() * u @ vh).reshape(-1)
            term = (share * scales) @ kept[name]
            if row_power > 0 and name in matrices:
                rows = kept[name].reshape(count, floating[name].shape[0], -1)
                lengths = scales[:, None] * rows.norm(dim=2)
                lengths = lengths / lengths.max(0).values.clamp_min(1e-300)
                lengths[:, lengths.sum(0) == 0] = 1.0
                counts = share[:, None] * lengths**row_power
                counts = counts / counts.sum(0)
                term = (counts[..., None] * rows).sum(0).reshape(-1)
            update = lam * shared + strength * term
        if name in matrices and scale == "layer":
            mean_length, length_of_mean = share @ tau[name].norm(dim=1), (share @ tau[name]).norm()
            if mean_length > 0:
                update = update * (mean_length / torch.maximum(length_of_mean, mean_length / 16)) ** 0.5
        elif name in matrices and scale == "column":
            of_experts = tau[name].reshape(count, floating[name].shape[0], -1).norm(dim=1)
            of_update = update.reshape(floating[name].shape[0], -1)
            wanted = core.abs() @ of_experts / core.abs().sum()
            reached = of_update.norm(dim=0)
            factors = torch.where(reached > 0, wanted / reached.clamp_min(1e-300), 1.0).clamp_max(4)
            update = (of_update * factors).reshape(-1)
        merged[name] = floating[name] + update.reshape(floating[name].shape)
    return merged


def _together(vectors: Tensor) -> Tensor:
    """(N, m, r) with orthonormal columns each → the nearest with all N·r columns orthonormal (TSV-M)."""
    count, _, rank = vectors.shape
    u, _, vh = torch.linalg.svd(vectors.transpose(0, 1).flatten(1), full_matrices=False)
    made: Tensor = (u @ vh).view(-1, count, rank).transpose(0, 1)
    return made
