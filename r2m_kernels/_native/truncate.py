"""Step 3: the method of :mod:`r2m_kernels._torch.truncate` on residuals formed and sketched by ``csrc/``."""

from __future__ import annotations

import functools

from r2m_kernels._native.residuals import NativeResiduals
from r2m_kernels._torch.truncate import shifted_truncation as portable

shifted_truncation = functools.partial(portable, residuals=NativeResiduals.of)
