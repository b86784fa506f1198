"""Scores of a detector on groups, and the numbers made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from r2m.demo.evaluation import Scores, auc_by_forgery, ensemble, group_auc, pooled, score_group
from r2m.demo.samples import Group

from bench.quality.models import Run, StateDict
from bench.quality.networks import load_state

BINS = 10
GroupScores = dict[str, dict[str, Scores]]
"""Group → ``real`` and each forgery → (n,) logit differences."""


def score(run: Run, state: StateDict, groups: Mapping[str, Group]) -> GroupScores:
    """Scores of every picture of every group."""
    detector = load_state(run.architecture, state)
    return {name: score_group(detector, group) for name, group in groups.items()}


def mean_of(members: Sequence[GroupScores]) -> GroupScores:
    """The ensemble: mean logit of several detectors."""
    return {name: ensemble([member[name] for member in members]) for name in members[0]}


def aucs(scores: GroupScores) -> dict[str, float]:
    """AUC of each group."""
    return {name: group_auc(group) for name, group in scores.items()}


def numbers(scores: GroupScores) -> dict[str, object]:
    """AUC of each group and forgery, the worst forgery, and the calibration error on the first group."""
    by_forgery = {name: auc_by_forgery(group) for name, group in scores.items()}
    every = [(value, f"{kind} ({name})") for name, group in by_forgery.items() for kind, value in group.items()]
    worst, worst_forgery = min(every)
    return {
        "auc": aucs(scores),
        "by_forgery": by_forgery,
        "worst": worst,
        "worst_forgery": worst_forgery,
        "ece": calibration_error(next(iter(scores.values()))),
    }


def calibration_error(group: Mapping[str, Scores], bins: int = BINS) -> float:
    """Expected calibration error of the forgery's probability, ten bins of equal width.

    Every forgery, and real pictures, weigh as if there were as many of each class: a detector is not to blame for
    the benchmark's shares.
    """
    labels, logits = pooled(group)
    weights = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / len(group["real"]))
    probability = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    place = np.minimum((probability * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, weights * (probability - labels))).sum())


def paired(differences: Sequence[float], seed: int = 0, draws: int = 10_000) -> dict[str, float]:
    """Mean of paired differences over runs with a bootstrap interval (percentiles, 95 %) and the number of wins."""
    values: npt.NDArray[np.float64] = np.asarray(differences, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return {
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "wins": int((values > 0).sum()),
        "runs": len(values),
    }
