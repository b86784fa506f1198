"""The Triton backend: fused kernels for CUDA and ROCm. See :mod:`r2m_kernels.ops`."""

from .._interface import Traits
from .._torch import combine_rows, match_columns
from .combine import combine
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
    groups_tensors=True,
    independent_pairs=False,  # which kernel runs depends on N
    orders_components=False,
    takes_tolerance=False,  # each step would wait for the device, and a group would stop as one
    gap_basis="the last three kept energies, continued as a geometric series",
)
