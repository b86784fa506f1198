"""The native backend: C++ kernels for CPUs (``csrc/``) around the BLAS that torch carries. See :mod:`r2m_kernels.ops`.

The library is loaded by :func:`r2m_kernels._native.library.load`, not by importing this package.
"""

from .._torch import orthonormalize as orthonormalize
from .._torch import row_lengths as row_lengths
from .._torch import sum_rows as sum_rows
from .._torch import traits as portable
from .combine import combine as combine
from .elements import add as add
from .elements import combine_dare as combine_dare
from .elements import combine_ties as combine_ties
from .elements import count_magnitudes as count_magnitudes
from .elements import match_columns as match_columns
from .elements import mean as mean
from .elements import weighted_sum as weighted_sum
from .residual_matmul import residual_matmul as residual_matmul
from .residual_matmul import residual_matrices as residual_matrices
from .task_gram import gram_panel_elements as gram_panel_elements
from .task_gram import row_coefficients as row_coefficients
from .task_gram import row_grams as row_grams
from .task_gram import task_gram as task_gram
from .truncate import shifted_truncation as shifted_truncation
from .truncate import truncate_by_expert as truncate_by_expert
from .weights import weigh_rows as weigh_rows

traits = portable._replace(independent_pairs=True)
