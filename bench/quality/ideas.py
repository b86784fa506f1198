"""Ideas of ours around R²M, in plain PyTorch: what ``trials`` tried on development runs, and why.

Each is the first candidate for the default (``methods.A``), which ``assembled`` is, with one thing done otherwise. None
has a row in the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from bench.quality.decorrelated import decorrelate
from bench.quality.parts import Parts, StateDict, leading_core, low_rank
from r2m_kernels.reference.checkpoints import changed

State = Mapping[str, Tensor]
Matrices = dict[str, Tensor]
RANK = 0.1


def core_of(parts: Parts) -> Matrices:
    """Name → τ_core, (m, n)."""
    return {name: torch.tensordot(parts.core, tau, 1) for name, tau in parts.tau.items()}


def assembled(
    parts: Parts,
    core: Matrices,
    residuals: Matrices,
    *,
    eta: float | Callable[[str], float] = 1.0,
    target: Callable[[Tensor], Tensor] = torch.mean,
    by: Callable[[str], str] | None = None,
    vectors: bool = True,
    row_power: float = 0.0,
    restored: float = 0.5,
) -> StateDict:
    """θ₀ + g · core + (η/N) Σ s_i residual_i: R²M, from a core and truncated residuals.

    Args:
        parts: of the merge.
        core: name → (m, n).
        residuals: name → (N, m, n), truncated.
        eta: η, or of each tensor.
        target: of the norms (N,), the length that residuals are brought to.
        by: name → what it is matched with; None: one norm for each expert.
        vectors: whether those have residuals too, and their mean counts g; or they are plain means.
        row_power: p, rows of residuals weighted by their lengths to the power of it; 0: all alike.
        restored: power of (mean ‖τ_i‖ / ‖mean τ‖) in g.
    """
    own = {name: tau - tau.mean(0) for name, tau in parts.vectors.items()} if vectors else {}
    every = residuals | own
    groups: dict[str, list[str]] = {}
    for name in every:
        groups.setdefault(by(name) if by else "", []).append(name)
    changes: Matrices = {}
    for names in groups.values():
        norms = torch.stack([every[name].square().sum((1, 2)) for name in names]).sum(0).sqrt()
        scales = torch.where(norms > 0, target(norms) / norms, 0.0)
        for name in names:
            strength = eta(name) if callable(eta) else eta
            if row_power and name in core:
                lengths = (scales[:, None] * every[name].norm(dim=2)) ** row_power
                shares = (lengths / lengths.sum(0)).nan_to_num(1 / len(norms))
                changes[name] = strength * (shares[:, :, None] * every[name]).sum(0)
            else:
                changes[name] = strength * torch.tensordot(scales, every[name], 1) / len(norms)
    gain = parts.gain**restored
    for name, shared in core.items():
        changes[name] = changes[name] + gain * shared
    for name in own:
        changes[name] = changes[name] + gain * parts.vectors[name].mean(0)
    return parts.merged(changes)


def truncated(parts: Parts, core: Matrices, rank: float | Callable[[str], float] = RANK) -> Matrices:
    """Name → residuals τ_i − core, (N, m, n), each at a share of full rank."""
    return {name: low_rank(tau - core[name], rank(name) if callable(rank) else rank) for name, tau in parts.tau.items()}


def default(base: State, experts: Sequence[State]) -> StateDict:
    """R²M as ``methods.A`` has it, with exact truncation."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    return assembled(parts, core, truncated(parts, core))


def kind(shape: Sequence[int]) -> str:
    """What a matrix does: ``depthwise`` filters every channel alone, ``spatial`` mixes channels and places."""
    if len(shape) < 4 or shape[2] * shape[3] == 1:
        return "pointwise"
    return "depthwise" if shape[1] == 1 else "spatial"


def block(name: str) -> str:
    """The part of a name that says its block: up to the first number."""
    parts = name.split(".")
    place = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: place + 1])


def core_by(base: State, experts: Sequence[State], *, unit: Literal["block", "kind", "base"] = "block") -> StateDict:
    """The Real subspace of every block or kind of layer, or of all with a layer counting by its change of the base."""
    parts = Parts.of(base, experts)
    groups: dict[str, list[str]] = {}
    for name in parts.tau:
        of = {"block": block(name), "kind": kind(base[name].shape), "base": ""}[unit]
        groups.setdefault(of, []).append(name)
    core = {}
    for names in groups.values():
        weigh = [1 / float(base[name].double().square().sum()) if unit == "base" else 1.0 for name in names]
        total = torch.stack([w * parts.grams[name] for w, name in zip(weigh, names, strict=True)]).sum(0)
        core |= {name: torch.tensordot(leading_core(total), parts.tau[name], 1) for name in names}
    return assembled(parts, core, truncated(parts, core))


def core_towards(
    base: State,
    experts: Sequence[State],
    *,
    steps: int | None = 1,
    unit: bool = False,
    rank: float = RANK,
    row_power: float = 0.0,
    restored: float = 0.5,
) -> StateDict:
    """The Real direction by a few power steps from the mean; or of task vectors of one length, or both.

    Of task vectors that are nearly orthogonal the first singular vector is the longest one: power steps that end early
    are better conditioned. None: until the end.
    """
    parts = Parts.of(base, experts)
    count, lengths = len(experts), parts.gram.diag().sqrt()
    by = 1 / lengths if unit else torch.ones(count, dtype=torch.float64)
    towards = torch.full((count,), 1 / count, dtype=torch.float64)
    for _ in range(200 if steps is None else steps):
        towards = by * by * (parts.gram @ towards)  # of rows by_i τ_i, whose Gram is by_i by_j G_ij
        towards /= towards.sum()
    mean = torch.full((count,), 1 / count, dtype=torch.float64)
    core = towards * float(towards @ parts.gram @ mean / (towards @ parts.gram @ towards))
    shared = {name: torch.tensordot(core, tau, 1) for name, tau in parts.tau.items()}
    return assembled(parts, shared, truncated(parts, shared, rank), row_power=row_power, restored=restored)


def low_rank_core(base: State, experts: Sequence[State], *, rank: float = RANK, lengthened: bool = True) -> StateDict:
    """The Real component itself at low rank, as long as before or not; residuals are what it leaves."""
    parts = Parts.of(base, experts)
    whole = core_of(parts)
    core = {name: low_rank(shared.unsqueeze(0), rank)[0] for name, shared in whole.items()}
    residuals = truncated(parts, core)
    if lengthened:
        core = {name: cut * (whole[name].norm() / cut.norm()).nan_to_num(1.0) for name, cut in core.items()}
    return assembled(parts, core, residuals)


def leave_one_out(base: State, experts: Sequence[State]) -> StateDict:
    """A residual is what an expert has beyond the core of the others, so that it has no say in what it loses."""
    parts = Parts.of(base, experts)
    count, coefficients = len(experts), torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for index in range(count):
        others = [j for j in range(count) if j != index]
        coefficients[index, others] = leading_core(parts.gram[others][:, others])
    residuals = {name: low_rank(tau - torch.tensordot(coefficients, tau, 1), RANK) for name, tau in parts.tau.items()}
    return assembled(parts, core_of(parts), residuals)


def in_pairs(base: State, experts: Sequence[State]) -> StateDict:
    """The two most alike experts merged first, then their merge with the others, one at a time (no counts)."""
    parts = Parts.of(base, experts)
    lengths = parts.gram.diag().sqrt()
    cosines = (parts.gram / lengths / lengths[:, None]).fill_diagonal_(-2.0)
    first, second = divmod(int(cosines.argmax()), len(experts))
    merged = default(base, [experts[first], experts[second]])
    for index, expert in enumerate(experts):
        if index not in (first, second):
            merged = default(base, [merged, expert])
    return merged


def folded(base: State, experts: Sequence[State]) -> StateDict:
    """The default on what a network computes: filters times their normalisation's scale, divided by it afterwards."""
    pairs = {}
    names = list(base)
    for before, name in itertools.pairwise(names):
        if base[before].ndim == 4 and name.endswith(".weight") and base[name].shape == base[before].shape[:1]:
            pairs[before] = name

    def times(state: State, power: int) -> StateDict:
        shape = lambda name: (-1, *[1] * (state[name].ndim - 1))  # noqa: E731
        made = {f: state[f].double() * state[n].double().view(shape(f)) ** power for f, n in pairs.items()}
        return {**state, **made}

    merged = default(times(base, 1), [times(expert, 1) for expert in experts])
    return {name: tensor.to(base[name].dtype) for name, tensor in times(merged, -1).items()}


def loewdin(base: State, experts: Sequence[State], *, by_tensor: bool = True, scale: float = 1.0) -> StateDict:
    """Task vectors made orthogonal to one another whole (Löwdin), over √N: the cheapest decorrelation."""
    parts = Parts.of(base, experts)

    def coefficients(products: Tensor) -> Tensor:
        norms = products.diag().sqrt()
        values, turn = torch.linalg.eigh(products / norms / norms[:, None])
        together: Tensor = (turn / values.clamp_min(1e-3).sqrt()) @ turn.T
        return together.sum(0) / len(norms) ** 0.5

    every = coefficients(parts.gram)
    return parts.merged(
        {
            name: scale * torch.tensordot(coefficients(parts.grams[name]) if by_tensor else every, tau, 1)
            for name, tau in parts.tau.items()
        }
    )


def with_outside(
    base: State,
    experts: Sequence[State],
    *,
    strength: float = 1.0,
    scale: float = 1.0,
    clarity: float = 0.0,
    border: float | None = None,
) -> StateDict:
    """The default and what decorrelated task vectors have outside their span, tensor by tensor, ``strength`` · O.

    With ``clarity`` p a tensor's O counts its share of energy at rank 1/N of the task vectors to the power p; with
    ``border`` it counts 1 − (‖τ‖ / ‖θ₀‖ / border)², not below 0, for the whole.
    """
    parts = Parts.of(base, experts)
    start = default(base, experts)
    moved = float(parts.gram.diag().mean()) / sum(float(base[name].double().square().sum()) for name in parts.tau)
    strength *= 1.0 if border is None else max(0.0, 1 - moved / border**2)
    changes = {}
    for name, tau in parts.tau.items():
        turned = decorrelate(tau)
        p = torch.linalg.pinv(parts.grams[name], rtol=1e-6, hermitian=True) @ (tau * turned).sum((1, 2))
        outside = turned - torch.tensordot(p, tau, 1)
        values = torch.linalg.svdvals(tau).square()
        r = max(1, values.shape[1] // len(tau))
        clear = float(values[:, :r].sum() / values.sum()) ** clarity if values.sum() > 0 else 0.0
        changes[name] = strength * clear * outside
    longer = {
        name: scale * (tensor.double() - base[name].double())
        for name, tensor in start.items()
        if name in parts.tau or name in parts.vectors
    }
    for name, change in longer.items():
        changes[name] = change + (changes[name].reshape(change.shape) if name in changes else 0.0)
    every = {name: tau.mean(0) for name, tau in parts.plain.items()} | changes
    return {name: tensor.to(base[name].dtype) for name, tensor in changed(base, every).items()}


def vectors_plain(base: State, experts: Sequence[State]) -> StateDict:
    """Vectors (normalisation's scales and shifts) as plain means."""
    parts = Parts.of(base, experts)
    core = core_of(parts)
    return assembled(parts, core, truncated(parts, core), vectors=False)
