"""Merge methods by name: what each is, which options it uses, and the configuration they make.

A new method is an entry in :data:`METHODS`, a branch of :func:`make_config` and a constructor of
:class:`r2m_kernels.MergeConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2m_kernels import MergeConfig

# Every method can do this; it is about which tensors take part and not about how they are merged.
_COMMON = frozenset({"extra", "keep", "average"})
_RANDOMIZED = frozenset({"svd", "power_iterations", "oversampling", "tolerance", "seed"})
_TRUNCATION = _RANDOMIZED | {"rank", "ranks", "exclude"}
_R2M = frozenset(
    {
        "real_rank",
        "center",
        "residual",
        "core_scale",
        "core_mode",
        "eta",
        "eta_mode",
        "norm_match",
        "row_power",
        "layer_weight",
        "scale_by",
    }
)


# Options whose flag is not their name: those that are given again and again, mostly.
FLAGS = {"experts": "expert", "ranks": "rank-of", "renames": "rename", "drops": "drop", "head_tensors": "head-tensor"}


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        title: the method in a few words, with its source.
        options: the options it uses, by their names in :class:`r2m_kernels.MergeConfig`; but ``scale`` is the
            method's own factor, and the field of that name is called ``scale_by``.
        scale: default of ``scale``; None where it is not used.
    """

    title: str
    options: frozenset[str]
    scale: float | None = None


METHODS: dict[str, Method] = {
    "r2m": Method("R²M (arXiv 2509.24367)", _COMMON | _TRUNCATION | _R2M),
    "r2m_truncated": Method("R²M with residuals truncated to low rank", _COMMON | _TRUNCATION | _R2M),
    "r2m_paper": Method("R²M with the paper's settings as far as they are known", _COMMON | _TRUNCATION | _R2M),
    "weight_average": Method(
        "mean of the experts (model soups, arXiv 2203.05482)", _COMMON | {"core_scale", "scale_by"}
    ),
    # 0.3 is what the literature uses where the scale is not tuned.
    "task_arithmetic": Method("base + scale · sum of task vectors (arXiv 2212.04089)", _COMMON | {"scale"}, scale=0.3),
    # Untuned: 1 adds every truncated residual as it is.
    "cart": Method(
        "mean + scale · sum of truncated centred task vectors (CART, arXiv 2412.12153)",
        _COMMON | _TRUNCATION | {"scale"},
        scale=1.0,
    ),
    "ties": Method(
        "base + scale · mean of the largest elements that agree in sign (TIES, arXiv 2306.01708)",
        _COMMON | {"scale", "density"},
        scale=1.0,
    ),
    "dare": Method(
        "base + scale · sum of task vectors with elements dropped at random (DARE, arXiv 2311.03099)",
        _COMMON | {"scale", "density", "seed"},
        scale=0.3,
    ),
    "star": Method(
        "mean of task vectors cut to a share of their nuclear norm and scaled up to it (STAR, arXiv 2502.10339)",
        _COMMON | {"rank", "exclude"},
    ),
    "tsv_m": Method(
        "base + scale · sum of decorrelated low-rank task vectors (TSV-M, arXiv 2412.00081)",
        _COMMON | _RANDOMIZED | {"scale", "exclude"},
        scale=1.0,
    ),
    "iso_c": Method(
        "base + scale · sum of task vectors with equal singular values (Iso-C, arXiv 2502.04959)",
        _COMMON | {"scale", "exclude"},
        scale=1.0,
    ),
}


def make_config(method: str, options: Mapping[str, Any]) -> MergeConfig:
    """The configuration of a method.

    Args:
        method: a key of :data:`METHODS`.
        options: as :class:`Method` has them; those absent have their defaults.

    Raises:
        InvalidInput: an unknown method, an option that the method does not use, or a bad value.
    """
    from r2m_kernels import MergeConfig, checks
    from r2m_kernels.errors import InvalidInput

    checks.choice("method", method, tuple(METHODS))
    for name in options:
        if name not in METHODS[method].options:
            used = ", ".join(_flag(other) for other in sorted(METHODS[method].options))
            raise InvalidInput(f"{_flag(name)}: not used by the method '{method}', which uses {used}")
    fields = dict(options)
    scale = fields.pop("scale", METHODS[method].scale)
    if "scale_by" in fields:
        fields["scale"] = fields.pop("scale_by")
    if scale is not None:
        scale = checks.number("scale", scale)
    if method == "task_arithmetic":
        return MergeConfig.task_arithmetic(scale).replace(**fields)
    if method == "cart":
        return MergeConfig.cart(fields.pop("rank", 0.1), scale).replace(**fields)
    if method == "weight_average":
        return MergeConfig.weight_average().replace(**fields)
    if method == "star":
        return MergeConfig.star(fields.pop("rank", 0.4)).replace(**fields)
    if method == "tsv_m":
        return MergeConfig.tsv_m(scale).replace(**fields)
    if method == "iso_c":
        return MergeConfig.iso_c(scale).replace(**fields)
    if method == "ties":
        return MergeConfig.ties(scale=scale).replace(**fields)
    if method == "dare":
        return MergeConfig.dare(scale=scale).replace(**fields)
    if method == "r2m_truncated":
        return MergeConfig.r2m_truncated(**fields)
    if method == "r2m_paper":
        return MergeConfig.r2m_paper(**fields)
    if method == "r2m":
        return MergeConfig.r2m(**fields)
    raise AssertionError(f"no constructor for the method '{method}'")


def _flag(name: str) -> str:
    return "--" + FLAGS.get(name, name).replace("_", "-")
