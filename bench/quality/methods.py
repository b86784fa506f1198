"""Everything that is compared, and what each method may choose from: as many candidates for all, eight.

A candidate is a configuration of the package or a rule in plain PyTorch (``competitors``, ``decorrelated``). Whatever
needs no choice is a method with one candidate. ``R2M`` is the first candidate for the default, whatever came to be it;
ablations are around the default itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.quality.competitors import dc_merge, larv, monosoup, resmerge
from bench.quality.decorrelated import compressed_ensemble, core_at_full_length, decorrelated, mean_of, tsv_m_by_core
from bench.quality.parts import StateDict
from r2m_kernels import MergeConfig, merge

BUDGET = 8
Candidate = MergeConfig | Callable[..., StateDict | list[StateDict]]
"""A configuration, or a function of base and experts: at module level, or a ``partial`` of one: processes get it."""


# R²M with residuals at a tenth of full rank, all rows alike: the first candidate for the default, whatever that is.
A = MergeConfig.r2m(rank=0.1, row_power=0.0, core_scale=1.0, core_mode="restored", eta=1.0, head="mean", whole_up_to=0)
# By rows at four tenths, small matrices whole: what the protocol chose.
CHOSEN = A.replace(rank=0.4, row_power=3.0, whole_up_to=16)


def merged(candidate: Candidate, base: StateDict, experts: Sequence[StateDict], **overrides: Any) -> list[StateDict]:
    """What a candidate makes of them: one state dict, or several whose mean logit counts.

    Args:
        candidate: of a method.
        base: the specialists' base.
        experts: the specialists.
        overrides: fields of the configuration; a rule takes its own arguments of these names.
    """
    made = merge(base, experts, candidate, **overrides) if isinstance(candidate, MergeConfig) else None
    made = candidate(base, experts, **overrides) if made is None else made
    return made if isinstance(made, list) else [made]


def key(candidate: Candidate) -> str:
    """A candidate in words that stay the same: function and arguments, or the fields that ``A`` has not."""
    if isinstance(candidate, MergeConfig):
        others = A.to_dict()
        fields = {name: value for name, value in candidate.to_dict().items() if value != others[name]}
        return f"MergeConfig({_words(fields)})"
    if isinstance(candidate, partial):
        return f"{candidate.func.__name__}({_words(candidate.keywords)})"
    return f"{candidate.__name__}()"


def _words(arguments: Mapping[str, Any]) -> str:
    def word(value: Any) -> str:
        if isinstance(value, tuple):
            return f"({', '.join(map(word, value))})"
        return key(value) if isinstance(value, MergeConfig) or callable(value) else repr(value)

    return ", ".join(f"{name}={word(value)}" for name, value in sorted(arguments.items()))


def words_of(candidate: Candidate) -> set[str]:
    """Whatever has meant a candidate: its key, and what stood in the protocol before ``whole_up_to`` was an option.

    That was a rule which gave the same ranks by name: ``small_whole(config=…)``.
    """
    words = {key(candidate)}
    if isinstance(candidate, MergeConfig) and candidate.whole_up_to == CHOSEN.whole_up_to:
        words.add(f"small_whole(config={key(candidate.replace(whole_up_to=0))})")
    return words


@dataclass(frozen=True)
class Method:
    """A way to merge.

    Attributes:
        name: the row of the table.
        candidates: words → candidate.
        kind: ``peer``, ``ours``, ``ablation`` or ``idea``, which has no row on the page.
    """

    name: str
    candidates: Mapping[str, Candidate]
    kind: str = "peer"

    @property
    def tuned(self) -> bool:
        return len(self.candidates) > 1

    def picked(self, chosen: Mapping[str, str]) -> Candidate:
        """The one candidate that validation chose, for one architecture."""
        return self.candidates[chosen[self.name]]


def _fixed(name: str, candidate: Candidate, kind: str = "peer") -> Method:
    return Method(name, {"": candidate}, kind)


def averaged(scale: float) -> MergeConfig:
    """The weight average with its change times ``scale``."""
    return MergeConfig.weight_average().replace(core_scale=scale)


def lengthened(scale: float) -> MergeConfig:
    """``A`` with its change times ``scale``, the classifier's mean apart."""
    return A.replace(core_scale=scale, eta=scale)


def peers() -> list[Method]:
    """Other methods of the literature, each with the same tuning budget; averages need none."""
    scales = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2)
    soups: dict[str, Candidate] = {
        f"effective rank, × {s:g}": MergeConfig.mono_soup().replace(core_scale=s, eta=s, head="mean")
        for s in (1.0, 1.2, 1.5, 2.0)
    }
    soups |= {
        f"energy {energy:g}, × {s:g}": partial(monosoup, energy=energy, then=averaged(s).replace(head="mean"))
        for energy in (0.8, 0.95)
        for s in (1.0, 1.5)
    }
    tiers = {"tanh": None, "tiers ± 0.2": 0.2}
    under = {
        "average": averaged(1.0),
        "average × 1.2": averaged(1.2),
        "Iso-C": MergeConfig.iso_c(),
        "TSV-M": MergeConfig.tsv_m(),
    }
    return [
        _fixed("weight average", averaged(1.0)),
        *(_fixed(f"weight average × {scale:g}", averaged(scale)) for scale in (1.2, 1.5, 2.0)),
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
        _fixed("TSV-M × 1", MergeConfig.tsv_m(1.0)),
        _fixed("TSV-M × 1.2", MergeConfig.tsv_m(1.2)),
        Method("Iso-C", {f"α {s:g}": MergeConfig.iso_c(s) for s in scales}),
        Method("STAR", {f"share {s:g}": MergeConfig.star(s) for s in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9)}),
        Method("SCORE", {f"α {s:g}": MergeConfig.score(s).replace(head="mean") for s in scales}),
        Method(
            "SWUDI",
            {
                f"{n} steps, × {s:g}": MergeConfig.swudi(n, s).replace(head="mean")
                for n in (3, 10, 30, 100)
                for s in (1.0, 1.2)
            },
        ),
        Method("MonoSoup", soups),
        Method(
            "LARV",
            {
                f"{words}, {name}": partial(larv, tiers=tier, then=then)
                for words, tier in tiers.items()
                for name, then in under.items()
            },
        ),
        Method(
            "ResMerge",
            {
                f"budget {b:g}, × {s:g}": partial(resmerge, budget=b, scale=s)
                for b in (0.2, 0.5, 1.0, 2.0)
                for s in (1.0, 1.2)
            },
        ),
        Method(
            "DC-Merge",
            {
                f"{'smooth' if smooth else 'as they are'}, {'elected' if elect else 'summed'}, α {s:g}": partial(
                    dc_merge, smooth=smooth, elect=elect, scale=s
                )
                for smooth in (True, False)
                for elect in (True, False)
                for s in (0.6, 1.0)
            },
        ),
    ]


def ours() -> list[Method]:
    """R²M in the forms that were candidates, tuned, and as the paper has it; and what we made beside it."""
    r2m, kit = A.replace, MergeConfig.r2m_paper
    clean = {"effective rank": None, "energy 0.5": 0.5, "energy 0.8": 0.8, "energy 0.95": 0.95}
    return [
        _fixed("R2M", r2m(), "ours"),
        _fixed("R2M × 1.2", lengthened(1.2), "ours"),
        Method(
            "R2M on cleaned specialists",
            {
                f"{words}, {name}": partial(monosoup, energy=energy, then=then)
                for words, energy in clean.items()
                for name, then in {"the default": CHOSEN, "rank .1": A}.items()
            },
            "ours",
        ),
        _fixed("R2M by rows, rank .2", r2m(rank=0.2, row_power=3.0), "ours"),
        _fixed("R2M by rows, rank .4", r2m(rank=0.4, row_power=3.0), "ours"),
        _fixed(
            "R2M by rows, rank .4, small matrices whole",
            CHOSEN,
            "ours",
        ),
        _fixed(
            "R2M by rows, rank .4, η 1.2, small matrices whole",
            CHOSEN.replace(eta=1.2),
            "ours",
        ),
        _fixed("R2M by rows, rank .4, η 1.2", r2m(rank=0.4, row_power=3.0, eta=1.2), "ours"),
        _fixed("R2M by rows on whole residuals", r2m(rank=1.0, row_power=3.0, head="merge"), "ours"),
        _fixed("R2M, public kit's settings", kit(), "ours"),
        _fixed("R2M, public kit's settings without a Real subspace", kit(real_rank=None), "ours"),
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
        _fixed("R2M decorrelated", partial(decorrelated), "ours"),
        _fixed("R2M decorrelated, by tensor", partial(decorrelated, by_tensor=True), "ours"),
        _fixed("R2M decorrelated, K1", partial(decorrelated, residual="matched"), "ours"),
        _fixed("TSV-M by R2M's core, K3", partial(tsv_m_by_core, scale=1.2, power=0.5), "ours"),
        Method(
            "TSV-M by R2M's core",
            {
                f"power {p:g}, α {s:g}": partial(tsv_m_by_core, scale=s, power=p)
                for p in (0.5, 1.0)
                for s in (0.6, 0.8, 1.0, 1.2)
            },
            "ours",
        ),
        _fixed("mean of R2M and TSV-M", partial(mean_of, configs=(r2m(), MergeConfig.tsv_m())), "ours"),
        _fixed("compressed ensemble, rank 0.05", partial(compressed_ensemble), "ours"),
        _fixed("compressed ensemble, rank 1", partial(compressed_ensemble, rank=0.0, own_vectors=False), "ours"),
    ]


def ablations() -> list[Method]:
    """The default with one part of it changed at a time."""
    r2m = CHOSEN.replace
    changed: dict[str, Candidate] = {
        **{f"rank {r:g}": r2m(rank=r) for r in (0.1, 0.2, 1.0)},
        "small matrices truncated too": r2m(whole_up_to=0),
        "all rows alike": r2m(row_power=0.0),
        "row power 2": r2m(row_power=2.0),
        "k = 2": r2m(real_rank=2),
        "the mean as core": r2m(real_rank=None),
        "no Real subspace": r2m(real_rank=0),
        "no residuals": r2m(eta=0.0),
        **{f"η {e:g}": r2m(eta=e) for e in (0.5, 1.2, 1.5)},
        "norms not matched": r2m(norm_match=False),
        "centred": r2m(center=True),
        "own residuals": r2m(residual="own"),
        "core not restored": r2m(core_mode="mean"),
        "core at full length": partial(core_at_full_length, config=CHOSEN),
        "head merged": r2m(head="merge"),
        "weighted layers": r2m(layer_weight="frobenius"),
    }
    return [_fixed(f"default, {name}", candidate, "ablation") for name, candidate in changed.items()]


def all_methods() -> list[Method]:
    """In the order of the table."""
    return [*peers(), *ours(), *ablations()]
