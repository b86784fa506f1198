"""Step 1: the Gram matrices of the task vectors, in one read of all inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._interface import Grams
from .._stream import parallel
from .._stream.blocks import (
    BLOCK_ELEMENTS,
    element_panels,
    panel_limit,
    task_vectors,
)
from .._stream.tensors import compute_dtype

# Products are summed in the compute dtype within a tile and in float64 across tiles. A BLAS may sum a short product
# one term after another, and then a tile of 8192 equal-signed terms is off by 29·2⁻²⁴ (seen): 256 keep it under 10.
TILE = 256
# Blocks of a panel: parts of a tensor are whole panels, and few of them are to fit a small budget.
BLOCKS_PER_PANEL = 4
# Elements that are widened to float64 at once.
STRIP = BLOCK_ELEMENTS


def gram_panel_elements(precise: bool) -> int:
    """Elements of the panels that a Gram is summed from."""
    return STRIP if precise else BLOCK_ELEMENTS * BLOCKS_PER_PANEL


def task_gram(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], precise: bool = False) -> Grams:
    """``precise``: differences and sums in float64, a strip of the inputs at a time."""
    gram = _precise_gram if precise else _gram
    of_tensors = [gram(base, [expert[index] for expert in experts]) for index, base in enumerate(bases)]
    tasks, base = zip(*of_tensors, strict=True)
    return Grams(torch.stack(tasks), torch.stack(base))


def _precise_gram(base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    flat = [tensor.ravel() for tensor in (base, *experts)]
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64, device=base.device)
    squares = torch.zeros((), dtype=torch.float64, device=base.device)
    for start in range(0, base.numel(), STRIP):
        theta, *others = (tensor[start : start + STRIP].double() for tensor in flat)
        gram, square = _gram(theta, others)
        total += gram
        squares += square
    return total, squares


def _gram(base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype([base, *experts])
    flat_base, flat_experts = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    count = len(experts)

    def panel_gram(panel: list[slice]) -> tuple[Tensor, Tensor]:
        total = torch.zeros(count, count, dtype=torch.float64, device=base.device)
        squares = torch.zeros((), dtype=torch.float64, device=base.device)
        for block in panel:
            squares += torch.linalg.vector_norm(flat_base[block].to(dtype), dtype=torch.float64).square()
            tau = task_vectors(flat_base, flat_experts, block, dtype)
            whole = tau.shape[1] // TILE * TILE
            tiles = tau[:, :whole].reshape(count, -1, TILE).transpose(0, 1)
            total += torch.bmm(tiles, tiles.transpose(1, 2)).double().sum(0)
            rest = tau[:, whole:]
            total += torch.mm(rest, rest.T)
        return total, squares

    total = torch.zeros(count, count, dtype=torch.float64, device=base.device)
    squares = torch.zeros((), dtype=torch.float64, device=base.device)
    panels = element_panels(flat_base.numel(), BLOCKS_PER_PANEL)
    for gram, square in parallel.for_each(panel_gram, panels, panel_limit(base.device)):
        total += gram
        squares += square
    return total, squares
