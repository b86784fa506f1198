"""What kernels write: rounded once, with the largest magnitude of it, and launched in one way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .addresses import ELEMENT_TYPES, VECTOR_BYTES, Group, addresses_of, send, tensor_at, well_placed


@triton.jit
def magnitude_bits(values, COMPUTE: tl.constexpr):
    """The largest magnitude by its bits, which compare as numbers do: those of Inf and NaN are above all others."""
    if COMPUTE.primitive_bitwidth == 64:
        bits = values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def write_tile(values, out, offsets, inside, OUTPUT: tl.constexpr, COMPUTE: tl.constexpr):
    """A block of one or two dimensions into the tensor at ``out``; the magnitudes of it by their bits."""
    if COMPUTE.primitive_bitwidth == 64 and OUTPUT.primitive_bitwidth == 16:
        values = values.to(tl.float32)  # as PyTorch does; Triton's interpreter knows no other way
    rounded = values.to(OUTPUT)
    tl.store(out + offsets, rounded, mask=inside)
    return tl.where(inside, magnitude_bits(rounded.to(COMPUTE), COMPUTE), 0)


@triton.jit
def write_rounded(
    values, outputs, largest, offsets, inside, OUTPUT: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr
):
    """A program's tile of out[l], a block of one or two dimensions; largest[l, tile] by its bits."""
    tensor = tl.program_id(1).to(tl.int64)
    out = tensor_at(outputs + tensor, True, OUTPUT, ALIGNED)
    bits = write_tile(values, out, offsets, inside, OUTPUT, COMPUTE)
    if len(bits.shape) == 2:
        bits = tl.max(bits, axis=1)
    tl.store(largest + tensor * tl.num_programs(0) + tl.program_id(0), tl.max(bits, axis=0))


class Outputs:
    """Where kernels write the tensors of a group.

    A kernel writes the type it reads or the one it computes in; any other output is rounded from the latter.

    Args:
        group: what is read.
        outs: L tensors of its shape, of any dtype and layout.
        row: elements of a row, or of the whole tensor where rows mean nothing.
        compute: what sums are carried in, if not the group's compute dtype.

    Attributes:
        aligned: rows of all that is read and written are whole vectors that start at multiples of 16 bytes.
    """

    def __init__(self, group: Group, outs: Sequence[Tensor], row: int, compute: torch.dtype | None = None) -> None:
        self.compute_dtype = compute or group.compute_dtype
        kinds = {out.dtype for out in outs}
        kernels_write = kinds <= {group.dtype, self.compute_dtype} and len(kinds) == 1
        self.dtype = outs[0].dtype if kernels_write else self.compute_dtype
        self.aligned = group.aligned and row * self.dtype.itemsize % VECTOR_BYTES == 0
        self._group, self._outs = group, outs
        self._targets = [
            out
            if out.dtype == self.dtype and out.is_contiguous() and (well_placed(out) or not self.aligned)
            else torch.empty(out.shape, dtype=self.dtype, device=out.device)
            for out in outs
        ]

    def write(
        self,
        kernel: Any,
        tiles: int,
        config: launch.Config,
        *arguments: Any,
        table: Tensor | None = None,
        **constants: Any,
    ) -> Tensor:
        """Run a kernel that writes them with :func:`write_rounded`, ``tiles`` programs a tensor.

        It takes ``table`` (the group's by default), the outputs' addresses, the room for the largest magnitudes and
        ``arguments``; of constants TYPE, OUTPUT, COMPUTE and ALIGNED beside ``constants``. Addresses and small tensors
        among the arguments that lie on the host go to the device together.

        Returns:
            (L,) largest magnitudes of the outputs.
        """
        group, wide = self._group, self.compute_dtype
        if tiles == 0:
            return torch.zeros(len(self._outs), dtype=wide, device=group.device)
        bits = torch.int64 if wide == torch.float64 else torch.int32
        largest = torch.empty(len(self._outs), tiles, dtype=bits, device=group.device)
        tables = [group] if table is None else []
        table, targets, *there = send(tables, group.device, table, addresses_of([self._targets]), *arguments)
        launch.start(
            kernel,
            (tiles, len(self._outs)),
            config,
            group.table if table is None else table,
            targets,
            largest,
            *there,
            TYPE=ELEMENT_TYPES[group.dtype],
            OUTPUT=ELEMENT_TYPES[self.dtype],
            COMPUTE=ELEMENT_TYPES[wide],
            ALIGNED=config.aligned,
            **constants,
        )
        for out, target in zip(self._outs, self._targets, strict=True):
            if target is not out:
                out.copy_(target)
        found = largest.amax(dim=1).view(wide)
        # Rounded as the outputs are where the kernel wrote a wider type.
        return found if self.dtype == self._outs[0].dtype else found.to(self._outs[0].dtype).to(wide)


def representable(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """As float64 numbers that a dtype can hold: one beyond it becomes its largest, not Inf, and Inf · 0 not NaN."""
    most = torch.finfo(dtype).max
    return numbers.double().clamp(-most, most)
