"""The Triton backend: fused kernels for CUDA and ROCm. See :mod:`r2m_kernels.ops`."""

from .._interface import Traits
from .._torch import residual_matrices as residual_matrices  # these two for what stays where it is stored: CPUs alone
from .._torch import truncate_by_expert as truncate_by_expert
from .columns import match_columns as match_columns
from .combine import combine as combine
from .elements import add as add
from .elements import combine_dare as combine_dare
from .elements import combine_ties as combine_ties
from .elements import count_magnitudes as count_magnitudes
from .elements import mean as mean
from .elements import weighted_sum as weighted_sum
from .lengths import row_lengths as row_lengths
from .orthonormalize import orthonormalize as orthonormalize
from .residual_matmul import residual_matmul as residual_matmul
from .rows import row_coefficients as row_coefficients
from .rows import row_grams as row_grams
from .sums import sum_rows as sum_rows
from .task_gram import gram_panel_elements as gram_panel_elements
from .task_gram import task_gram as task_gram
from .truncate import shifted_truncation as shifted_truncation
from .weights import weigh_rows as weigh_rows

traits = Traits(
    groups_tensors=True,
    independent_pairs=False,  # which kernel runs depends on N
    takes_tolerance=False,  # each step would wait for the device, and a group would stop as one
    gap_basis="the last three kept energies, continued as a geometric series",
)
