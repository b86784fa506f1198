"""Residuals whose blocks and sketches are formed by ``csrc/`` in one read of the inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import block_height, long_panels
from .._stream.stored import Matrix
from .._torch.residuals import Residuals, SignMatrix
from .library import INT, LONG, POINTER, declare, loaded, matrices, rows_of

RESIDUAL = declare("r2m_residual", LONG, POINTER, POINTER, LONG, LONG, LONG, LONG, POINTER)
SKETCH = declare(
    *("r2m_sketch", LONG, POINTER, POINTER, LONG, LONG, LONG, INT, LONG, LONG),
    *(POINTER, POINTER, POINTER, POINTER),
)


@functools.cache
def _torch_multiplies_bfloat16() -> bool:
    """Whether torch hands bfloat16 products to oneDNN; its own loop is hundreds of times slower."""
    return torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call, no-any-return]


class NativeResiduals(Residuals):
    """See :class:`r2m_kernels._torch.residuals.Residuals`."""

    def __init__(
        self,
        base: Matrix,
        experts: Sequence[Matrix],
        mixing: Tensor,
        chosen: Sequence[int] | None = None,
        panels: int | None = None,
    ) -> None:
        super().__init__(base, experts, mixing, chosen, panels)
        self._library = loaded()
        self._weights = self.mixing.T.contiguous()
        whole = [rows_of(one) for one in (self.base, *self.experts) if isinstance(one, Tensor)]
        self._inputs = matrices(whole) if whole else None
        if whole:
            self.base, self.experts = whole[0], whole[1:]
        if self.dtype == torch.float32 and self._library.multiplies_bfloat16 and _torch_multiplies_bfloat16():
            self.fast_dtype = torch.bfloat16

    def block(self, rows: slice, columns: slice, dtype: torch.dtype | None = None) -> Tensor:
        """X_i[rows, columns], formed and rounded in registers."""
        first_row, last_row, _ = rows.indices(self.shape[0])
        first_column, last_column, _ = columns.indices(self.shape[1])
        size = last_row - first_row, last_column - first_column
        block = torch.empty(self.count, *size, dtype=dtype or self.dtype)
        if not block.numel():
            return block
        if self._inputs is not None:
            self._form(self._inputs, block, first_row, first_column)
            return block
        for some in self.read_rows(rows, columns):
            read = [rows_of(one[some, columns]) for one in (self.base, *self.experts)]
            self._form(matrices(read), block[:, some.start - first_row : some.stop - first_row], 0, 0)
            del read  # before the next rows are
        return block

    def _form(self, inputs: Any, block: Tensor, first_row: int, first_column: int) -> None:
        count, outs = len(self.experts), list(block)
        if self.count < count:  # the kernel forms all: those that nobody wants go to one place
            nowhere = torch.empty_like(block[0])
            outs = [block[self.chosen.index(i)] if i in self.chosen else nowhere for i in range(count)]
        where = (first_row, block.shape[1], first_column, block.shape[2])
        self._library.call(RESIDUAL, self.dtype, count, inputs, self._weights.data_ptr(), *where, matrices(outs))

    def sketch(self, signs: SignMatrix) -> tuple[Tensor, Tensor]:
        """SᵀA_i without a product: rows of X are added to rows of the sketch, or rotated within one."""
        m, n = self.shape
        tall, width = m >= n, signs.width
        shape = (self.count, width, n) if tall else (self.count, m, width)
        add = self._add_rows if self._inputs and self.count == len(self.experts) else self._add_formed_rows
        if tall:

            def of_panel(panel: list[slice]) -> tuple[Tensor, Tensor]:
                sketch = torch.zeros(shape, dtype=self.dtype)
                return sketch, add(signs, panel, sketch)

            total, energy = parallel.ordered_sum(of_panel, long_panels(m, n), self.panels)
            return total, energy
        # Rows of a wide matrix have rows of the sketch of their own: nothing to sum.
        whole = torch.empty(shape, dtype=self.dtype)
        (energy,) = parallel.ordered_sum(lambda panel: (add(signs, panel, whole),), long_panels(m, 1), self.panels)
        return whole.mT.contiguous(), energy

    def _add_rows(self, signs: SignMatrix, panel: list[slice], sketch: Tensor) -> Tensor:
        """What the rows of a panel add to the sketch, and their energy."""
        energy = torch.zeros(self.count, dtype=torch.float64)
        first, last = panel[0].start, panel[-1].stop
        self._call_sketch(signs, self._inputs, self._weights, slice(first, last), sketch, energy)
        return energy

    def _add_formed_rows(self, signs: SignMatrix, panel: list[slice], sketch: Tensor) -> Tensor:
        """The same where inputs are read or experts are left out: each residual is formed, and is the only input."""
        (m, n), energy = self.shape, torch.zeros(self.count, dtype=torch.float64)
        nothing, one = torch.zeros(1, n, dtype=self.dtype).expand(m, n), torch.ones(1, 1, dtype=self.dtype)
        # Columns are the kernel's outer loop where rows are summed, and energies are summed in its order: such a panel
        # has to be whole. Else rows may come as they fit.
        pieces = [slice(panel[0].start, panel[-1].stop)]
        if m < n:
            step = block_height(m, n)
            pieces = [slice(i, min(i + step, pieces[0].stop)) for i in range(pieces[0].start, pieces[0].stop, step)]
        for rows in pieces:
            formed = torch.empty(self.count, rows.stop - rows.start, n, dtype=self.dtype)
            for start in range(rows.start, rows.stop, block_height(m, n)):
                run = slice(start, min(start + block_height(m, n), rows.stop))
                formed[:, run.start - rows.start : run.stop - rows.start] = self.block(run, slice(None))
            for i, x in enumerate(formed):
                inputs = matrices([nothing, x])
                inputs[1].data -= rows.start * n * x.itemsize  # as if all rows before lay before it
                self._call_sketch(signs, inputs, one, rows, sketch[i : i + 1], energy[i : i + 1])
        return energy

    def _call_sketch(
        self,
        signs: SignMatrix,
        inputs: Any,
        weights: Tensor,
        rows: slice,
        sketch: Tensor,
        energy: Tensor,
    ) -> None:
        (m, n), width = self.shape, signs.width
        self._library.call(
            *(SKETCH, self.dtype, len(sketch), inputs, weights.data_ptr()),
            *(n, rows.start, rows.stop, int(m >= n), width, max(m, n)),
            *(signs.offsets.data_ptr(), signs.signs.data_ptr(), matrices(list(sketch)), energy.data_ptr()),
        )
