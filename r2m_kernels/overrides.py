"""The options of a merge as keyword arguments that type checkers know: the fields of ``MergeConfig``, all optional."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict


class Overrides(TypedDict, total=False):
    """Fields of :class:`~r2m_kernels.MergeConfig`, which has meanings and defaults. Any sequence does for a tuple."""

    real_rank: int | None
    center: bool
    residual: Literal["core", "own"]
    rank: float | int
    core_scale: float
    core_mode: Literal["mean", "sum", "restored"]
    eta: float
    eta_mode: Literal["relative", "constant", "core_norm", "sum"]
    norm_match: bool
    row_power: float
    scale: Literal["none", "layer", "column"]
    layer_weight: Literal["none", "frobenius"]
    weights: Sequence[float] | None
    spectrum: Literal["truncate", "rescale", "orthogonal", "trim", "reweigh"]
    core_spectrum: Literal["keep", "flat"]
    elementwise: Literal["none", "ties", "dare"]
    density: float
    descent_steps: int
    ranks: Sequence[tuple[str, float | int]]
    truncate: Sequence[str]
    whole_up_to: int
    rank_rounding: Literal["up", "down"]
    head: Literal["mean", "merge"]
    exclude: Sequence[str]
    keep: Sequence[str]
    average: Sequence[str]
    svd: Literal["randomized", "textbook", "exact"]
    power_iterations: int
    oversampling: int
    tolerance: float | None
    seed: int
    extra: Literal["error", "average", "drop"]
