"""The Triton backend: fused kernels for CUDA and ROCm. See :mod:`r2m_kernels.ops`."""

from .._torch import combine_rows, match_columns
from .combine import combine
from .orthonormalize import orthonormalize
from .residual_matmul import residual_matmul
from .task_gram import gram_elements, task_gram
from .truncate import shifted_truncation, truncation_width

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

orders_components = False
takes_tolerance = False  # each step would wait for the device, and a group would stop as one
