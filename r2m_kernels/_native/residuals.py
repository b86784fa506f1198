"""Residuals whose blocks and sketches are formed by ``csrc/`` in one read of the inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._stream import parallel
from .._stream.blocks import long_panels
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

    def __init__(self, base: Tensor, experts: Sequence[Tensor], mixing: Tensor) -> None:
        super().__init__(base, experts, mixing)
        self._library = loaded()
        self.base, self.experts = rows_of(self.base), [rows_of(expert) for expert in self.experts]
        self._inputs = matrices([self.base, *self.experts])
        self._weights = self.mixing.T.contiguous()
        if self.dtype == torch.float32 and self._library.multiplies_bfloat16 and _torch_multiplies_bfloat16():
            self.fast_dtype = torch.bfloat16

    def block(self, rows: slice, columns: slice, dtype: torch.dtype | None = None) -> Tensor:
        """X_i[rows, columns] of all experts, formed and rounded in registers."""
        first_row, last_row, _ = rows.indices(self.shape[0])
        first_column, last_column, _ = columns.indices(self.shape[1])
        size = self.count, last_row - first_row, last_column - first_column
        block = torch.empty(size, dtype=dtype or self.dtype)
        if block.numel():
            where = (first_row, size[1], first_column, size[2])
            weights = self._weights.data_ptr()
            self._library.call(RESIDUAL, self.dtype, self.count, self._inputs, weights, *where, matrices(list(block)))
        return block

    def sketch(self, signs: SignMatrix) -> tuple[Tensor, Tensor]:
        """SᵀA_i without a product: rows of X are added to rows of the sketch, or rotated within one."""
        m, n = self.shape
        tall, width = m >= n, signs.width
        shape = (self.count, width, n) if tall else (self.count, m, width)

        def of_rows(rows: slice, sketch: Tensor) -> Tensor:
            energy = torch.zeros(self.count, dtype=torch.float64)
            self._library.call(
                *(SKETCH, self.dtype, self.count, self._inputs, self._weights.data_ptr()),
                *(n, rows.start, rows.stop, int(tall), width, max(m, n)),
                *(signs.offsets.data_ptr(), signs.signs.data_ptr(), matrices(list(sketch)), energy.data_ptr()),
            )
            return energy

        if tall:

            def of_panel(panel: list[slice]) -> tuple[Tensor, Tensor]:
                sketch = torch.zeros(shape, dtype=self.dtype)
                return sketch, of_rows(slice(panel[0].start, panel[-1].stop), sketch)

            total, energy = parallel.ordered_sum(of_panel, long_panels(m, n))
            return total, energy
        # Rows of a wide matrix have rows of the sketch of their own: nothing to sum.
        whole = torch.empty(shape, dtype=self.dtype)
        panels = [slice(panel[0].start, panel[-1].stop) for panel in long_panels(m, 1)]
        (energy,) = parallel.ordered_sum(lambda rows: (of_rows(rows, whole),), panels)
        return whole.mT.contiguous(), energy
