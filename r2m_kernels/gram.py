"""Step 1, the task Gram matrix of one tensor (README §2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r2m_kernels._backends import Operators

# Elements that are widened to float64 at once.
STRIP = 2**18


def task_gram(base: Tensor, experts: Sequence[Tensor], operators: Operators, *, precise: bool) -> Tensor:
    """G_l = A_l A_lᵀ, (N, N) float64, exactly symmetric.

    Args:
        precise: compute in float64. For tensors that are merged without factors (vectors, full rank) the Gram is the
            only source of their residual norms, and a difference of nearly equal numbers needs the digits.
    """
    if precise:
        flat = [tensor.ravel() for tensor in (base, *experts)]
        gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        for start in range(0, base.numel(), STRIP):
            theta, *others = (tensor[start : start + STRIP].double() for tensor in flat)
            gram += operators.task_gram([theta], [[other] for other in others])[0]
    else:
        gram = operators.task_gram([base], [[expert] for expert in experts])[0]
    return (gram + gram.T) / 2


def ordered_sum(grams: Sequence[Tensor], count: int) -> Tensor:
    """Σ in the given order, float64: a fixed tree, which ``torch.sum`` over a stack does not promise."""
    total = torch.zeros(count, count, dtype=torch.float64)
    for gram in grams:
        total += gram
    return total
