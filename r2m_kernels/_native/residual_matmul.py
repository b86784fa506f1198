"""Products with the residuals: blocks formed by ``csrc/``, multiplied by the BLAS that torch carries."""

from __future__ import annotations

import functools

from .._torch.residual_matmul import residual_matmul as multiplied
from .._torch.residual_matmul import residual_matrices as portable_matrices
from .residuals import NativeResiduals

residual_matmul = functools.partial(multiplied, residuals=NativeResiduals.of)
residual_matrices = functools.partial(portable_matrices, residuals=NativeResiduals.of)
