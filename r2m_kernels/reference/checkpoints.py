"""What the definitions need of checkpoints: what kind of tensor each is, task vectors, the merged state dict."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]


class Kinds(NamedTuple):
    """Names of the tensors that are merged, by what becomes of them (README §1)."""

    matrices: list[str]
    vectors: list[str]
    statistics: list[str]


def fits(name: str, globs: Sequence[str]) -> bool:
    """Whether a name fits one of the globs."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def kinds(base: StateDict, exclude: Sequence[str] = (), keep: Sequence[str] = (), average: Sequence[str] = ()) -> Kinds:
    """Of the base's floating-point tensors but those to ``keep``."""
    of = Kinds([], [], [])
    for name, tensor in base.items():
        if not tensor.is_floating_point() or fits(name, keep):
            continue
        if name.split(".")[-1] in ("running_mean", "running_var") or fits(name, average):
            of.statistics.append(name)
        elif tensor.ndim >= 2 and tensor.numel() and not fits(name, exclude):
            of.matrices.append(name)
        else:
            of.vectors.append(name)
    return of


def mean_weights(weights: Sequence[float] | None, count: int) -> Tensor:
    """(N,) w, summing to 1; equal ones by default."""
    share = torch.tensor([1.0] * count if weights is None else list(weights), dtype=torch.float64)
    return share / share.sum()


def task_vectors(
    base: StateDict, experts: Sequence[StateDict], matrices: Sequence[str], others: Sequence[str]
) -> dict[str, Tensor]:
    """τ_j = θ_j − θ₀: (N, m, n) for matrices, first dimension by the rest, and (N, 1, numel) for others."""
    tau = {}
    for name in (*matrices, *others):
        rows = base[name].shape[0] if name in matrices else 1
        changes = torch.stack([expert[name].double() - base[name].double() for expert in experts])
        tau[name] = changes.reshape(len(experts), rows, base[name].numel() // rows)
    return tau


def mixed(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Σ_j coefficients[…, j] rows[j]."""
    total: Tensor = torch.tensordot(coefficients, rows, 1)
    return total


def side_by_side(tensors: Sequence[Tensor], count: int) -> Tensor:
    """N rows over several tensors, (N, …) each, as one matrix (N, elements of all)."""
    return torch.cat([torch.zeros(count, 0, dtype=torch.float64), *(tensor.flatten(1) for tensor in tensors)], 1)


def changed(base: StateDict, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base with these changes added, floating-point tensors in float64, in the base's order."""
    merged = {}
    for name, tensor in base.items():
        merged[name] = tensor.double() if tensor.is_floating_point() else tensor.clone()
        if name in changes:
            merged[name] = merged[name] + changes[name].reshape(tensor.shape)
    return merged
