"""The portable backend: plain PyTorch on any device, a block of rows at a time. See :mod:`r2m_kernels.ops`."""

from .combine import combine
from .combine_rows import combine_rows
from .match_columns import match_columns
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

orders_components = True
takes_tolerance = True
