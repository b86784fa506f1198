"""Products with the residuals: blocks formed by ``csrc/``, multiplied by the BLAS that torch carries."""

from __future__ import annotations

import functools

from .._torch.residual_matmul import residual_matmul as portable
from .residuals import NativeResiduals

residual_matmul = functools.partial(portable, residuals=NativeResiduals.of)
