"""Step 3: the method of :mod:`r2m_kernels._torch.truncate` on residuals formed and sketched by ``csrc/``."""

from __future__ import annotations

import functools

from .._torch.truncate import shifted_truncation as portable
from .residuals import NativeResiduals

shifted_truncation = functools.partial(portable, residuals=NativeResiduals.of)
