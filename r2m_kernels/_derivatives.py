"""Derivatives of operators, in plain PyTorch, so that they can be differentiated and compiled themselves.

Products here are the library's, on as many threads as it likes, and temporaries are as large as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._stream.blocks import as_matrix
from ._stream.tensors import compute_dtype

Gradients = tuple[Tensor | list[Tensor | None] | None, ...]


def keep_combine(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """What :func:`of_combine` needs: all inputs, none copied."""
    base, experts, core, left, right, scale, _ = inputs
    ctx.save_for_backward(base, core, left, right, scale, *experts)


def of_combine(ctx: Any, grad: Tensor) -> Gradients:
    """With G the gradient of out = θ₀ + Σ_j c_j (θ_j − θ₀) + Σ_i s_i L_i R_i, seen as (m, n).

    (1 − Σ_j c_j) G for θ₀; c_j G for θ_j; ⟨G, θ_j − θ₀⟩ for c_j; s_i G R_iᵀ for L_i; s_i L_iᵀ G for R_i; and
    ⟨L_iᵀ G, R_i⟩ for s_i. Differences before products: θ_j and θ₀ are alike. Each has its input's dtype and device.
    """
    base, core, left, right, scale, *experts = ctx.saved_tensors
    given = len(ctx.needs_input_grad)  # the dispatcher may leave out arguments that have their defaults
    wanted = (*ctx.needs_input_grad, *[False] * 4)
    dtype = compute_dtype([base, *experts])
    with torch.autocast(base.device.type, enabled=False):
        g, theta, weights = grad.to(dtype), base.to(dtype), core.double().to(base.device)
        of_base = (g * (1 - weights.sum()).to(dtype)).to(base.dtype) if wanted[0] else None
        of_experts: list[Tensor | None] = [
            (g * weights[j].to(dtype)).to(expert.dtype) if of_one else None
            for j, (expert, of_one) in enumerate(zip(experts, wanted[1], strict=True))
        ]
        of_core = None
        if wanted[2]:
            products = [(g * (expert.to(dtype) - theta)).sum(dtype=torch.float64) for expert in experts]
            of_core = torch.stack(products).to(core)
        of_left = of_right = of_scale = None
        if left is not None and any(wanted[3:6]):
            g, factor = as_matrix(g), scale.to(base.device, dtype).view(-1, 1, 1)
            inner = left.to(dtype).mT @ g
            of_left = (factor * (g @ right.to(dtype).mT)).to(left) if wanted[3] else None
            of_right = (factor * inner).to(right) if wanted[4] else None
            of_scale = (inner * right.to(dtype)).sum(dim=(1, 2), dtype=torch.float64).to(scale) if wanted[5] else None
    return (of_base, of_experts, of_core, of_left, of_right, of_scale, None)[:given]


def none_of(name: str) -> Callable[..., Gradients]:
    """The derivative of an operator that has none: asking for it says so."""

    def refuse(ctx: Any, *grads: Tensor) -> Gradients:
        raise NotImplementedError(without(name))

    return refuse


def without(name: str) -> str:
    """The sentence."""
    return f"{name} has no derivative: detach its inputs, or call it under torch.no_grad()"
