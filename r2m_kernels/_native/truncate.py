"""Step 3: the method of :mod:`r2m_kernels._torch.truncate` on residuals formed and sketched by ``csrc/``."""

from __future__ import annotations

import functools

from .._torch import truncate as portable
from .residuals import NativeResiduals

shifted_truncation = functools.partial(portable.shifted_truncation, residuals=NativeResiduals.of)
truncate_by_expert = functools.partial(portable.truncate_by_expert, residuals=NativeResiduals.of)
