"""TIES and DARE: what is left of task vectors' elements, a block of elements at a time (README §8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._stream.blocks import BLOCK_ELEMENTS
from .._stream.tensors import compute_dtype
from .largest import representable, written

HALF = 2**16


def count_magnitudes(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], upper: Tensor | None, counts: Tensor
) -> None:
    """See :class:`r2m_kernels._interface.Operators`."""
    halves = None if upper is None else upper.to(counts.device, non_blocking=True)
    for index, base in enumerate(bases):
        changes = _Changes(base, [expert[index] for expert in experts])
        for start in range(0, base.numel(), BLOCK_ELEMENTS):
            _, rows = changes.of(slice(start, start + BLOCK_ELEMENTS))
            bits = rows.abs().float().view(torch.int32).long()
            for j, of_expert in enumerate(bits):
                if halves is None:
                    counts[j] += torch.bincount(of_expert >> 16, minlength=HALF)
                else:
                    # Those of other buckets go beyond the last one: a selection would wait for the device.
                    lower = torch.where(of_expert >> 16 == halves[j], of_expert & (HALF - 1), HALF)
                    counts[j] += torch.bincount(lower, minlength=HALF + 1)[:HALF]


def combine_ties(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    weights: Tensor,
    scale: float,
    thresholds: Tensor,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""

    def mean_of(index: int, run: slice, rows: Tensor) -> Tensor:
        weight = weights.to(rows, non_blocking=True).unsqueeze(1)
        rows *= rows.abs().float() >= thresholds.to(rows.device, non_blocking=True).unsqueeze(1)
        sums = (rows * weight).sum(dim=0)
        agree = rows * sums > 0
        total = (agree * weight).sum(dim=0)
        return (rows * weight * agree).sum(dim=0) / torch.where(total > 0, total, 1.0)

    return _write(bases, experts, scale, mean_of, outs)


def combine_dare(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    weights: Tensor,
    scale: float,
    density: float,
    keys: Tensor,
    first: int,
    outs: Sequence[Tensor],
) -> Tensor:
    """See :class:`r2m_kernels._interface.Operators`."""

    def mean_of(index: int, run: slice, rows: Tensor) -> Tensor:
        weight = weights.to(rows, non_blocking=True).unsqueeze(1)
        places = torch.arange(first + run.start, first + run.start + rows.shape[1], device=rows.device)
        kept = kept_elements(keys[index].to(rows.device, non_blocking=True), places, density)
        return (rows * weight * kept).sum(dim=0) / density

    return _write(bases, experts, scale, mean_of, outs)


def kept_elements(keys: Tensor, places: Tensor, density: float) -> Tensor:
    """Whether DARE keeps the elements at ``places`` of each of N experts' tensors: (N, len(places)) bool.

    The upper 32 bits of splitmix64 at place e + 1 of the sequence that a key starts, against the density's: a function
    of (key, place) alone, so that a tensor may be merged in any parts, anywhere.
    """
    z = keys.unsqueeze(1) + _signed(0x9E3779B97F4A7C15) * (places + 1)  # int64 wraps modulo 2^64
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    return _shifted(z, 32) < int(density * 2**32)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """An unsigned number shifted to the right: zeros come in."""
    return (z >> bits) & (1 << 64 - bits) - 1


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - 2**64 if number >= 2**63 else number


class _Changes:
    """Task vectors of one tensor, in float32 (float64 where one of the inputs is)."""

    def __init__(self, base: Tensor, experts: Sequence[Tensor]) -> None:
        self.dtype = compute_dtype([base, *experts])
        self._base, self._experts = base.reshape(-1), [expert.reshape(-1) for expert in experts]

    def of(self, run: slice) -> tuple[Tensor, Tensor]:
        """A run of θ₀'s elements, and of the N τ_j."""
        theta = self._base[run].to(self.dtype)
        return theta, torch.stack([expert[run].to(self.dtype) - theta for expert in self._experts])


def _write(
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    scale: float,
    mean_of: Callable[[int, slice, Tensor], Tensor],
    outs: Sequence[Tensor],
) -> Tensor:
    """θ₀ + scale · mean_of(index, run, task vectors (N, elements)) into every out."""

    def of_tensor(index: int) -> Tensor:
        changes = _Changes(bases[index], [expert[index] for expert in experts])
        (factor,) = representable(torch.tensor([scale], dtype=torch.float64), changes.dtype)

        def block_of(run: slice) -> Tensor:
            theta, rows = changes.of(run)
            return theta + factor * mean_of(index, run, rows)

        return written(outs[index], block_of)

    return torch.stack([of_tensor(index) for index in range(len(bases))])
