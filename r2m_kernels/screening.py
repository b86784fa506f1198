"""Which experts do not look like the specialists that others are, by how their task vectors lie (README §7).

Bad ones that these numbers cannot show there are, too: docs/screening.md has the rate of each kind.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from . import checks
from ._stream.budget import Inputs
from ._stream.tensors import TensorSource, TensorSpec
from .errors import DoesNotFit, quoted
from .fields import Screened
from .findings import Findings
from .gram import ordered_sum
from .heads import classifier

_ENERGY = 0.99
_PART = 0.2  # of the others' agreement with each other, between healthy ones and exchanged labels
_FEW = 1 / 8  # of a matrix's directions: an adapter's, which are those of its random factors
_NUMBER = re.compile(r"\d+")


class _Known(NamedTuple):
    """What is known of task vectors τ_i over matrices.

    Attributes:
        norms: (N,) ‖τ_i‖, float64.
        base: ‖θ₀‖.
        cosines: (N, N).
        features: (N, N) cosines of the directions in which what the classifier reads changed, NaN where an expert left
            it as it was, or changed few; none where that is not known.
        agreement: (N, N) cosines of the classifier's changes; where there is none, ``cosines``.
    """

    norms: list[float]
    base: float
    cosines: list[list[float]]
    features: list[list[float]] | None
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


def _features(known: _Known, one: int, others: Sequence[int]) -> float | None:
    if known.features is None:
        return None
    own = _mean([known.features[one][other] for other in others])
    theirs = _mean([known.features[first][second] for first, second in itertools.combinations(others, 2)])
    return None if own is None or theirs is None else own - _PART * theirs


def _mean(values: Sequence[float]) -> float | None:
    """Of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else None


def _agreement(known: _Known, one: int, others: Sequence[int]) -> float | None:
    # Of two that point apart neither is the wrong one.
    return statistics.fmean(known.agreement[one][other] for other in others) if len(others) > 1 else None


def _where_features_are_not_known(known: _Known, one: int, others: Sequence[int]) -> float | None:
    return _agreement(known, one, others) if _features(known, one, others) is None else None


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


FEATURES = Check(
    "features",
    "mean cosine of the directions in which its features changed with the others', less a fifth of theirs",
    _features,
    -1,
    0.0,
    "its features changed in other directions than the others' (mean cosine {:.3f}, less a fifth of theirs with each "
    "other): were real and fake exchanged in its labels, or did its classifier begin as another?",
)
AGREEMENT = Check(
    "agreement",
    "mean cosine of its classifier's change with the others'",
    _agreement,
    -1,
    0.0,
    "its classifier moved against the others' (mean cosine {:.2f}): were real and fake exchanged in its labels?",
)
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
    FEATURES,
    AGREEMENT._replace(of=_where_features_are_not_known),
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


def judge(names: Sequence[str], known: _Known, checks: Sequence[Check] = CHECKS) -> Screening:
    """The same of what is known of task vectors."""
    left = list(range(len(names)))
    numbers: dict[str, dict[str, float | None]] = {name: dict.fromkeys(one.number for one in checks) for name in names}
    suspects: dict[str, str] = {}
    for check in checks:
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
    gram = ordered_sum([findings.grams[name] for name in names], count, count)
    cosines = _cosines(gram)
    changes = _classifiers(inputs, heads)
    agreement = cosines if changes is None else _cosines(changes @ changes.T)
    base = math.sqrt(sum(base_squares[name] for name in names))
    written = _written(names, [inputs.base.specs[name] for name in heads], inputs.base.specs)
    features = _directions_alike(inputs, written).tolist() if written else None
    return _Known(gram.diag().clamp_min(0).sqrt().tolist(), base, cosines.tolist(), features, agreement.tolist())


def _written(names: Sequence[str], heads: Sequence[TensorSpec], specs: Mapping[str, TensorSpec]) -> list[str]:
    """Matrices that write what the classifier reads: they have as many rows as it has columns.

    Of layers whose names differ by numbers alone the last, as numbers count.
    """
    columns = {head.shape[1] for head in heads if len(head.shape) > 1}
    last: dict[str, tuple[list[int], str]] = {}
    for name in names:
        if specs[name].shape[0] in columns:
            place = [int(number) for number in _NUMBER.findall(name)]
            pattern = _NUMBER.sub("*", name)
            last[pattern] = max(last.get(pattern, (place, name)), (place, name))
    return [name for _, name in last.values()]


def _directions_alike(inputs: Inputs, names: Sequence[str]) -> Tensor:
    """(N, N) cosines of :func:`_directions`, a mean over tensors by their size; NaN where none has any in both."""
    count = len(inputs.experts)
    total, size = torch.zeros(count, count), torch.zeros(count, count)
    for name in names:
        base = _matrix(inputs.base, name)
        every = torch.stack([_directions(_matrix(expert, name) - base).flatten() for expert in inputs.experts])
        there = every.any(dim=1).float()
        total += base.numel() * (every @ every.T)
        size += base.numel() * torch.outer(there, there)
    return total / size


def _directions(change: Tensor) -> Tensor:
    """U Vᵀ / √r, (m, n) float32, of a change U diag(σ) Vᵀ of rank r: of length one, or zero where r is small.

    Without each row's mean, as of the classifier (:func:`_classifiers`). Every direction counts alike: few strong ones
    are what a family's forgeries look like, which may be the opposite of another family's, and not what is real. Those
    that hold :data:`_ENERGY` of the change: weight decay and rounding are in the rest.
    """
    rows = change - change.mean(dim=1, keepdim=True)
    low = rows if rows.shape[0] <= rows.shape[1] else rows.mT
    values, vectors = (one.flip(-1) for one in torch.linalg.eigh(low @ low.mT))
    values = values.clamp_min(0)
    rank = int((values.cumsum(0) < _ENERGY * values.sum()).sum()) + 1
    if not values[0] > 0 or rank < _FEW * len(values):
        return torch.zeros(change.shape)
    left = vectors[:, :rank]
    made: Tensor = (left / (rank * values[:rank]).sqrt()) @ (left.mT @ low)
    return (made if low is rows else made.mT).float()


def _matrix(source: TensorSource, name: str) -> Tensor:
    """(m, n) float64 on the CPU."""
    return source.read(name).double().cpu().flatten(1)


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
        weights = [_matrix(source, name) for name in names]
        return torch.cat([(one - one.mean(dim=1, keepdim=True)).reshape(-1) for one in weights])

    base = rows(inputs.base)
    return torch.stack([rows(one) - base for one in inputs.experts])


def _cosines(gram: Tensor) -> Tensor:
    """(N, N); 0 with what has no length."""
    norms = gram.diag().clamp_min(0).sqrt()
    outer = torch.outer(norms, norms)
    return torch.where(outer > 0, gram / outer.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
