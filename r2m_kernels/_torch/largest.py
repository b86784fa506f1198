"""What was written, and the largest magnitude of it: it tells NaN and Inf, and costs a block in the cache no read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import element_panels, panel_limit


def magnitude(block: Tensor) -> Tensor:
    """The largest |element| of a block, a float64 number; NaN or Inf where an element is, 0 for none."""
    if block.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=block.device)
    smallest, largest = torch.aminmax(block)
    return torch.maximum(largest.double(), -smallest.double())  # both are NaN where an element is


def largest_of(parts: Iterable[Tensor], device: torch.device) -> Tensor:
    """The largest of several :func:`magnitude`, NaN among them included."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in parts:
        total = torch.maximum(total, part)
    return total


def magnitudes(outs: Sequence[Tensor]) -> Tensor:
    """(L,) float64: each output's, in a read of its own."""
    return torch.stack([magnitude(out) for out in outs])


def written(out: Tensor, block_of: Callable[[slice], Tensor]) -> Tensor:
    """Fill a contiguous output with ``block_of`` runs of its elements, rounded once; its largest magnitude."""
    flat = out.view(-1)

    def of_panel(panel: list[slice]) -> Tensor:
        largest = []
        for run in panel:
            rounded = block_of(run).to(flat.dtype)
            largest.append(magnitude(rounded))
            flat[run] = rounded
        return largest_of(largest, flat.device)

    panels = parallel.for_each(of_panel, element_panels(out.numel()), panel_limit(out.device))
    return largest_of(panels, out.device)


def representable(numbers: Tensor, dtype: torch.dtype) -> list[float]:
    """As Python numbers that fit a dtype: torch refuses others, and an overflow is to show in the result."""
    most = torch.finfo(dtype).max
    return [min(max(number, -most), most) for number in numbers.double().tolist()]
