"""Truncations that depend on no other expert: kept from one merge to the next, they are made for new experts alone.

Without a core every residual is the expert's own task vector. What is cut from it then depends on the base, the expert
and the options; that it comes out the same to the bit whoever else is there is the backend's to promise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ._interface import Operators
from ._stream.factors import Factors, GroupFactors
from ._stream.processes import KeptFactors
from .config import MergeConfig
from .fields import JOINT_BASES


def depends_on_others(config: MergeConfig, operators: Operators) -> str:
    """Why truncations of one expert cannot be kept for merges with others, as a clause; empty where they can."""
    if config.eta == 0:
        return "this method truncates nothing"
    if config.real_rank != 0:
        return "its residuals all change with every expert that comes (without a core, real_rank 0, they do not)"
    if config.spectrum in JOINT_BASES:
        return "its ranks, and its bases, change with the number of experts"
    if config.tolerance is not None:
        return "with a tolerance all experts of a tensor stop together"
    if not operators.traits.independent_pairs:
        return "only the native backend makes of an expert the same bits whoever else is there"
    return ""


def with_kept(
    kept: KeptFactors,
    tensor: str,
    experts: Sequence[str],
    shape: tuple[int, int],
    dtype: torch.dtype,
    make: Callable[[Sequence[int]], GroupFactors | None],
) -> GroupFactors | None:
    """Factors of one tensor: those that are kept, and the others made and kept.

    Args:
        kept: where they are.
        tensor: its name.
        experts: all their names.
        shape: (m, n), and ``dtype`` of the factors: others that are kept count as none.
        make: truncates the task vectors of experts at some places; ``None`` where one is too steep for the method,
            which all experts of a tensor then share with it.

    Returns:
        (1, N, …) as ``make`` gives them for all, to the bit; ``None`` where it has to be asked for all.
    """
    found = {place: one for place, name in enumerate(experts) if (one := kept.get(tensor, name)) is not None}
    known = {place: one for place, one in found.items() if _fits(one, shape, dtype)}
    missing = [place for place in range(len(experts)) if place not in known]
    if missing:
        made = make(missing)
        if made is None:
            return None
        for place, expert in enumerate(missing):
            known[expert] = _single(made, place)
            kept.put(tensor, experts[expert], known[expert])
        if len(missing) == len(experts):
            return made
    parts = [known[place] for place in range(len(experts))]
    first = parts[0]
    if any((one.method, one.ordered, one.basis) != (first.method, first.ordered, first.basis) for one in parts):
        return None
    width = max(one.right.shape[1] for one in parts)
    left = _side_by_side([one.left[0] for one in parts], width)
    right = _side_by_side([one.right[0].mT for one in parts], width).mT
    gap = torch.stack([one.gap[0] for one in parts if one.gap is not None]).unsqueeze(0)
    return GroupFactors(left.unsqueeze(0), right.unsqueeze(0), first.basis, first.ordered, first.method, gap)


def _fits(one: Factors, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether factors are a residual's of that shape and type."""
    (m, n), rank = shape, one.left.shape[-1]
    shapes = tuple(one.left.shape), tuple(one.right.shape), None if one.gap is None else tuple(one.gap.shape)
    return shapes == ((1, m, rank), (1, rank, n), (1,)) and {one.left.dtype, one.right.dtype} == {dtype}


def _single(made: GroupFactors, place: int) -> Factors:
    """One expert's, without the components that are there for wider ones alone: their left factors are zero."""
    (factors,), at = made.each(), slice(place, place + 1)
    left, right = factors.left[at], factors.right[at]
    there = left[0].any(dim=0).nonzero()
    width = max(1, int(there[-1]) + 1) if len(there) else 1
    return replace(factors, left=left[:, :, :width], right=right[:, :width], gap=made.gap[0, at])


def _side_by_side(sides: Sequence[Tensor], width: int) -> Tensor:
    """(N, m, width) of N (m, r_i), zeros beyond r_i; laid out as where all are truncated: sums depend on it."""
    first, length = sides[0], len(sides[0])
    by_columns = first.stride(0) == 1 and first.stride(1) >= length
    joint = first.new_zeros(len(sides), width, length).mT if by_columns else first.new_zeros(len(sides), length, width)
    for whole, side in zip(joint, sides, strict=True):
        whole[:, : side.shape[1]] = side
    return joint
