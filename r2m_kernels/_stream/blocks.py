"""How tensors are cut into blocks. Sizes depend on shapes alone: that is what makes results bit-reproducible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .stored import Matrix, StoredMatrix

# One fp32 block of one expert is 1 MiB: with N = 3 the six blocks in use stay in a core's share of the cache
# (measured on Zen 4: 2.2 ms to form a 1024 x 1024 residual for N = 3, against 3.8 ms unblocked).
BLOCK_ELEMENTS = 2**18
# Below this many rows a product with a block is bound by the traffic of its result; above this many columns a block
# is cut there too, so that a short and wide matrix has several.
MIN_BLOCK_ROWS = 16
MAX_BLOCK_COLUMNS = BLOCK_ELEMENTS // MIN_BLOCK_ROWS
# A run of one residual is 2 MiB in float32: enough rows for a BLAS to reach its speed, and N of them fit the cache that
# cores share (512 rows of 1024: 205 GFLOP/s in bfloat16 on Zen 4, against 178 with 128 rows).
RUN_ELEMENTS = 2**19
RUNS_PER_PANEL = 4
# Columns of a block that a product of low-rank factors is made in. A matrix may come in panels of whole blocks, so that
# right factors of a few columns are in memory at once.
PRODUCT_COLUMNS = 2**10
# Elements that rows on a GPU start at multiples of: every vector of a kernel is then whole.
ROW_MULTIPLE = 16
# Blocks of one panel are summed in order, then panels in order; panels may run on different threads.
BLOCKS_PER_PANEL = 16


def padded(length: int) -> int:
    """From the start of a row of ``length`` elements on a GPU to that of the next."""
    return -(-length // ROW_MULTIPLE) * ROW_MULTIPLE


def empty_rows(
    leading: Sequence[int], length: int, dtype: torch.dtype, device: torch.device, *, zero: bool = False
) -> Tensor:
    """An uninitialised (*leading, length) tensor whose rows lie so; or all ``zero``, also between its rows."""
    make = torch.zeros if zero else torch.empty
    return make((*leading, padded(length)), dtype=dtype, device=device).narrow(-1, 0, length)


def panel_limit(device: torch.device) -> int | None:
    """Panels in work at once: a GPU has one queue of work, and streams that belong to threads."""
    return None if device.type == "cpu" else 1


@overload
def as_matrix(tensor: Tensor) -> Tensor: ...
@overload
def as_matrix(tensor: StoredMatrix) -> StoredMatrix: ...
def as_matrix(tensor: Matrix) -> Matrix:
    """(out, …) as (out, the rest)."""
    if isinstance(tensor, StoredMatrix):
        return tensor
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def as_column(tensor: Tensor) -> Tensor:
    """Any tensor as (numel, 1)."""
    return tensor.reshape(-1, 1)


def block_height(rows: int, columns: int) -> int:
    """Rows of a block of a (rows, columns) matrix."""
    return max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // max(1, columns))


def row_block_elements(rows: int, columns: int) -> int:
    """Elements of a block of whole rows."""
    return block_height(rows, columns) * columns


def product_height(columns: int) -> int:
    """Rows of a block of low-rank products, in a matrix of so many columns or in any :func:`column_panels` of it."""
    return block_height(0, min(columns, PRODUCT_COLUMNS))


def product_panels(rows: int, columns: int) -> list[list[tuple[slice, slice]]]:
    """Rows and columns of the blocks of low-rank products of a (rows, columns) matrix, grouped into panels."""
    of_rows = _panels(rows, product_height(columns))
    return [[(block, some) for block in panel] for some in runs(columns, PRODUCT_COLUMNS) for panel in of_rows]


def column_panels(columns: int, most: int) -> list[slice]:
    """Columns of a matrix in panels of about ``most``: whole blocks of products, and none of less than a whole one."""
    step = max(1, most // PRODUCT_COLUMNS) * PRODUCT_COLUMNS
    starts = [start for start in range(0, columns, step) if start == 0 or columns - start >= PRODUCT_COLUMNS]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], columns], strict=True)]


def row_panels(rows: int, columns: int) -> list[list[slice]]:
    """Row slices of a (rows, columns) matrix, grouped into panels."""
    return _panels(rows, block_height(rows, columns))


def long_panels(rows: int, columns: int) -> list[list[slice]]:
    """Runs along the long side of a matrix, grouped into panels: a run of all residuals is formed at once."""
    long, short = max(rows, columns), min(rows, columns)
    step = max(MIN_BLOCK_ROWS, RUN_ELEMENTS // max(1, short))
    return _panels(long, step, RUNS_PER_PANEL)


def column_slices(columns: int) -> list[slice]:
    """Column slices of a matrix: one, unless it is very wide."""
    return runs(columns, MAX_BLOCK_COLUMNS)


def runs(length: int, step: int) -> list[slice]:
    """So many elements one after another."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def element_panels(elements: int, blocks: int = BLOCKS_PER_PANEL) -> list[list[slice]]:
    """Slices of a flat tensor, grouped into panels of so many."""
    return _panels(elements, BLOCK_ELEMENTS, blocks)


def _panels(length: int, step: int, each: int = BLOCKS_PER_PANEL) -> list[list[slice]]:
    blocks = runs(length, step)
    return [blocks[i : i + each] for i in range(0, len(blocks), each)]


def task_vectors(base: Tensor, experts: Sequence[Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
    """Rows of the task vectors θ_j − θ₀: (N, len(rows), …) in ``dtype``."""
    block = base[rows].to(dtype)
    stack = torch.empty((len(experts), *block.shape), dtype=dtype, device=base.device)
    for j, expert in enumerate(experts):
        torch.sub(expert[rows].to(dtype), block, out=stack[j])
    return stack
