"""The native backend: C++ kernels for CPUs (``csrc/``) around the BLAS that torch carries. See :mod:`r2m_kernels.ops`.

The library is loaded by :func:`r2m_kernels._native.library.load`, not by importing this package.
"""

from .._torch import combine_rows, match_columns, orthonormalize, truncation_width
from .._torch import traits as portable
from .combine import combine
from .residual_matmul import residual_matmul
from .task_gram import gram_panel_elements, task_gram
from .truncate import shifted_truncation

__all__ = [
    "combine",
    "combine_rows",
    "gram_panel_elements",
    "match_columns",
    "orthonormalize",
    "residual_matmul",
    "shifted_truncation",
    "task_gram",
    "traits",
    "truncation_width",
]

traits = portable._replace(independent_pairs=True)
