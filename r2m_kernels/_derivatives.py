"""Derivatives of operators, in plain PyTorch, so that they can be differentiated and compiled themselves.

Products here are the library's, on as many threads as it likes, and temporaries are as large as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ._stream.blocks import as_matrix
from ._stream.tensors import compute_dtype

# Of an operator's arguments, one each, and lists for lists.
Gradients = tuple[Tensor | list[Tensor | None] | None, ...]
# Those, from the result's gradient, whether each argument's is wanted, and the arguments.
Derivative = Callable[..., Gradients]


def tracked(call: Callable[..., Tensor], derivative: Derivative, arguments: Sequence[Any]) -> Tensor:
    """What a call gives, with its derivative."""
    flat, spec = tree_flatten(list(arguments))
    result: Tensor = _Tracked.apply(call, derivative, spec, *flat)  # type: ignore[no-untyped-call]
    return result


class _Tracked(torch.autograd.Function):
    """A call whose arguments come flat, so that autograd sees those in lists."""

    @staticmethod
    def forward(call: Callable[..., Tensor], derivative: Derivative, spec: TreeSpec, *flat: Any) -> Tensor:
        """The result."""
        return call(*tree_unflatten(flat, spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """All arguments are kept, none copied."""
        _, ctx.derivative, ctx.spec, *flat = inputs
        ctx.others = [None if isinstance(one, Tensor) else (one,) for one in flat]
        ctx.save_for_backward(*(one for one in flat if isinstance(one, Tensor)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of the arguments, flat."""
        saved = iter(ctx.saved_tensors)
        flat = [next(saved) if other is None else other[0] for other in ctx.others]
        wanted = tree_unflatten(ctx.needs_input_grad[3:], ctx.spec)
        found = ctx.derivative(*grads, wanted, *tree_unflatten(flat, ctx.spec))
        return (None, None, None, *tree_leaves(list(found)))


def of_combine(
    grad: Tensor,
    wanted: Sequence[Any],
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Gradients:
    """With G the gradient of out = θ₀ + Σ_j c_j (θ_j − θ₀) + Σ_i s_i L_i R_i, seen as (m, n).

    (1 − Σ_j c_j) G for θ₀; c_j G for θ_j; ⟨G, θ_j − θ₀⟩ for c_j; s_i G R_iᵀ for L_i; s_i L_iᵀ G for R_i; and
    ⟨L_iᵀ G, R_i⟩ for s_i. Differences before products: θ_j and θ₀ are alike. Each has its input's dtype and device.
    """
    given = len(wanted)  # the dispatcher may leave out arguments that have their defaults
    wanted = (*wanted, *[False] * 4)
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
        if left is not None and right is not None and scale is not None and any(wanted[3:6]):
            g, factor = as_matrix(g), scale.to(base.device, dtype).view(-1, 1, 1)
            inner = left.to(dtype).mT @ g
            of_left = (factor * (g @ right.to(dtype).mT)).to(left) if wanted[3] else None
            of_right = (factor * inner).to(right) if wanted[4] else None
            of_scale = (inner * right.to(dtype)).sum(dim=(1, 2), dtype=torch.float64).to(scale) if wanted[5] else None
    return (of_base, of_experts, of_core, of_left, of_right, of_scale, None)[:given]


def none_of(name: str) -> Derivative:
    """The derivative of an operator that has none: asking for it says so."""

    def refuse(*_: Any) -> Gradients:
        raise NotImplementedError(without(name))

    return refuse


def without(name: str) -> str:
    """The sentence."""
    return f"{name} has no derivative: detach its inputs, or call it under torch.no_grad()"
