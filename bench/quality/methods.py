"""Everything that is compared, and what each method may choose from: as many candidates for all, eight.

Whatever needs no choice is a method with one candidate. ``R2M`` is this package's default, untuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from r2m_kernels import MergeConfig

BUDGET = 8


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        name: the row of the table.
        candidates: words → configuration.
        kind: ``peer``, ``ours``, ``ablation`` or ``idea``, which has no row on the page.
    """

    name: str
    candidates: Mapping[str, MergeConfig]
    kind: str = "peer"

    @property
    def tuned(self) -> bool:
        return len(self.candidates) > 1

    def picked(self, chosen: Mapping[str, str]) -> MergeConfig:
        """The one candidate that validation chose, for one architecture."""
        return self.candidates[chosen[self.name]]


def _fixed(name: str, config: MergeConfig, kind: str = "peer") -> Method:
    return Method(name, {"": config}, kind)


def peers() -> list[Method]:
    """Other methods of the literature, each with the same tuning budget; averages need none."""
    scales = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2)
    return [
        _fixed("weight average", MergeConfig.weight_average()),
        _fixed("weight average × 1.2", MergeConfig.weight_average().replace(core_scale=1.2)),
        Method(
            "task arithmetic",
            {f"λ {s:g}": MergeConfig.task_arithmetic(s) for s in (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)},
        ),
        Method(
            "TIES",
            {f"density {d:g}, λ {s:g}": MergeConfig.ties(d, s) for d in (0.1, 0.2, 0.4, 0.8) for s in (0.8, 1.2)},
        ),
        Method(
            "DARE",
            {f"density {d:g}, λ {s:g}": MergeConfig.dare(d, s) for d in (0.2, 0.5, 0.8, 0.9) for s in (0.33, 0.4)},
        ),
        Method(
            "CART",
            {f"rank {r:g}, λ {s:g}": MergeConfig.cart(r, s) for r in (0.08, 0.16, 0.32, 0.5) for s in (0.5, 1.0)},
        ),
        Method("TSV-M", {f"α {s:g}": MergeConfig.tsv_m(s) for s in scales}),
        Method("Iso-C", {f"α {s:g}": MergeConfig.iso_c(s) for s in scales}),
        Method("STAR", {f"share {s:g}": MergeConfig.star(s) for s in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9)}),
    ]


def ours() -> list[Method]:
    """R²M: as it comes, as the paper has it, tuned, and with one part of it changed at a time."""
    r2m = MergeConfig.r2m
    return [
        _fixed("R2M", r2m(), "ours"),
        _fixed("R2M, rows on whole residuals", r2m(rank=1.0, row_power=3.0, head="merge"), "ours"),
        _fixed("R2M, paper's settings", MergeConfig.r2m_paper(), "ours"),
        _fixed("R2M, centred as summaries have it", MergeConfig.r2m_centred(), "ours"),
        Method(
            "R2M with a relative eta, tuned",
            {
                f"rank {r:g}, η {e:g}": r2m(rank=r, eta=e, eta_mode="relative", core_mode="mean", head="merge")
                for r in (0.1, 0.2, 0.4, 1.0)
                for e in (0.3, 0.6)
            },
            "ours",
        ),
        _fixed("R2M, whole residuals", r2m(rank=1.0), "ablation"),
        _fixed("R2M, head merged", r2m(head="merge"), "ablation"),
        _fixed("R2M, core not restored", r2m(core_mode="mean"), "ablation"),
        _fixed("R2M, residuals at rank 0.2", r2m(rank=0.2), "ablation"),
        _fixed("R2M without residuals", r2m(eta=0.0), "ablation"),
        _fixed("R2M without norm matching", r2m(norm_match=False), "ablation"),
        _fixed("R2M without a Real subspace", r2m(real_rank=0), "ablation"),
        _fixed("R2M, centred", r2m(center=True), "ablation"),
        _fixed("R2M, own residuals", r2m(residual="own"), "ablation"),
        _fixed("R2M, weighted layers", r2m(layer_weight="frobenius"), "ablation"),
    ]


def all_methods() -> list[Method]:
    """In the order of the table."""
    return [*peers(), *ours()]
