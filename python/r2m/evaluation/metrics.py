"""Metrics of detectors by scikit-learn's definitions, over frames and over videos, with bootstrap intervals by video.

Labels: 1 fake, 0 real. Scores: probabilities of fake. What a set of one class leaves undefined is None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

THRESHOLD = 0.5
CONFIDENCE = 0.95
AVERAGED = ("acc", "auc", "eer", "ap", "video_acc", "video_auc", "video_eer", "video_ap")
Numbers = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """What a detector said of a dataset's frames.

    Attributes:
        labels: (n,) 0 or 1.
        probabilities: (n,) of fake.
        videos: (n,) which video each frame is from.
    """

    labels: Labels
    probabilities: Numbers
    videos: NDArray[np.str_]

    def by_video(self) -> Scores:
        """One frame per video, in the order of their names: the mean probability; the label that all its frames have.

        A video with frames of both labels counts as real, as it does in DeepfakeBench: its own keys make such videos.
        """
        names, index = np.unique(self.videos, return_inverse=True)
        count = np.bincount(index, minlength=len(names))
        mean = np.bincount(index, self.probabilities, minlength=len(names)) / count
        label = np.floor(np.bincount(index, self.labels, minlength=len(names)) / count).astype(np.int64)
        return Scores(label, mean, names)


def metrics(scores: Scores) -> dict[str, float | None]:
    """Accuracy at 0.5, also of each class, AUC, EER and AP; of frames or of videos.

    ``eer`` is the false-positive rate where it is nearest to the false-negative one, as in DeepfakeBench.
    """
    labels, probabilities = scores.labels, scores.probabilities
    right = (probabilities > THRESHOLD) == (labels == 1)
    counted = {"acc": labels >= 0, "acc_real": labels == 0, "acc_fake": labels == 1}
    values = {name: float(right[chosen].mean()) if chosen.any() else None for name, chosen in counted.items()}
    if len(np.unique(labels)) < 2:
        return {**values, "auc": None, "eer": None, "ap": None}
    fpr, tpr, _ = roc_curve(labels, probabilities)
    return {
        **values,
        "auc": float(roc_auc_score(labels, probabilities)),
        "eer": float(fpr[np.argmin(np.abs(1 - tpr - fpr))]),
        "ap": float(average_precision_score(labels, probabilities)),
    }


class _Ranked:
    """Scores in order, for the AUC under many weights: scikit-learn's number without sorting again."""

    def __init__(self, scores: Scores) -> None:
        values, self._place = np.unique(scores.probabilities, return_inverse=True)
        self._count, self._fake = len(values), scores.labels == 1

    def auc(self, weights: Numbers) -> float | None:
        """How often a fake is above a real, half where they tie; None without one of the two."""
        fake = np.bincount(self._place[self._fake], weights[self._fake], self._count)
        real = np.bincount(self._place[~self._fake], weights[~self._fake], self._count)
        pairs = fake.sum() * real.sum()
        below = np.cumsum(real) - real
        return float((fake * (below + real / 2)).sum() / pairs) if pairs > 0 else None


def auc_interval(scores: Scores, resamples: int, seed: int) -> dict[str, list[float] | None]:
    """Percentile intervals of the AUC over frames and over videos, resampling whole videos.

    Frames of one video are alike: an interval that resampled frames would be too narrow. Resamples of one class are
    left out; None where there are no others.
    """
    names, index = np.unique(scores.videos, return_inverse=True)
    dice = np.random.default_rng(seed)
    frames, videos = _Ranked(scores), _Ranked(scores.by_video())
    resampled: dict[str, list[float]] = {"auc": [], "video_auc": []}
    for _ in range(resamples):
        counts = np.bincount(dice.integers(0, len(names), len(names)), minlength=len(names)).astype(np.float64)
        for key, of, weights in (("auc", frames, counts[index]), ("video_auc", videos, counts)):
            value = of.auc(weights)
            if value is not None:
                resampled[key].append(value)
    tails = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]
    return {key: np.percentile(values, tails).tolist() if values else None for key, values in resampled.items()}


def judge(scores: Scores, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Everything about one dataset."""
    videos = scores.by_video()
    counts = {
        "frames": len(scores.labels),
        "videos": len(videos.labels),
        "real videos": int((videos.labels == 0).sum()),
        "fake videos": int((videos.labels == 1).sum()),
    }
    over_videos = {f"video_{name}": value for name, value in metrics(videos).items()}
    return {**counts, **metrics(scores), **over_videos, "intervals": auc_interval(scores, resamples, seed)}


def judge_all(scores: Mapping[str, Scores], *, resamples: int, seed: int) -> dict[str, Any]:
    """Everything by dataset, and the mean of each metric over the datasets that define it."""
    datasets = {name: judge(of, resamples=resamples, seed=seed) for name, of in scores.items()}
    return {"datasets": datasets, "average": average(datasets, AVERAGED)}


def average(judged: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """The mean of each metric over the datasets that define it."""
    defined = {name: [one[name] for one in judged.values() if one[name] is not None] for name in names}
    return {name: float(np.mean(values)) if values else None for name, values in defined.items()}
