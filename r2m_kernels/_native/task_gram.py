"""Step 1: the Gram matrices of the task vectors, in one read of all inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._interface import Grams
from .._stream import parallel
from .._stream.tensors import compute_dtype
from .library import LONG, POINTER, declare, flat, loaded, matrices

TASK_GRAM = declare("r2m_task_gram", LONG, POINTER, LONG, LONG, POINTER)
# Elements of one call; panels are summed in order.
PANEL = 2**20


def gram_panel_elements(precise: bool) -> int:
    """Elements of the panels that a Gram is summed from."""
    return PANEL


def task_gram(bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], precise: bool = False) -> Grams:
    """``precise``: differences and sums in float64."""
    of_tensor = zip(bases, zip(*experts, strict=True), strict=True)
    tasks = torch.stack([_gram(base, others, precise) for base, others in of_tensor])
    squares = [torch.linalg.vector_norm(base, dtype=torch.float64).square() for base in bases]
    return Grams(tasks, torch.stack(squares))


def _gram(base: Tensor, experts: Sequence[Tensor], precise: bool) -> Tensor:
    count, elements = len(experts), base.numel()
    total = torch.zeros(count, count, dtype=torch.float64)
    if elements == 0:
        return total
    library = loaded()
    rows = [flat(tensor) for tensor in (base, *experts)]
    dtype = torch.float64 if precise else compute_dtype(rows)
    inputs = matrices(rows)

    def of_panel(first: int) -> Tensor:
        gram = torch.empty(count, count, dtype=torch.float64)
        last = min(first + PANEL, elements)
        library.call(TASK_GRAM, dtype, count, inputs, first, last, gram.data_ptr())
        return gram

    for gram in parallel.for_each(of_panel, range(0, elements, PANEL)):
        total += gram
    return total
