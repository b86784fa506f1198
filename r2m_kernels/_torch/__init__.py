"""The portable backend: plain PyTorch on any device, a block of rows at a time. See :mod:`r2m_kernels.ops`."""

from .._interface import Traits
from .._stream.factors import row_lengths as row_lengths
from .combine import combine as combine
from .elements import combine_dare as combine_dare
from .elements import combine_ties as combine_ties
from .elements import count_magnitudes as count_magnitudes
from .match_columns import match_columns as match_columns
from .orthonormalize import orthonormalize as orthonormalize
from .residual_matmul import residual_matmul as residual_matmul
from .residual_matmul import residual_matrices as residual_matrices
from .row_grams import row_coefficients as row_coefficients
from .row_grams import row_grams as row_grams
from .row_grams import sum_rows as sum_rows
from .row_grams import weigh_rows as weigh_rows
from .sums import add as add
from .sums import mean as mean
from .sums import weighted_sum as weighted_sum
from .task_gram import gram_panel_elements as gram_panel_elements
from .task_gram import task_gram as task_gram
from .truncate import shifted_truncation as shifted_truncation
from .truncate import truncate_by_expert as truncate_by_expert

traits = Traits(
    groups_tensors=False,
    independent_pairs=False,  # a BLAS multiplies all experts' rows at once
    takes_tolerance=True,
    gap_basis="growth of the kept energy in the last steps, continued as a geometric series or, at small ranks, at the "
    "rate of the Ritz values",
)
