"""Which experts do not look like the specialists that others are, by how their task vectors lie (README §7).

Bad ones that these numbers cannot show there are, too: docs/screening.md has the rate of each kind.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from . import checks
from ._stream.budget import Inputs
from ._stream.tensors import TensorSource
from .errors import DoesNotFit, quoted
from .fields import Screened
from .findings import Findings
from .gram import ordered_sum
from .heads import classifier


class _Known(NamedTuple):
    """What is known of task vectors τ_i over matrices.

    Attributes:
        norms: (N,) ‖τ_i‖, float64.
        base: ‖θ₀‖.
        cosines: (N, N).
        agreement: (N, N) cosines of the classifier's changes; where there is none, ``cosines``.
    """

    norms: list[float]
    base: float
    cosines: list[list[float]]
    agreement: list[list[float]]


Number = Callable[[_Known, int, Sequence[int]], float | None]
"""Of an expert, by its place, among others; None: it is not defined."""


def _moved(known: _Known, one: int, _others: Sequence[int]) -> float | None:
    return known.norms[one] / known.base if known.base > 0 else None


def _length(known: _Known, one: int, others: Sequence[int]) -> float | None:
    median = statistics.median(known.norms[other] for other in others) if others else 0.0
    return known.norms[one] / median if median > 0 else None


def _alike(known: _Known, one: int, others: Sequence[int]) -> float | None:
    return max((known.cosines[one][other] for other in others if other < one), default=None)


def _agreement(known: _Known, one: int, others: Sequence[int]) -> float | None:
    # Of two that point apart neither is the wrong one.
    return statistics.fmean(known.agreement[one][other] for other in others) if len(others) > 1 else None


class Check(NamedTuple):
    """One number of an expert, and from where on it is none of a specialist.

    Attributes:
        number: how reports call it.
        meaning: of the number.
        of: works it out.
        sign: 1: too large beyond the limit; -1: too small.
        limit: between the healthy and the bad ones of small detectors (docs/screening.md).
        sentence: what is said then, with the number.
    """

    number: str
    meaning: str
    of: Number
    sign: int
    limit: float
    sentence: str


# In this order, since one that is found is left out of the numbers of the others.
CHECKS = (
    Check(
        "moved",
        "length of its task vector by the base's",
        _moved,
        1,
        1.15,
        "its task vector has {:.0%} of the base's length: another base, or nothing that was fine-tuned",
    ),
    Check(
        "moved",
        "the same",
        _moved,
        -1,
        1e-6,
        "it equals the base in every matrix, or nearly (its task vector has {:.0e} of that one's length)",
    ),
    Check(
        "copy",
        "largest cosine of its task vector with one before it",
        _alike,
        1,
        0.995,
        "its task vector has cosine {:.3f} with another's: the same specialist twice",
    ),
    Check(
        "length",
        "length of its task vector by the median of the others'",
        _length,
        1,
        1.8,
        "its task vector is {:.1f} times as long as the others': trained far longer, or faster",
    ),
    Check(
        "agreement",
        "mean cosine of its classifier's change with the others'",
        _agreement,
        -1,
        0.0,
        "its classifier moved against the others' (mean cosine {:.2f}): were real and fake exchanged in its labels?",
    ),
)


@dataclass(frozen=True)
class Screening:
    """What was found of each expert.

    Attributes:
        numbers: expert → number of :data:`CHECKS` → its value, among those not found before; None: not defined.
        suspects: expert → why it is no specialist as the others are.
    """

    numbers: Mapping[str, Mapping[str, float | None]]
    suspects: Mapping[str, str]

    @property
    def told(self) -> list[str]:
        """A sentence for each suspect."""
        return [f"expert {quoted(name)}: {why}" for name, why in self.suspects.items()]

    def kept(self, mode: str) -> list[str]:
        """Names of the experts that are merged.

        Args:
            mode: what becomes of suspects, one of :data:`r2m_kernels.fields.Screened`.

        Raises:
            BadOption: no such mode.
            DoesNotFit: there are suspects and ``mode`` is ``refuse``, or nobody else is there.
        """
        checks.choice("screen", mode, get_args(Screened))
        left = [name for name in self.numbers if name not in self.suspects]
        if self.suspects and (mode == "refuse" or not left):
            raise DoesNotFit(f"screen: {'; '.join(self.told)}")
        return left

    def plain(self) -> dict[str, Any]:
        """As plain values, for reports."""
        return {"numbers": {name: dict(one) for name, one in self.numbers.items()}, "suspects": dict(self.suspects)}


def screen(findings: Findings, base_squares: Mapping[str, float], inputs: Inputs) -> Screening:
    """Every check on every expert.

    Args:
        findings: with the Gram matrices of all tensors.
        base_squares: tensor name → ‖θ₀‖².
        inputs: for the classifiers, which take no part in Gram matrices where they are averaged.
    """
    return judge(findings.experts, _known(findings, base_squares, inputs))


def judge(names: Sequence[str], known: _Known) -> Screening:
    """The same of what is known of task vectors."""
    left = list(range(len(names)))
    numbers: dict[str, dict[str, float | None]] = {name: dict.fromkeys(one.number for one in CHECKS) for name in names}
    suspects: dict[str, str] = {}
    for check in CHECKS:
        while True:
            beyond = {}
            for one in left:
                value = check.of(known, one, [other for other in left if other != one])
                numbers[names[one]][check.number] = value
                if value is not None and check.sign * (value - check.limit) > 0:
                    beyond[one] = check.sign * value
            if not beyond:
                break
            worst = max(beyond, key=lambda one: (beyond[one], one))
            suspects[names[worst]] = check.sentence.format(numbers[names[worst]][check.number])
            left.remove(worst)
    return Screening(numbers, {name: suspects[name] for name in names if name in suspects})


def _known(findings: Findings, base_squares: Mapping[str, float], inputs: Inputs) -> _Known:
    heads = classifier(inputs.base.specs)
    names = sorted(one.name for one in findings.plan.of("matrix") if one.name not in heads)
    count = len(findings.experts)
    gram = ordered_sum([findings.grams[name] for name in names], count)
    cosines = _cosines(gram)
    changes = _classifiers(inputs, heads)
    agreement = cosines if changes is None else _cosines(changes @ changes.T)
    base = math.sqrt(sum(base_squares[name] for name in names))
    return _Known(gram.diag().clamp_min(0).sqrt().tolist(), base, cosines.tolist(), agreement.tolist())


def _classifiers(inputs: Inputs, heads: Sequence[str]) -> Tensor | None:
    """(N, numbers) float64 changes of the classifier's weights, without each row's mean; None where they differ.

    A row's mean is what every specialist does alike to a head that began off balance, whatever its labels: features
    after a rectification are all positive.
    """
    names = [name for name in heads if len(inputs.base.specs[name].shape) > 1]
    shapes = [
        {source.specs[name].shape if name in source.specs else None for source in inputs.sources} for name in names
    ]
    if not names or any(len(one) > 1 for one in shapes):
        return None

    def rows(source: TensorSource) -> Tensor:
        weights = [source.read(name).double().cpu().flatten(1) for name in names]
        return torch.cat([(one - one.mean(dim=1, keepdim=True)).reshape(-1) for one in weights])

    base = rows(inputs.base)
    return torch.stack([rows(one) - base for one in inputs.experts])


def _cosines(gram: Tensor) -> Tensor:
    """(N, N); 0 with what has no length."""
    norms = gram.diag().clamp_min(0).sqrt()
    outer = torch.outer(norms, norms)
    return torch.where(outer > 0, gram / outer.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
