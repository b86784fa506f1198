"""Products with the residuals: blocks formed by ``csrc/``, multiplied by the BLAS that torch carries."""

from __future__ import annotations

import functools

from r2m_kernels._native.residuals import NativeResiduals
from r2m_kernels._torch.residual_matmul import residual_matmul as portable

residual_matmul = functools.partial(portable, residuals=NativeResiduals.of)
