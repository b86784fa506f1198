"""The options of a merge, validated when made. Symbols are those of ``r2m_kernels/README.md``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from r2m_kernels import _checks
from r2m_kernels.errors import InvalidInput


@dataclass(frozen=True)
class MergeConfig:
    """How to merge. Immutable; every field is checked on construction.

    Attributes:
        real_rank: k, dimension of the Real subspace (≥ 1). ``None``: the whole span of the task vectors, so that the
            core is their plain mean (weight averaging, CART).
        center: subtract the mean task vector before the Real subspace is computed.
        residual: ``"core"``: residual i = τ_i − τ_core; ``"own"``: residual i = τ_i − Πτ_i.
        rank: truncation rank of each residual matrix: a ratio in (0, 1] of min(m, n), rounded up, or an integer ≥ 1.
        core_scale: λ, factor of the core.
        core_mode: ``"mean"``: λ = core_scale; ``"sum"``: λ = core_scale · N (task arithmetic).
        eta: strength of the residual term, ≥ 0; what it multiplies is ``eta_mode``.
        eta_mode: ``"relative"``: the residual term's norm is eta times the core's; ``"constant"``: η = eta;
            ``"core_norm"``: η = eta · ‖λ τ_core‖ (not scale-free); ``"sum"``: η = eta · N (CART).
        norm_match: rescale every specialist's residual to their mean norm.
        layer_weight: γ_l, ``"none"`` (1) or ``"frobenius"`` (1/‖A_l‖²_F).
        exclude: globs of tensor names that take no part in subspace and truncation; they are merged as vectors are.
        svd: ``"randomized"`` (the backend's fastest near-optimal method), ``"textbook"`` (range finder with power
            iterations, for comparison) or ``"exact"`` (float64 eigendecomposition of the short side's Gram: an (s, s)
            float64 matrix per expert).
        power_iterations: of the textbook's truncation, ≥ 0. The torch and native backends' method takes one shifted
            step for every two; the Triton backend's one for each, and more at ranks below 64 (README §4).
        oversampling: sketch columns beyond the rank (beyond 1.4 times the rank where not by the textbook), ≥ 0; the
            width is rounded up to a multiple of 16. The Triton backend's method has none.
        tolerance: stop iterations when the energy in every residual's sketch grows by less than this fraction of
            itself; ``None``: never stop early. On the Triton backend tensors then go one by one, by the textbook's
            method.
        seed: seed of the random test matrices; each depends on (seed, tensor name, shape) only.
        extra: tensors that all experts have and the base lacks, such as a head: ``"error"``, ``"average"``,
            ``"drop"``.

    Raises:
        InvalidInput: a field has a wrong type or value.
    """

    real_rank: int | None = 1
    center: bool = False
    residual: Literal["core", "own"] = "core"
    rank: float | int = 0.1
    core_scale: float = 1.0
    core_mode: Literal["mean", "sum"] = "mean"
    eta: float = 0.6
    eta_mode: Literal["relative", "constant", "core_norm", "sum"] = "relative"
    norm_match: bool = True
    layer_weight: Literal["none", "frobenius"] = "none"
    exclude: tuple[str, ...] = ()
    svd: Literal["randomized", "textbook", "exact"] = "randomized"
    power_iterations: int = 2
    oversampling: int = 8
    tolerance: float | None = None
    seed: int = 0
    extra: Literal["error", "average", "drop"] = "error"

    def __post_init__(self) -> None:
        normal = object.__setattr__  # the dataclass is frozen; numpy scalars and lists become plain values here
        if self.real_rank is not None:
            normal(self, "real_rank", _checks.integer("real_rank", self.real_rank, minimum=1))
        normal(self, "rank", _checks.rank(self.rank))
        for field in ("center", "norm_match"):
            _checks.boolean(field, getattr(self, field))
        normal(self, "core_scale", _checks.number("core_scale", self.core_scale))
        normal(self, "eta", _checks.number("eta", self.eta, minimum=0.0))
        if self.tolerance is not None:
            normal(self, "tolerance", _checks.number("tolerance", self.tolerance, minimum=0.0))
        for field, minimum in (("power_iterations", 0), ("oversampling", 0), ("seed", None)):
            normal(self, field, _checks.integer(field, getattr(self, field), minimum=minimum))
        for field, choices in _CHOICES.items():
            _checks.choice(field, getattr(self, field), choices)
        normal(self, "exclude", _checks.globs("exclude", self.exclude))

    @classmethod
    def r2m(cls, **overrides: Any) -> MergeConfig:
        """R²M (arXiv 2509.24367) with the defaults of this package; ``overrides`` are fields."""
        return cls().replace(**overrides)

    @classmethod
    def weight_average(cls) -> MergeConfig:
        """θ₀ + mean τ_i (model soups, arXiv 2203.05482)."""
        return cls(real_rank=None, eta=0.0, eta_mode="constant", norm_match=False)

    @classmethod
    def task_arithmetic(cls, scale: float) -> MergeConfig:
        """θ₀ + scale · Σ τ_i (arXiv 2212.04089)."""
        scale = _checks.number("scale", scale)
        return cls(real_rank=None, core_scale=scale, core_mode="sum", eta=0.0, eta_mode="constant", norm_match=False)

    @classmethod
    def cart(cls, rank: float | int, scale: float) -> MergeConfig:
        """θ₀ + mean τ + scale · Σ truncated(τ_i − mean τ) (CART, arXiv 2412.12153)."""
        scale = _checks.number("scale", scale, minimum=0.0)
        return cls(real_rank=None, rank=rank, eta=scale, eta_mode="sum", norm_match=False)

    def replace(self, **overrides: Any) -> MergeConfig:
        """A copy with some fields changed.

        Raises:
            InvalidInput: an unknown field or a bad value.
        """
        _checks.known_fields(overrides, [field.name for field in dataclasses.fields(self)])
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        return {**dataclasses.asdict(self), "exclude": list(self.exclude)}


def checked(config: object) -> MergeConfig:
    """``config`` itself; InvalidInput if it is something else."""
    if not isinstance(config, MergeConfig):
        raise InvalidInput(f"config: expected a MergeConfig, got {type(config).__name__}")
    return config


_CHOICES: dict[str, tuple[str, ...]] = {
    "residual": ("core", "own"),
    "core_mode": ("mean", "sum"),
    "eta_mode": ("relative", "constant", "core_norm", "sum"),
    "layer_weight": ("none", "frobenius"),
    "svd": ("randomized", "textbook", "exact"),
    "extra": ("error", "average", "drop"),
}
