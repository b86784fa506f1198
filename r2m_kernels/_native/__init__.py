"""The native backend: C++ kernels for CPUs (``csrc/``) around the BLAS that torch carries. See :mod:`r2m_kernels.ops`.

The library is loaded by :func:`r2m_kernels._native.library.load`, not by importing this package.
"""

from .._torch import (
    combine_rows,
    match_columns,
    orders_components,
    orthonormalize,
    takes_tolerance,
    truncation_width,
)
from .combine import combine
from .residual_matmul import residual_matmul
from .task_gram import gram_elements, task_gram
from .truncate import shifted_truncation

__all__ = [
    "combine",
    "combine_rows",
    "gram_elements",
    "match_columns",
    "orders_components",
    "orthonormalize",
    "residual_matmul",
    "shifted_truncation",
    "takes_tolerance",
    "task_gram",
    "truncation_width",
]
