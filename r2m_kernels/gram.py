"""Step 1, the task Gram matrices of tensors (README §2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._backends import Operators


def task_grams(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], operators: Operators, *, precise: bool
) -> list[Tensor]:
    """G_l = A_l A_lᵀ of L tensors of one shape, (N, N) float64 each, exactly symmetric.

    Args:
        precise: compute in float64. For tensors that are merged without factors (vectors, full rank) the Gram is the
            only source of their residual norms, and a difference of nearly equal numbers needs the digits.
    """
    grams = operators.task_gram(bases, experts, precise=precise)
    return list((grams + grams.mT) / 2)


def ordered_sum(grams: Sequence[Tensor], count: int) -> Tensor:
    """Σ in the given order, float64: a fixed tree, which ``torch.sum`` over a stack does not promise."""
    total = torch.zeros(count, count, dtype=torch.float64)
    for gram in grams:
        total += gram
    return total


def panel_grams(base: Tensor, experts: Sequence[Tensor], operators: Operators, *, precise: bool, panel: int) -> Tensor:
    """What the panels of a part of a tensor add to its Gram: (panels, N, N), for :func:`from_panels`.

    Args:
        base, experts: (elements,) runs that start at a multiple of ``panel`` in the tensor.
        panel: the operators' ``gram_elements``.
    """
    starts = range(0, base.numel(), panel)
    found = [
        operators.task_gram(
            [base[start : start + panel]], [[expert[start : start + panel]] for expert in experts], precise=precise
        )[0]
        for start in starts
    ]
    return torch.stack(found)


def from_panels(panels: Tensor) -> Tensor:
    """A tensor's Gram, bit for bit that of :func:`task_grams`, from all its panels' in order."""
    total = torch.zeros_like(panels[0])
    for panel in panels:
        total += panel
    return (total + total.mT) / 2
