"""The options of a merge, validated when made. Symbols are those of ``r2m_kernels/README.md``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from . import checks
from .errors import BadOption


@dataclass(frozen=True)
class MergeConfig:
    """How to merge. Immutable; every field is checked on construction.

    Attributes:
        real_rank: k, dimension of the Real subspace. ``None``: the whole span of the task vectors, so that the
            core is their mean (weight averaging, CART). 0: none, so that residuals are the task vectors (STAR, TSV-M).
        center: subtract the mean task vector before the Real subspace is computed.
        residual: ``"core"``: residual i = τ_i − τ_core; ``"own"``: residual i = τ_i − Πτ_i.
        rank: truncation rank of each residual matrix: a ratio in (0, 1] of min(m, n), rounded up, or an integer ≥ 1.
        core_scale: λ, factor of the core.
        core_mode: ``"mean"``: λ = core_scale; ``"sum"``: λ = core_scale · N (task arithmetic); ``"restored"``: λ =
            core_scale · (mean ‖τ_i‖ / ‖mean τ‖)^½, half of what averaging took from the length: 1 for equal experts,
            N^¼ for orthogonal ones of one length, never above 4.
        eta: strength of the residual term, ≥ 0; what it multiplies is ``eta_mode``.
        eta_mode: ``"relative"``: the residual term's norm is eta times the core's; ``"constant"``: η = eta;
            ``"core_norm"``: η = eta · ‖λ τ_core‖ (not scale-free); ``"sum"``: η = eta · N (CART).
        norm_match: rescale every specialist's residual to their mean norm.
        row_power: p ≥ 0. 0: every specialist's residual counts alike. Above: in each row (output neuron) of a matrix it
            counts in proportion to the p-th power of its length there; ``norm_match`` then applies to these weights
            alone. Not with a relative eta.
        scale: what the change of a matrix is multiplied by at the end. ``"none"``: 1. ``"layer"``: (mean ‖τ_i‖ /
            ‖mean τ‖)^½, a number per tensor. ``"column"``: a number per column, so that its length is the specialists'
            mean one. Never more than 4.
        layer_weight: γ_l, ``"none"`` (1) or ``"frobenius"`` (1/‖A_l‖²_F).
        weights: one positive number per expert, or ``None`` for equal ones: an expert of weight 2 counts as two equal
            experts, as a merge of two should when it is merged again. Only their ratios matter.
        spectrum: what becomes of a residual's singular values. ``"truncate"``: the leading r_l stay. ``"rescale"``:
            the fewest whose sum is ``rank`` (then a share) of all, scaled up to the sum of all (STAR).
            ``"orthogonal"``: the leading r_l ≤ min(m, n)/N stay, and the singular vectors of all experts are made
            orthonormal together (TSV-M).
        core_spectrum: ``"keep"``, or ``"flat"``: N times the core, all its singular values set to their mean (Iso-C).
        elementwise: ``"none"``, or how elements of the task vectors are dropped: ``"ties"`` keeps the largest
            ``density`` of each expert's over all tensors and averages those that agree in sign with their sum;
            ``"dare"`` keeps a random ``density`` and divides by it. λ times the mean of what is left is added to the
            base; there are no residuals.
        density: share of elements kept by ``elementwise``, in (0, 1].
        ranks: (glob, rank) pairs: a matrix has the rank of the first pair that fits its name, and ``rank`` where none
            does.
        exclude: globs of tensor names that take no part in subspace and truncation; they are merged as vectors are.
        keep: globs of tensors that stay the base's. Experts may lack them, or have them in other shapes.
        average: globs of tensors that become the plain mean of the experts', as a head often is.
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
    rank: float | int = 1.0
    core_scale: float = 1.0
    core_mode: Literal["mean", "sum", "restored"] = "restored"
    eta: float = 1.0
    eta_mode: Literal["relative", "constant", "core_norm", "sum"] = "constant"
    norm_match: bool = True
    row_power: float = 3.0
    scale: Literal["none", "layer", "column"] = "none"
    layer_weight: Literal["none", "frobenius"] = "none"
    weights: tuple[float, ...] | None = None
    spectrum: Literal["truncate", "rescale", "orthogonal"] = "truncate"
    core_spectrum: Literal["keep", "flat"] = "keep"
    elementwise: Literal["none", "ties", "dare"] = "none"
    density: float = 0.2
    ranks: tuple[tuple[str, float | int], ...] = ()
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    average: tuple[str, ...] = ()
    svd: Literal["randomized", "textbook", "exact"] = "randomized"
    power_iterations: int = 2
    oversampling: int = 8
    tolerance: float | None = None
    seed: int = 0
    extra: Literal["error", "average", "drop"] = "error"

    def __post_init__(self) -> None:
        normal = object.__setattr__  # the dataclass is frozen; numpy scalars and lists become plain values here
        if self.real_rank is not None:
            normal(self, "real_rank", checks.integer("real_rank", self.real_rank, minimum=0))
        normal(self, "rank", checks.rank(self.rank))
        for field in ("center", "norm_match"):
            checks.boolean(field, getattr(self, field))
        normal(self, "core_scale", checks.number("core_scale", self.core_scale))
        normal(self, "eta", checks.number("eta", self.eta, minimum=0.0))
        normal(self, "row_power", checks.number("row_power", self.row_power, minimum=0.0))
        if self.tolerance is not None:
            normal(self, "tolerance", checks.number("tolerance", self.tolerance, minimum=0.0))
        for field, minimum in (("power_iterations", 0), ("oversampling", 0), ("seed", None)):
            normal(self, field, checks.integer(field, getattr(self, field), minimum=minimum))
        for field, choices in _CHOICES.items():
            checks.choice(field, getattr(self, field), choices)
        for field in ("exclude", "keep", "average"):
            normal(self, field, checks.globs(field, getattr(self, field)))
        normal(self, "ranks", checks.ranks("ranks", self.ranks))
        normal(self, "density", checks.share("density", self.density))
        if self.weights is not None:
            normal(self, "weights", checks.weights("weights", self.weights))
        if self.spectrum == "rescale" and isinstance(self.rank, int):
            raise BadOption(f"rank: expected a share of the nuclear norm with spectrum='rescale', got {self.rank}")
        if self.ranks and self.spectrum == "rescale":
            raise BadOption("ranks: spectrum='rescale' has a share of the nuclear norm, expected none")
        if self.row_power > 0 and self.eta != 0 and self.eta_mode == "relative":
            raise BadOption(
                "eta_mode: 'relative' needs the residual term's norm, which row_power="
                f"{self.row_power:g} makes as rows pass; expected row_power=0 with it, or eta_mode='constant'"
            )
        if self.core_spectrum != "keep" and self.eta != 0:
            raise BadOption(
                f"core_spectrum: '{self.core_spectrum}' has no residuals; expected eta=0, got eta={self.eta:g}"
            )
        if self.elementwise != "none" and (self.eta != 0 or self.real_rank is not None or self.core_spectrum != "keep"):
            raise BadOption(
                f"elementwise: '{self.elementwise}' has neither residuals nor subspace; expected eta=0, real_rank=None "
                f"and core_spectrum='keep', got eta={self.eta:g}, real_rank={self.real_rank}, "
                f"core_spectrum='{self.core_spectrum}'"
            )

    @classmethod
    def r2m(cls, **overrides: Any) -> MergeConfig:
        """R²M (arXiv 2509.24367) with the defaults of this package; ``overrides`` are fields.

        They are what detected best on docs/quality.md's fresh runs: whole residuals weighted row by row, and a core
        with half of the length restored that averaging took from it.
        """
        return cls().replace(**overrides)

    @classmethod
    def r2m_truncated(cls, rank: float | int = 0.1, **overrides: Any) -> MergeConfig:
        """R²M with residuals truncated to ``rank``, one norm each, and 0.6 of the core's norm together.

        It denoises, at the cost of a truncation per residual; docs/quality.md has what that did to detectors.
        """
        fields = {"rank": rank, "core_mode": "mean", "eta": 0.6, "eta_mode": "relative", "row_power": 0.0}
        return cls(**{**fields, **overrides})

    @classmethod
    def r2m_paper(cls, **overrides: Any) -> MergeConfig:
        """R²M as summaries of the paper and the authors' public script have it; ``overrides`` are fields.

        Settled: the top right singular vector of the task vectors as the Real subspace, residuals truncated layer by
        layer, one norm per specialist, heads averaged. Uncertain, since the paper's body was not at hand: centring
        (summaries have it, the script does not), residuals as τ_i − Πτ_i (the script: τ_i − core), the rank (0.05, 0.1
        and 0.2 occur in the script's file names), and η (the script: 0.4, 0.6 or 0.8 times ‖core‖, which is not
        scale-free). docs/quality.md has what these settings did here.
        """
        settings = {"center": True, "residual": "own", "rank": 0.1, "eta": 0.6, "eta_mode": "core_norm"}
        return cls._plain(norm_match=True, real_rank=1).replace(**{**settings, **overrides})

    @classmethod
    def _plain(cls, **fields: Any) -> MergeConfig:
        """Without what only R²M by rows has."""
        return cls(**{"core_mode": "mean", "row_power": 0.0, **fields})

    @classmethod
    def weight_average(cls) -> MergeConfig:
        """θ₀ + mean τ_i (model soups, arXiv 2203.05482)."""
        return cls._plain(real_rank=None, eta=0.0, eta_mode="constant", norm_match=False)

    @classmethod
    def task_arithmetic(cls, scale: float) -> MergeConfig:
        """θ₀ + scale · Σ τ_i (arXiv 2212.04089)."""
        scale = checks.number("scale", scale)
        return cls._plain(
            real_rank=None, core_scale=scale, core_mode="sum", eta=0.0, eta_mode="constant", norm_match=False
        )

    @classmethod
    def cart(cls, rank: float | int, scale: float) -> MergeConfig:
        """θ₀ + mean τ + scale · Σ truncated(τ_i − mean τ) (CART, arXiv 2412.12153)."""
        scale = checks.number("scale", scale, minimum=0.0)
        return cls._plain(real_rank=None, rank=rank, eta=scale, eta_mode="sum", norm_match=False)

    @classmethod
    def star(cls, share: float = 0.4) -> MergeConfig:
        """θ₀ + mean of the τ_i cut to ``share`` of their nuclear norm and scaled up to it (STAR, arXiv 2502.10339)."""
        share = checks.share("share", share)
        return cls._plain(
            real_rank=0, rank=share, spectrum="rescale", eta=1.0, eta_mode="constant", norm_match=False, svd="exact"
        )

    @classmethod
    def tsv_m(cls, scale: float = 1.0) -> MergeConfig:
        """θ₀ + scale · Σ of the τ_i at rank min(m, n)/N, decorrelated (TSV-M, arXiv 2412.00081); vectors: mean."""
        scale = checks.number("scale", scale, minimum=0.0)
        return cls._plain(
            real_rank=0,
            rank=1.0,
            spectrum="orthogonal",
            core_scale=scale,
            eta=scale,
            eta_mode="sum",
            norm_match=False,
        )

    @classmethod
    def iso_c(cls, scale: float = 1.0) -> MergeConfig:
        """θ₀ + scale · Σ τ_i with equal singular values (Iso-C, arXiv 2502.04959); vectors: scale · mean."""
        scale = checks.number("scale", scale)
        return cls._plain(
            real_rank=None, core_spectrum="flat", core_scale=scale, eta=0.0, eta_mode="constant", norm_match=False
        )

    @classmethod
    def ties(cls, density: float = 0.2, scale: float = 1.0) -> MergeConfig:
        """θ₀ + scale · mean of the elements that agree in sign, of the largest ``density`` (TIES, arXiv 2306.01708)."""
        return cls._by_elements("ties", density, scale, "mean")

    @classmethod
    def dare(cls, density: float = 0.2, scale: float = 0.3) -> MergeConfig:
        """θ₀ + scale · Σ of a random ``density`` of elements, divided by it (DARE, arXiv 2311.03099)."""
        return cls._by_elements("dare", density, scale, "sum")

    @classmethod
    def _by_elements(
        cls, rule: Literal["ties", "dare"], density: float, scale: float, mode: Literal["mean", "sum"]
    ) -> MergeConfig:
        return cls._plain(
            real_rank=None,
            elementwise=rule,
            density=checks.share("density", density),
            core_scale=checks.number("scale", scale),
            core_mode=mode,
            eta=0.0,
            eta_mode="constant",
            norm_match=False,
        )

    def replace(self, **overrides: Any) -> MergeConfig:
        """A copy with some fields changed.

        Raises:
            InvalidInput: an unknown field or a bad value.
        """
        checks.known_fields(overrides, [field.name for field in dataclasses.fields(self)])
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        weights = None if self.weights is None else list(self.weights)
        lists = {name: list(getattr(self, name)) for name in ("exclude", "keep", "average")}
        return {**dataclasses.asdict(self), **lists, "ranks": list(map(list, self.ranks)), "weights": weights}


def checked(config: object) -> MergeConfig:
    """``config`` itself; InvalidInput if it is something else."""
    if not isinstance(config, MergeConfig):
        raise BadOption(f"config: expected a MergeConfig, got {type(config).__name__}")
    return config


_CHOICES: dict[str, tuple[str, ...]] = {
    "residual": ("core", "own"),
    "core_mode": ("mean", "sum", "restored"),
    "eta_mode": ("relative", "constant", "core_norm", "sum"),
    "layer_weight": ("none", "frobenius"),
    "scale": ("none", "layer", "column"),
    "spectrum": ("truncate", "rescale", "orthogonal"),
    "core_spectrum": ("keep", "flat"),
    "elementwise": ("none", "ties", "dare"),
    "svd": ("randomized", "textbook", "exact"),
    "extra": ("error", "average", "drop"),
}
