"""Weighted sums of tensors and of task vectors, and a change added to the base: a block of elements at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._stream.blocks import as_matrix
from .._stream.tensors import compute_dtype
from .largest import representable, written


def weighted_sum(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], coefficients: Tensor, dtype: torch.dtype
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    weights = representable(coefficients, dtype)

    def of_tensor(index: int, out: Tensor) -> None:
        theta, thetas = bases[index].reshape(-1), [expert[index].reshape(-1) for expert in experts]

        def block_of(run: slice) -> Tensor:
            block = theta[run].to(dtype)
            total = torch.zeros_like(block)
            for weight, other in zip(weights, thetas, strict=True):
                if weight != 0.0:
                    total.add_(other[run].to(dtype) - block, alpha=weight)
            return total

        written(out, block_of)

    sums = torch.empty(len(bases), *as_matrix(bases[0]).shape, dtype=dtype, device=bases[0].device)
    for index, out in enumerate(sums):
        of_tensor(index, out)
    return sums


def add(bases: Sequence[Tensor], changes: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""

    def of_tensor(base: Tensor, change: Tensor, out: Tensor) -> Tensor:
        dtype = torch.promote_types(compute_dtype([base]), change.dtype)
        theta, added = base.reshape(-1), change.reshape(-1)
        return written(out, lambda run: theta[run].to(dtype) + added[run].to(dtype))

    return torch.stack([of_tensor(*one) for one in zip(bases, changes, outs, strict=True)])


def mean(experts: Sequence[Sequence[Tensor]], weights: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""
    counts = weights.tolist()

    def of_tensor(index: int) -> Tensor:
        thetas = [expert[index].reshape(-1) for expert in experts]

        def block_of(run: slice) -> Tensor:
            total: Tensor = thetas[0][run].double() * counts[0]
            for weight, other in zip(counts[1:], thetas[1:], strict=True):
                total.add_(other[run].double(), alpha=weight)
            return total

        return written(outs[index], block_of)

    return torch.stack([of_tensor(index) for index in range(len(outs))])
