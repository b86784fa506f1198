"""Tables of addresses: one launch serves every tensor of a group, wherever each of them lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stream.blocks import empty_rows, padded
from .._stream.tensors import compute_dtype, memory_of

# A vector load moves this many bytes and wants an address that is a multiple of it.
VECTOR_BYTES = 16

# What numbers of a matrix or vector of norm 1, none above 1, are multiplied with before they become float16 operands:
# the largest has room to spare, and those of a matrix of 10⁹ equal ones are still normal numbers.
SCALE = 2.0**14

ELEMENT_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def tensor_at(slot, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer stored in a table's slot (masked off: null)."""
    pointer = tl.load(slot, mask=mask, other=0).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # the compiler cannot know it, and would load 4 bytes at a time
    return pointer


@triton.jit
def known_multiple(value, FACTOR: tl.constexpr):
    """``value``, a multiple of FACTOR, so that the compiler knows: masks made with it are constant over a vector."""
    return value // FACTOR * FACTOR  # tl.multiple_of says nothing about a kernel's own argument


@triton.jit
def row_stride(length):
    """From a row of so many numbers to the next, as :func:`r2m_kernels._stream.blocks.empty_rows` lays them."""
    return known_multiple(length + 15, 16)


@triton.jit
def block_of(elements, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A program's offsets into its tensor, and which of them are inside."""
    if ALIGNED:
        elements = known_multiple(elements, 128 // TYPE.primitive_bitwidth)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < elements


@triton.jit
def tile_of(m, n, column_tiles, TYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's rows, columns and offsets in its matrix, and which of them are inside."""
    if ALIGNED:
        n = known_multiple(n, 128 // TYPE.primitive_bitwidth)
    rows = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    return rows, columns, rows[:, None].to(tl.int64) * n + columns[None, :], inside


@triton.jit
def loaded(slot, offsets, inside, TYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of the tensor whose address stands in a table's slot."""
    return tl.load(tensor_at(slot, True, TYPE, ALIGNED) + offsets, mask=inside, other=0.0).to(COMPUTE)


class Group:
    """Tensors of one shape, base and experts, ready for a kernel.

    Args:
        row: elements of a row, or of the whole tensor where rows mean nothing.

    Attributes:
        bases, experts: contiguous and of one dtype; those that were not are copies, and so are those that lie at odd
            addresses without need: which kernel a tensor meets must depend on its shape and dtype only.
        dtype: of all of them.
        compute_dtype: what sums and products are carried in.
        addresses: (L, N + 1) int64 on the host: of θ₀, θ_1 … θ_N.
        aligned: rows are whole vectors, and every row of every tensor starts at a multiple of 16 bytes.
    """

    def __init__(self, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], row: int) -> None:
        tensors = [*bases, *(tensor for expert in experts for tensor in expert)]
        # Mixed inputs are widened to the type they are computed in: a kernel reads one type.
        self.compute_dtype = compute_dtype(tensors)
        alike = all(tensor.dtype == tensors[0].dtype for tensor in tensors)
        self.dtype = tensors[0].dtype if alike else self.compute_dtype
        self.aligned = row * self.dtype.itemsize % VECTOR_BYTES == 0
        self.bases = [self._placed(tensor) for tensor in bases]
        self.experts = [[self._placed(tensor) for tensor in tensors] for tensors in experts]
        self.device = self.bases[0].device
        self.addresses = addresses_of([self.bases, *self.experts])
        self._table: Tensor | None = None

    @property
    def table(self) -> Tensor:
        """The addresses on the device, where :func:`send` may have brought them with others."""
        send([self], self.device)
        assert self._table is not None
        return self._table

    def _placed(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != self.dtype or not tensor.is_contiguous():
            tensor = tensor.to(self.dtype).contiguous()
        return tensor if not self.aligned or well_placed(tensor) else tensor.clone()


def addresses_of(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """(L, len(columns)) int64 on the host. The tensors must outlive the launch that reads them."""
    return torch.tensor([[tensor.data_ptr() for tensor in row] for row in zip(*columns, strict=True)])


def send(groups: Sequence[Group], device: torch.device, *values: Any) -> list[Any]:
    """Give groups their tables, in one transfer with the small tensors among ``values`` that lie on the host.

    Returns:
        ``values``, those tensors on the device and all others as they are.
    """
    waiting = [group for group in groups if group._table is None]
    away = [place for place, one in enumerate(values) if isinstance(one, Tensor) and one.device != device]
    there = on_device([*(group.addresses for group in waiting), *(values[place] for place in away)], device)
    for group, table in zip(waiting, there, strict=False):
        group._table = table
    brought = dict(zip(away, there[len(waiting) :], strict=True))
    return [brought.get(place, one) for place, one in enumerate(values)]


def on_device(numbers: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of small tensors on the CPU, of any dtypes, in one transfer; up to 64 KiB nobody waits for it."""
    if not numbers:
        return []
    packed, starts, dense = bytearray(), list[int](), [one.cpu().contiguous() for one in numbers]
    for one in dense:
        starts.append(len(packed) // one.itemsize)
        packed += memory_of(one)
        packed += bytes(-len(packed) % VECTOR_BYTES)  # each starts where a vector load could
    there = torch.frombuffer(packed, dtype=torch.uint8).to(device, non_blocking=True)
    of_type = {dtype: there.view(dtype) for dtype in {one.dtype for one in dense}}
    places = zip(dense, starts, strict=True)
    return [of_type[one.dtype].as_strided(one.shape, one.stride(), start) for one, start in places]


def well_placed(tensor: Tensor) -> bool:
    """Whether it starts at a multiple of 16 bytes."""
    return tensor.data_ptr() % VECTOR_BYTES == 0


def vectors_fit(length: int) -> bool:
    """Whether rows of ``length`` float32 or float64 numbers, as :func:`empty_rows` lays them, end at 16 bytes."""
    return length % (VECTOR_BYTES // torch.float32.itemsize) == 0


def padded_rows(rows: Tensor) -> Tensor:
    """``rows`` laid out as :func:`empty_rows` does: itself where it is so, else a copy."""
    *leading, length = rows.shape
    stride, strides = padded(length), [1]
    for size in reversed(leading):
        strides.append(stride)
        stride *= max(1, size)
    if list(rows.stride()) == strides[::-1] and well_placed(rows):
        return rows
    return empty_rows(leading, length, rows.dtype, rows.device).copy_(rows)
