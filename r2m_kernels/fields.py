"""The options of a merge, each declared once. Symbols are those of ``r2m_kernels/README.md``.

An option is a field of :class:`Fields`, which :class:`r2m_kernels.MergeConfig` is with methods: checks, docstring, the
command's flags and help, the schema of recipes and the tables of the READMEs come from here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, Unpack

from . import checks
from .errors import BadOption
from .options import Option, normalize, option, read_options
from .overrides import Overrides

FILES, METHOD, REAL, TRUNCATION, STRENGTH = (
    "Files",
    "Method",
    "Real subspace",
    "Residual truncation",
    "Strength of the residuals",
)
_NO_FLAG = ""  # methods set it
# What becomes of experts that are suspected (r2m_kernels.screening).
Screened = Literal["refuse", "leave-out"]
# Maps of singular values that need them all.
WHOLE_SPECTRUM = ("rescale", "reweigh")
# Those that give all experts one pair of bases, a share of it each.
JOINT_BASES = ("orthogonal", "trim")


@dataclass(frozen=True, repr=False)
class Fields:
    """Every option with its default: R²M (arXiv 2509.24367) as this package has it."""

    real_rank: int | None = option(
        1,
        REAL,
        "Dimension k of the Real subspace.",
        "None: the whole span of the task vectors, whose mean the core is then. 0: none, so that residuals are they.",
        minimum=0,
        metavar="K",
    )
    center: bool = option(False, REAL, "Subtract the mean task vector before the Real subspace is computed.")
    residual: Literal["core", "own"] = option(
        "core", REAL, "What a task vector loses: the core, or its own part in the subspace (τ_i − Πτ_i)."
    )
    rank: float | int = option(
        0.4,
        TRUNCATION,
        "Of each residual matrix: with a point a share of min(m, n), rounded up (0.4; 1.0: all), without one a rank "
        "(16); in star a share of the nuclear norm.",
        check=checks.rank,
        metavar="RANK",
        free=True,
    )
    core_scale: float = option(1.0, REAL, "Factor of the core.", "λ is made of it by core_mode.", free=True)
    core_mode: Literal["mean", "sum", "restored"] = option(
        "restored",
        REAL,
        "The core as it is, times the number of experts, or with half of the length that averaging took from it.",
        "mean: λ = core_scale. sum: λ = core_scale · N (task arithmetic). restored: λ = core_scale · (mean ‖τ_i‖ / "
        "‖mean τ‖)^½: 1 for equal experts, N^¼ for orthogonal ones of one length, never above 4.",
        free=True,
    )
    eta: float = option(
        1.0, STRENGTH, "How much of the residuals is added; what it multiplies is eta_mode's.", minimum=0, free=True
    )
    eta_mode: Literal["relative", "constant", "core_norm", "sum"] = option(
        "constant",
        STRENGTH,
        "relative: the residual term's norm is eta times the core's; constant: η = eta; core_norm: η = eta · "
        "‖λ τ_core‖, which is not scale-free; sum: η = eta · N.",
        free=True,
    )
    norm_match: bool = option(True, STRENGTH, "Rescale every expert's residual to their mean norm first.", free=True)
    row_power: float = option(
        3.0,
        STRENGTH,
        "In each row of a matrix (an output neuron), weigh an expert's residual by the P-th power of its length there; "
        "0: all alike. Not with a relative eta.",
        "norm_match then applies to these weights alone.",
        minimum=0,
        metavar="P",
        free=True,
    )
    scale: Literal["none", "layer", "column"] = option(
        "none",
        STRENGTH,
        "Lengthen the change of each matrix towards the experts' own: as a whole, or column by column.",
        "layer: by (mean ‖τ_i‖ / ‖mean τ‖)^½ of the tensor. column: to the experts' mean length. At most 4 times.",
        flag="scale-by",
        free=True,
    )
    layer_weight: Literal["none", "frobenius"] = option(
        "none", REAL, "A tensor's weight γ in the Gram matrix: 1, or 1/‖its task vectors‖²."
    )
    weights: tuple[float, ...] | None = option(
        None,
        _NO_FLAG,
        "One positive number per expert, or None for equal ones: an expert of weight 2 counts as two equal experts, as "
        "a merge of two should when it is merged again. Only their ratios matter.",
        check=checks.weights,
        unset="equal",
    )
    spectrum: Literal["truncate", "rescale", "orthogonal", "trim", "reweigh"] = option(
        "truncate",
        _NO_FLAG,
        "What becomes of a residual's singular values.",
        "truncate: the leading r_l stay. rescale: the fewest whose sum is rank (then a share) of all, scaled up to the "
        "sum of all (STAR). orthogonal: the leading r_l ≤ min(m, n)/N stay, and the singular vectors of all experts "
        "are made orthonormal together (TSV-M). trim: in the bases that these span, residuals keep their diagonals and "
        "what is small beside them (SCORE). reweigh: all stay, those within the effective rank times one factor and "
        "those beyond times another (MonoSoup).",
    )
    core_spectrum: Literal["keep", "flat"] = option(
        "keep", _NO_FLAG, "flat: N times the core, all its singular values set to their mean (Iso-C)."
    )
    elementwise: Literal["none", "ties", "dare"] = option(
        "none",
        _NO_FLAG,
        "How elements of the task vectors are dropped.",
        "ties keeps the largest density of each expert's over all tensors and averages those that agree in sign with "
        "their sum; dare keeps a random density and divides by it. λ times the mean of what is left is added to the "
        "base; there are no residuals.",
    )
    density: float = option(
        0.2, METHOD, "Share of each expert's elements that ties and dare keep, in (0, 1].", check=checks.share
    )
    descent_steps: int = option(
        0,
        METHOD,
        "Steps of gradient descent from the mean in swudi.",
        "On Σ_i w_i ‖(X − τ_i) τ_iᵀ‖² / ‖τ_i‖², each matrix by itself, from the core; λ times what comes out is added "
        "to the base, and there are no residuals. 0: none.",
        minimum=0,
        metavar="T",
    )
    ranks: tuple[tuple[str, float | int], ...] = option(
        (),
        TRUNCATION,
        "Another rank for these tensors, by name; the first that fits counts.",
        "Pairs of a glob and a rank.",
        check=checks.ranks,
        flag="rank-of",
        free=True,
    )
    truncate: tuple[str, ...] = option(
        (),
        TRUNCATION,
        "Truncate the residuals of these matrices alone, by name; those of the others stay whole.",
        unset="all",
    )
    whole_up_to: int = option(
        16,
        TRUNCATION,
        "Matrices whose short side is at most this are not truncated.",
        "A tenth of a depthwise kernel's nine columns is one. Those with a rank of their own in ranks keep it.",
        minimum=0,
        metavar="SIDE",
        free=True,
    )
    rank_rounding: Literal["up", "down"] = option(
        "up", _NO_FLAG, "What a share of min(m, n) that is no whole number becomes; never less than 1."
    )
    head: Literal["mean", "merge"] = option(
        "mean",
        _NO_FLAG,
        "What becomes of the classifier: the plain mean of the experts', out of subspace, norms and λ, or it is merged "
        "like the rest.",
        "It is found by names and shapes (r2m_kernels.heads); the report lists what was taken.",
    )
    exclude: tuple[str, ...] = option(
        (), REAL, "Tensors to keep out of subspace and truncation, by name; they are merged as vectors are."
    )
    keep: tuple[str, ...] = option(
        (), FILES, "Tensors that stay the base's, by name; experts may lack them, or have them in other shapes."
    )
    average: tuple[str, ...] = option(
        (), FILES, "Tensors that become the plain mean of the experts', as a head often is."
    )
    svd: Literal["randomized", "textbook", "exact"] = option(
        "randomized",
        TRUNCATION,
        "How to truncate.",
        "randomized: the backend's fastest near-optimal method. textbook: a range finder with power iterations, for "
        "comparison. exact: an eigendecomposition of the short side's Gram, an (s, s) float64 matrix per expert.",
    )
    power_iterations: int = option(
        2,
        TRUNCATION,
        "Of the truncation: more is closer to the optimum.",
        "The textbook's count. Other methods take a shifted step for each; the torch and native backends' more where "
        "more than .15 of min(m, n) is kept, and one for two at ranks below 64, where the Triton backend's takes more.",
        minimum=0,
    )
    oversampling: int = option(
        8,
        TRUNCATION,
        "Columns of the sketch beyond the rank.",
        "The textbook's is rounded up to a multiple of 16. Elsewhere only the first sketch has them, to tell steep "
        "spectra by; beyond 1.4 times the rank at ranks below 64. The Triton backend's method has none.",
        minimum=0,
    )
    tolerance: float | None = option(
        None,
        TRUNCATION,
        "Stop iterating where the energy in every residual's sketch grows by less than this share of itself.",
        "On the Triton backend tensors then go one by one, by the textbook's method.",
        minimum=0,
        unset="never",
    )
    seed: int = option(
        0, TRUNCATION, "Of random test matrices and masks.", "A matrix depends on (seed, tensor name, shape) only."
    )
    extra: Literal["error", "average", "drop"] = option(
        "error", FILES, "Tensors that all experts have and the base lacks, such as a head."
    )

    def __post_init__(self) -> None:
        normalize(self, OPTIONS)  # numpy scalars and lists become plain values
        if self.spectrum == "rescale" and isinstance(self.rank, int):
            raise BadOption(f"rank: expected a share of the nuclear norm with spectrum='rescale', got {self.rank}")
        if self.ranks and self.spectrum == "rescale":
            raise BadOption("ranks: spectrum='rescale' has a share of the nuclear norm, expected none")
        if self.spectrum == "reweigh" and (self.rank != 1.0 or isinstance(self.rank, int) or self.ranks):
            asked = f"rank={self.rank} and {len(self.ranks)} ranks by name"
            raise BadOption(f"rank: spectrum='reweigh' keeps all singular values; expected rank=1.0 alone, got {asked}")
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

        if self.descent_steps and (self.eta != 0 or self.elementwise != "none" or self.core_spectrum != "keep"):
            raise BadOption(
                "descent_steps: descent has neither residuals nor another map; expected eta=0, elementwise='none' and "
                f"core_spectrum='keep', got eta={self.eta:g}, elementwise='{self.elementwise}', "
                f"core_spectrum='{self.core_spectrum}'"
            )

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name, one in OPTIONS.items() if getattr(self, name) != one.default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def replace(self, **overrides: Unpack[Overrides]) -> Self:
        """A copy with some fields changed.

        Raises:
            InvalidInput: an unknown field or a bad value.
        """
        checks.known_fields(overrides, list(OPTIONS))
        given: dict[str, Any] = {**overrides}
        return dataclasses.replace(self, **given)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


OPTIONS: dict[str, Option] = read_options(Fields)  # by field
FREE_FIELDS = frozenset(name for name, one in OPTIONS.items() if one.free)  # of a merge from an analysis
