"""The native backend: C++ kernels for CPUs (``csrc/``) around the BLAS that torch carries. See :mod:`r2m_kernels.ops`.

The library is loaded by :func:`r2m_kernels._native.library.load`, not by importing this package.
"""

from r2m_kernels._native.combine import combine
from r2m_kernels._native.residual_matmul import residual_matmul
from r2m_kernels._native.task_gram import gram_elements, task_gram
from r2m_kernels._native.truncate import shifted_truncation
from r2m_kernels._torch import orders_components, orthonormalize, takes_tolerance, truncation_width

__all__ = [
    "combine",
    "gram_elements",
    "orders_components",
    "orthonormalize",
    "residual_matmul",
    "shifted_truncation",
    "takes_tolerance",
    "task_gram",
    "truncation_width",
]
