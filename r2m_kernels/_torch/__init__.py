"""The portable backend: plain PyTorch on any device, a block of rows at a time. See :mod:`r2m_kernels.ops`."""

from .._interface import Traits
from .combine import combine as combine
from .combine_rows import combine_rows as combine_rows
from .match_columns import match_columns as match_columns
from .orthonormalize import orthonormalize as orthonormalize
from .residual_matmul import residual_matmul as residual_matmul
from .task_gram import gram_panel_elements as gram_panel_elements
from .task_gram import task_gram as task_gram
from .truncate import shifted_truncation as shifted_truncation
from .truncate import truncation_width as truncation_width

traits = Traits(
    groups_tensors=False,
    independent_pairs=False,  # a BLAS multiplies all experts' rows at once
    orders_components=True,
    takes_tolerance=True,
    gap_basis="growth of the kept energy in the last step, continued at the rate of the Ritz values",
)
