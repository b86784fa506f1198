"""The methods of a merge, each declared once: constructors of :class:`MergeConfig`, whose fields are in :mod:`fields`.

The command's methods and help, recipes and the tables of the READMEs come from here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from . import checks
from .errors import BadOption
from .fields import FILES, METHOD, OPTIONS, REAL, STRENGTH, TRUNCATION, Fields
from .options import Option, documented, method, read_methods
from .overrides import Overrides
from .plugins import Methods

# What the public kit and its sister project truncate where they truncate.
ATTENTION_AND_MLP = ("*attn*", "*attention*", "*mlp*")
# All rows weigh the same and small matrices are truncated too: what only this package's R²M does otherwise.
_ALL_ALIKE = {"row_power": 0.0, "whole_up_to": 0}
_RANDOMIZED = ("svd", "power_iterations", "oversampling", "tolerance", "seed")


@dataclass(frozen=True, repr=False)
class MergeConfig(Fields):
    """How to merge. Immutable; every field is checked on construction. Printed are the fields that are not default.

    Raises:
        InvalidInput: a field has a wrong type or value.
    """

    @classmethod
    @method("R²M", "arXiv 2509.24367", uses=(REAL, TRUNCATION, STRENGTH))
    def r2m(cls, **overrides: Unpack[Overrides]) -> MergeConfig:
        """R²M (arXiv 2509.24367) with the defaults of this package, which the fields have; ``overrides`` are fields.

        The Real component is the mean task vector's part in the top singular direction of the task vectors, with half
        of the length restored that averaging took from it. Residuals are truncated layer by layer to four tenths of
        full rank; matrices with a side of at most 16 stay whole. In each row of a matrix (an output neuron) a residual
        weighs by the cube of its length there, all residuals matched to one norm. The head is the mean of the heads.
        """
        return cls().replace(**overrides)

    @classmethod
    @method("R²M as the authors' public script has it", uses=(REAL, TRUNCATION, STRENGTH))
    def r2m_paper(cls, **overrides: Unpack[Overrides]) -> MergeConfig:
        """R²M as the authors' public kit computes it; ``overrides`` are fields.

        Task vectors are not centred; tensors with "ln" or "bias" in their names take no part in the subspace, so that
        their core is the mean; residuals are τ_i − core, whole unless a ``rank`` is given, which then is that of
        attention and MLP matrices, max(1, ⌊rank · min(m, n)⌋); one norm per specialist; η = 0.6 · ‖core‖, which is not
        scale-free; the head is the mean of the heads. The kit weighs layers by √P_l/‖A_l‖_F unless told "none", and
        multiplies by that once too often, which makes cores 100 to 10,000 times too long: here it is none. Ours, where
        the kit is silent: no tensor of one dimension takes part, whatever its name, and ‖core‖ is of those that do.
        """
        kit = {"exclude": ("*ln*", "*bias*"), "truncate": ATTENTION_AND_MLP, "rank_rounding": "down"}
        fields = {"core_mode": "mean", "rank": 1.0, "eta": 0.6, "eta_mode": "core_norm"}
        return cls._made({**_ALL_ALIKE, **fields, **kit}).replace(**overrides)

    @classmethod
    @method("R²M as summaries of the paper have it: centred, own residuals", uses=(REAL, TRUNCATION, STRENGTH))
    def r2m_centred(cls, **overrides: Unpack[Overrides]) -> MergeConfig:
        """R²M by centred task vectors and residuals τ_i − Πτ_i, as summaries of the paper have it.

        Centring makes the core a contrast between specialists, next to nothing of their mean, and η = 0.6 · ‖core‖ with
        it: the merge is nearly the base, and the report says to how many per cent.
        """
        fields = {"center": True, "residual": "own", "core_mode": "mean", "eta": 0.6, "eta_mode": "core_norm"}
        return cls._made({**_ALL_ALIKE, "rank": 0.1, **fields}).replace(**overrides)

    @classmethod
    def _made(cls, fields: Mapping[str, Any]) -> MergeConfig:
        return cls(**fields)

    @classmethod
    @method(
        "R²M with a relative eta",
        uses=(REAL, TRUNCATION, STRENGTH),
        instead="r2m with eta_mode=relative, eta=0.6, core_mode=mean, head=merge, rank=0.1, row_power=0, whole_up_to=0",
    )
    def r2m_truncated(cls, rank: float | int = 0.1, **overrides: Any) -> MergeConfig:
        """R²M with all rows alike and a residual term 0.6 times as long as the core: to be written as an ``r2m``."""
        warnings.warn(METHODS["r2m_truncated"].former, FutureWarning, stacklevel=2)
        fields = {"rank": rank, "core_mode": "mean", "eta": 0.6, "eta_mode": "relative", "head": "merge"}
        return cls(**{**_ALL_ALIKE, **fields, **overrides})

    @classmethod
    @method("mean of the experts", "model soups, arXiv 2203.05482", uses=("core_scale", "scale_by"))
    def weight_average(cls) -> MergeConfig:
        """θ₀ + mean τ_i."""
        return cls._averaged()

    @classmethod
    def _averaged(cls, **fields: Any) -> MergeConfig:
        """The mean as the core, without anything that R²M adds, on top of which are ``fields``."""
        plain = {"real_rank": None, "rank": 1.0, "core_mode": "mean", "eta": 0.0, "norm_match": False, "head": "merge"}
        return cls(**{**_ALL_ALIKE, **plain, **fields})

    @classmethod
    @method("base + scale · sum of task vectors", "arXiv 2212.04089")
    def task_arithmetic(cls, scale: float = 0.3) -> MergeConfig:
        """θ₀ + scale · Σ τ_i; 0.3 is what the literature uses where the scale is not tuned."""
        return cls._averaged(core_scale=checks.number("scale", scale), core_mode="sum")

    @classmethod
    @method(
        "mean + scale · sum of truncated centred task vectors", "CART, arXiv 2412.12153", uses=(TRUNCATION, "exclude")
    )
    def cart(cls, rank: float | int = 0.1, scale: float = 1.0) -> MergeConfig:
        """θ₀ + mean τ + scale · Σ truncated(τ_i − mean τ); untuned: 1 adds every truncated residual as it is."""
        return cls._averaged(rank=rank, eta=checks.number("scale", scale, minimum=0.0), eta_mode="sum")

    @classmethod
    @method("base + scale · mean of the largest elements that agree in sign", "TIES, arXiv 2306.01708")
    def ties(cls, density: float = 0.2, scale: float = 1.0) -> MergeConfig:
        """θ₀ + scale · mean of the elements that agree in sign, of the largest ``density``."""
        return cls._averaged(elementwise="ties", density=density, core_scale=checks.number("scale", scale))

    @classmethod
    @method(
        "base + scale · sum of task vectors with elements dropped at random", "DARE, arXiv 2311.03099", uses=("seed",)
    )
    def dare(cls, density: float = 0.2, scale: float = 0.3) -> MergeConfig:
        """θ₀ + scale · Σ of a random ``density`` of elements, divided by it."""
        scale = checks.number("scale", scale)
        return cls._averaged(elementwise="dare", density=density, core_scale=scale, core_mode="sum")

    @classmethod
    @method(
        "mean of task vectors cut to a share of their nuclear norm and scaled up to it",
        "STAR, arXiv 2502.10339",
        uses=("rank", "exclude"),
    )
    def star(cls, share: float = 0.4) -> MergeConfig:
        """θ₀ + mean of the τ_i cut to ``share`` of their nuclear norm and scaled up to it."""
        rank = checks.share("share", share)
        return cls._averaged(real_rank=0, rank=rank, spectrum="rescale", eta=1.0, svd="exact")

    @classmethod
    @method(
        "base + scale · sum of decorrelated low-rank task vectors",
        "TSV-M, arXiv 2412.00081",
        uses=(*_RANDOMIZED, "exclude"),
    )
    def tsv_m(cls, scale: float = 1.0) -> MergeConfig:
        """θ₀ + scale · Σ of the τ_i at rank min(m, n)/N, decorrelated; vectors: mean."""
        scale = checks.number("scale", scale, minimum=0.0)
        return cls._averaged(real_rank=0, spectrum="orthogonal", core_scale=scale, eta=scale, eta_mode="sum")

    @classmethod
    @method(
        "base + scale · sum of task vectors with equal singular values", "Iso-C, arXiv 2502.04959", uses=("exclude",)
    )
    def iso_c(cls, scale: float = 1.0) -> MergeConfig:
        """θ₀ + scale · Σ τ_i with equal singular values; vectors: scale · mean."""
        return cls._averaged(core_spectrum="flat", core_scale=checks.number("scale", scale))

    @classmethod
    @method(
        "base + scale · sum of task vectors without what conflicts in a basis that all share",
        "SCORE, arXiv 2603.05768",
        uses=(*_RANDOMIZED, "exclude"),
    )
    def score(cls, scale: float = 1.0) -> MergeConfig:
        """θ₀ + scale · Σ of the τ_i in TSV-M's bases, off-diagonal outliers cut; vectors: scale · mean.

        As the authors' code has it, which takes 1.96/N standard deviations for the border, but for one thing: it
        measures from the mean of the off-diagonal entries, which turns with the arbitrary signs of singular vectors and
        is 0 on average over them; here it is 0.
        """
        scale = checks.number("scale", scale, minimum=0.0)
        return cls._averaged(real_rank=0, spectrum="trim", core_scale=scale, eta=scale, eta_mode="sum")

    @classmethod
    @method(
        "base + scale · what descent on the interference of task vectors makes of their mean",
        "SWUDI by early stopping, arXiv 2606.07289",
        uses=("exclude",),
    )
    def swudi(cls, descent_steps: int = 30, scale: float = 1.0) -> MergeConfig:
        """θ₀ + scale · X_T, after T steps of descent from the mean; vectors: scale · mean.

        SWUDI's filter of WUDI's closed form, in steps of descent in place of its 1 − e^(−tλ) and without its cut to the
        leading directions. A derivation: start, length and number of steps are this package's.
        """
        scale = checks.number("scale", scale)
        return cls._averaged(descent_steps=descent_steps, core_scale=scale)

    @classmethod
    @method(
        "mean of task vectors, singular values within and beyond the effective rank weighed apart",
        "MonoSoup, arXiv 2602.09689",
        uses=("exclude",),
    )
    def mono_soup(cls) -> MergeConfig:
        """θ₀ + mean of the τ_i with singular values weighed in two parts; vectors: mean.

        With one expert it is the paper's method, by the authors' rule without a threshold: the parts are told apart by
        the effective rank of Roy and Vetterli. The mean over several is this package's.
        """
        return cls._averaged(real_rank=0, spectrum="reweigh", eta=1.0, svd="exact")


def checked(config: object, default: MergeConfig) -> MergeConfig:
    """``config`` itself, or ``default`` for ``None``; BadOption if it is something else."""
    if config is None:
        return default
    if not isinstance(config, MergeConfig):
        raise BadOption(f"config: expected a MergeConfig, got {type(config).__name__}")
    return config


MergeConfig.__doc__ = documented(MergeConfig, OPTIONS)
# A method's own factor; the field of that name has another flag.
_SCALE = Option("scale", float, None, False, METHOD, "Factor of the sum, in ties of the mean.", flag="scale")
# Those that the command has, by its flags' names.
FLAGS: dict[str, Option] = {"scale": _SCALE} | {one.key: one for one in OPTIONS.values() if one.section}
_OWN = read_methods(MergeConfig, FLAGS, common=FILES)
METHODS = Methods(_OWN, FLAGS, FILES, MergeConfig)  # with those of installed packages
OFFERED = {name: one for name, one in _OWN.items() if not one.instead}  # in help and documentation


def make_config(name: str, options: Mapping[str, Any]) -> MergeConfig:
    """The configuration of a method.

    Args:
        name: a key of :data:`METHODS`.
        options: by keys of :data:`FLAGS`; those absent have their defaults.

    Raises:
        BadOption: an unknown method, an option that the method does not use, or a bad value.
    """
    with warnings.catch_warnings():  # who asks by name is told by who asked: `Method.former`
        warnings.simplefilter("ignore", FutureWarning)
        config: MergeConfig = METHODS[checks.choice("method", name, tuple(METHODS))].configure(options)
    return config
