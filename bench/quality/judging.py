"""Scores of a detector on groups, and the numbers made of them."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from r2m.demo.evaluation import Scores, auc_by_forgery, ensemble, pooled, score
from r2m.demo.samples import Group
from sklearn.metrics import f1_score, precision_recall_curve

from bench.quality import parts
from bench.quality.methods import Candidate, key
from bench.quality.models import Run, StateDict
from bench.quality.networks import load_state
from bench.quality.store import GroupScores, Places, split
from r2m_kernels import MergeConfig

# Pictures at a time: as many as leave what a network makes of them in the cache, which takes a quarter less time.
BATCH = {"scratch": 64, "pretrained": 16}
BINS = 10
DRAWS = 10_000
Numbers = dict[str, float]


class Pictures:
    """The pictures of some groups, each once though groups may share them.

    Attributes:
        places: where the scores of a model keep what.
        digest: of all pictures.
    """

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self._arrays: list[npt.NDArray[np.float32]] = []
        self.places: Places = {}
        starts: dict[int, tuple[int, int]] = {}
        end = 0
        for name, group in groups.items():
            self.places[name] = {}
            for kind, pictures in {"real": group.real, **group.forged}.items():
                if id(pictures) not in starts:
                    self._arrays.append(pictures)
                    starts[id(pictures)] = (end, end := end + len(pictures))
                self.places[name][kind] = starts[id(pictures)]
        self.digest = digest(self._arrays)

    def scores(self, run: Run, states: Sequence[StateDict]) -> Scores:
        """Mean logit difference of some detectors, one each for most rows, on every picture."""
        detectors = [load_state(run.architecture, state, folded=True) for state in states]
        batch = BATCH[run.regime]
        every = [np.concatenate([score(one, array, batch=batch) for array in self._arrays]) for one in detectors]
        return np.mean(every, axis=0)

    def split(self, scores: Scores) -> GroupScores:
        """Group by group."""
        return split(scores, self.places)


def made_of(*parts: str) -> str:
    """One hash of several."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def identity(candidate: Candidate) -> str:
    """What a candidate is: its key, and of a function the source."""
    if isinstance(candidate, MergeConfig):
        return key(candidate)
    function = candidate.func if isinstance(candidate, functools.partial) else candidate
    return key(candidate) + inspect.getsource(inspect.getmodule(function) or parts) + inspect.getsource(parts)


def digest(arrays: Sequence[npt.NDArray[np.generic]]) -> str:
    """Of arrays' shapes and bytes."""
    known = hashlib.sha256()
    for array in arrays:
        known.update(str((array.shape, array.dtype)).encode())
        known.update(np.ascontiguousarray(array).view(np.uint8))
    return known.hexdigest()[:16]


def digest_of_states(states: Sequence[StateDict]) -> str:
    """Of all parameters of some detectors."""
    tensors = [state[name] for state in states for name in state]
    return digest([tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors])


def mean_of(members: Sequence[GroupScores]) -> GroupScores:
    """The ensemble: mean logit of several detectors."""
    return {name: ensemble([member[name] for member in members]) for name in members[0]}


def by_forgery(scores: GroupScores) -> dict[str, Numbers]:
    """AUC of each forgery in each group."""
    return {name: auc_by_forgery(group) for name, group in scores.items()}


def calibration(group: Mapping[str, Scores]) -> Numbers:
    """How far probabilities can be believed: ``ece``, ``f1`` at one half, and ``best_f1`` at the best threshold.

    Every forgery, and real pictures, weigh as if there were as many of each class: a detector is not to blame for
    the benchmark's shares.
    """
    labels, logits = pooled(group)
    weights = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / len(group["real"]))
    precision, recall, _ = precision_recall_curve(labels, logits, sample_weight=weights)
    sums = np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return {
        "ece": calibration_error(labels, logits, weights),
        "f1": float(f1_score(labels, logits > 0, sample_weight=weights, zero_division=0.0)),
        "best_f1": float((2 * precision * recall / sums).max()),
    }


def calibration_error(labels: Scores, logits: Scores, weights: Scores) -> float:
    """Expected calibration error of the forgery's probability, ten bins of equal width."""
    probability = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(place, weights * (probability - labels))).sum())


@functools.cache
def _picks(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(count, size=(DRAWS, count))


def paired(differences: Mapping[int, Sequence[float]], seed: int = 0) -> Numbers:
    """Mean of paired differences over runs, with a 95 % bootstrap interval (percentiles) and the number of wins.

    Runs of one seed share people and pictures, so whole seeds are drawn.

    Args:
        differences: seed of the runs → their differences, as many for each seed.
        seed: of the bootstrap.
    """
    table: npt.NDArray[np.float64] = np.array(list(differences.values()), dtype=np.float64)
    means = table.mean(axis=1)
    low, high = np.percentile(means[_picks(len(means), seed)].mean(axis=1), [2.5, 97.5])
    return {
        "mean": float(table.mean()),
        "low": float(low),
        "high": float(high),
        "wins": int((table > 0).sum()),
        "runs": table.size,
    }
