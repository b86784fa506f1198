"""The portable backend: plain PyTorch on any device, a block of rows at a time. See :mod:`r2m_kernels.ops`."""

from .._interface import Traits
from .combine import combine
from .combine_rows import combine_rows
from .match_columns import match_columns
from .orthonormalize import orthonormalize
from .residual_matmul import residual_matmul
from .task_gram import gram_panel_elements, task_gram
from .truncate import shifted_truncation, truncation_width

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

traits = Traits(
    groups_tensors=False,
    independent_pairs=False,  # a BLAS multiplies all experts' rows at once
    orders_components=True,
    takes_tolerance=True,
    gap_basis="growth of the kept energy in the last step, continued at the rate of the Ritz values",
)
