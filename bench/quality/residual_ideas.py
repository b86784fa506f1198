"""Ideas of ours about what becomes of residuals: ranks, strengths, norms, directions (see ``ideas``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from bench.quality.ideas import RANK, assembled, block, core_of, kind, truncated
from bench.quality.parts import Parts, StateDict, gram, low_rank, svd

State = Mapping[str, Tensor]


def ranks_by_kind(base: State, experts: Sequence[State], **ranks: float) -> StateDict:
    """Depthwise kernels have nine columns: a tenth of full rank is one filter for a whole layer."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    return assembled(parts, core, truncated(parts, core, lambda name: ranks.get(kind(base[name].shape), RANK)))


def strength_by_kind(base: State, experts: Sequence[State], **strengths: float) -> StateDict:
    """Residuals of one kind of layer stronger or left out."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    eta = lambda name: strengths.get(kind(base[name].shape) if name in core else "vector", 1.0)  # noqa: E731
    return assembled(parts, core, truncated(parts, core), eta=eta)


def by_depth(
    base: State,
    experts: Sequence[State],
    *,
    rank: tuple[float, float] = (RANK, RANK),
    eta: tuple[float, float] = (1, 1),
) -> StateDict:
    """Rank and strength of residuals between a first and a last value: early layers limit what merging can do."""
    parts = Parts.of(base, experts)
    core, names = core_of(parts), list(base)
    at = {name: index / (len(names) - 1) for index, name in enumerate(names)}

    def between(ends: tuple[float, float]) -> Callable[[str], float]:
        return lambda name: ends[0] + (ends[1] - ends[0]) * at[name]

    return assembled(parts, core, truncated(parts, core, between(rank)), eta=between(eta))


def taps(base: State, experts: Sequence[State], *, rank: float = RANK) -> StateDict:
    """A kernel's places as rows and not as columns: truncation then shares input directions between its taps."""
    parts = Parts.of(base, experts)
    core = core_of(parts)

    def cut(name: str, tau: Tensor) -> Tensor:
        shape = base[name].shape
        rest = tau - core[name]
        if len(shape) < 4 or shape[2] * shape[3] == 1:
            return low_rank(rest, rank)
        # A depthwise kernel has one input channel: its rows take the places' part.
        inner = shape[1] if shape[1] > 1 else shape[3]
        stack = rest.view(len(tau), shape[0], inner, -1) if shape[1] > 1 else rest.view(len(tau), shape[0], -1, inner)
        rows = stack.transpose(2, 3) if shape[1] > 1 else stack
        made = low_rank(rows.reshape(len(tau), -1, inner), rank).view(rows.shape)
        return (made.transpose(2, 3) if shape[1] > 1 else made).reshape(rest.shape)

    return assembled(parts, core, {name: cut(name, tau) for name, tau in parts.tau.items()})


def matched_by(base: State, experts: Sequence[State], *, unit: Literal["layer", "block"] = "layer") -> StateDict:
    """Norms matched in every layer or block, and not over the whole network."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    return assembled(parts, core, truncated(parts, core), by=block if unit == "block" else str)


def matched_to(base: State, experts: Sequence[State], *, mean: Literal["geometric", "largest", "whole"]) -> StateDict:
    """Residuals as long as the geometric mean, the longest, or they all were before truncation."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    whole = torch.stack([(tau - core[name]).square().sum((1, 2)) for name, tau in parts.tau.items()]).sum(0)
    whole += sum(((tau - tau.mean(0)).square().sum((1, 2)) for tau in parts.vectors.values()), torch.zeros(len(whole)))
    targets: dict[str, Callable[[Tensor], Tensor]] = {
        "geometric": lambda norms: norms.log().mean().exp(),
        "largest": torch.max,
        "whole": lambda norms: whole.sqrt().mean(),
    }
    return assembled(parts, core, truncated(parts, core), target=targets[mean])


def residual_restored(base: State, experts: Sequence[State], *, power: float = 0.5, most: float = 4.0) -> StateDict:
    """What the core gets, residuals too: (mean ‖F_i‖ / ‖mean F‖)^power of what averaging takes from them."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    residuals = truncated(parts, core)
    products = torch.stack([gram(one) for one in residuals.values()]).sum(0)
    gain = float((products.diag().sqrt().mean() / products.mean().sqrt()) ** power)
    return assembled(parts, core, residuals, eta=lambda name: min(most, gain) if name in residuals else 1.0)


def weighed_by_head(base: State, experts: Sequence[State], *, power: float = 0.5) -> StateDict:
    """In the last matrix, rows of residuals count by how much the mean head listens to them."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    head = next(name for name, tau in parts.plain.items() if len(base[name]) == 2 and base[name].ndim == 2)
    weight = torch.stack([expert[head].double() for expert in experts]).mean(0)
    listens = (weight[1] - weight[0]).abs() ** power
    last = [name for name in parts.tau if base[name].shape[0] == len(listens)][-1]
    residuals = truncated(parts, core)
    residuals[last] = residuals[last] * (listens / listens.mean())[:, None]
    return assembled(parts, core, residuals)


def agreeing_directions(base: State, experts: Sequence[State], *, every: bool = True) -> StateDict:
    """Of the mean residual's singular directions those along which all residuals, or most, point the same way."""
    parts = Parts.of(base, experts)
    core = core_of(parts)

    def cut(tau: Tensor, shared: Tensor) -> Tensor:
        rest = tau - shared
        u, _, vh = torch.linalg.svd(rest.mean(0), full_matrices=False)
        along = torch.einsum("mk,imn,kn->ik", u, rest, vh)
        alike = (along > 0) == (along.sum(0) > 0)
        used = alike & alike.all(0) if every else alike
        return (u * (along * used).unsqueeze(1)) @ vh

    return assembled(parts, core, {name: cut(tau, core[name]) for name, tau in parts.tau.items()})


def shrunk(base: State, experts: Sequence[State], *, soft: bool = False) -> StateDict:
    """Residuals cut at the optimal threshold of singular values for unknown noise (Gavish & Donoho 2014)."""
    parts = Parts.of(base, experts)
    core = core_of(parts)

    def cut(rest: Tensor) -> Tensor:
        beta = min(rest.shape[1:]) / max(rest.shape[1:])
        u, values, v = svd(rest)
        threshold = (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * values.median(1, keepdim=True).values
        kept = (values - threshold).clamp_min(0) if soft else values * (values > threshold)
        kept[:, 0] = torch.where(kept.sum(1) > 0, kept[:, 0], values[:, 0])
        return (u * kept.unsqueeze(1)) @ v.mT

    return assembled(parts, core, {name: cut(tau - core[name]) for name, tau in parts.tau.items()})


def ranks_together(base: State, experts: Sequence[State], *, relative: bool = False) -> StateDict:
    """As many numbers as rank .1 stores, spent where singular values are largest, as they are or to the base's norm."""
    parts = Parts.of(base, experts)
    core, found = core_of(parts), {}
    for name, tau in parts.tau.items():
        u, values, v = svd(tau - core[name])
        per = base[name].double().norm() if relative else 1.0
        found[name] = (u, values, v, values / per)
    places = [
        (float(value), sum(base[name].shape[:1]) + v.shape[1])
        for name, (_, _, v, keys) in found.items()
        for value in keys.flatten()
    ]
    budget = sum(
        len(experts) * max(1, -(-min(t.shape[1:]) // 10)) * (t.shape[1] + t.shape[2]) for t in parts.tau.values()
    )
    threshold = 0.0
    for value, cost in sorted(places, reverse=True):
        budget -= cost
        if budget < 0:
            threshold = value
            break
    residuals = {
        name: (u * (values * (keys > threshold)).unsqueeze(1)) @ v.mT for name, (u, values, v, keys) in found.items()
    }
    return assembled(parts, core, residuals)


def off_base(base: State, experts: Sequence[State], *, share: float = 0.1, keep: bool = False) -> StateDict:
    """Residuals without what they have in the base's leading singular directions, or only that."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    residuals = {}
    for name, tau in parts.tau.items():
        u, _, vh = torch.linalg.svd(base[name].double().reshape(tau.shape[1:]), full_matrices=False)
        r = max(1, round(share * u.shape[1]))
        u, v, rest = u[:, :r], vh[:r].mT, tau - core[name]
        inside = u @ (u.mT @ rest) + (rest @ v) @ v.mT - u @ (u.mT @ rest @ v) @ v.mT
        residuals[name] = low_rank(inside if keep else rest - inside, RANK)
    return assembled(parts, core, residuals)


def without_sums(base: State, experts: Sequence[State]) -> StateDict:
    """Residuals without the mean of every filter: what shifts a channel is left to biases and normalisation."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    rests = {name: tau - core[name] for name, tau in parts.tau.items()}
    return assembled(
        parts, core, {name: low_rank(rest - rest.mean(2, keepdim=True), RANK) for name, rest in rests.items()}
    )


def with_the_core(base: State, experts: Sequence[State], *, against: float = 0.5) -> StateDict:
    """Elements of residuals that oppose the core count less."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    residuals = truncated(parts, core)
    residuals = {n: torch.where(one * core[n] < 0, against * one, one) for n, one in residuals.items()}
    return assembled(parts, core, residuals)


def clear_layers(base: State, experts: Sequence[State], *, share: float = 0.5) -> StateDict:
    """Residuals of the layers alone whose truncation keeps most: where the rest is noise there is nothing to keep."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    residuals = truncated(parts, core)
    kept = {
        name: float(one.square().sum() / (parts.tau[name] - core[name]).square().sum())
        for name, one in residuals.items()
    }
    least = sorted(kept.values(), reverse=True)[round(share * len(kept)) - 1]
    return assembled(parts, core, {name: one * (kept[name] >= least) for name, one in residuals.items()})
