"""Metrics of detectors by scikit-learn's definitions, over frames and over videos: each is one entry of METRICS.

Labels: 1 fake, 0 real. Scores: probabilities of fake. What a set of one class leaves undefined is None, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    matthews_corrcoef,
    roc_auc_score,
    roc_curve,
)

THRESHOLD = 0.5
BINS = 10  # of a reliability plot and of the calibration error
VIDEO = "video_"  # how the same metric over videos is called
Numbers = NDArray[np.float64]
Labels = NDArray[np.int64]
Names = NDArray[np.str_]


@dataclass(frozen=True)
class Scores:
    """What a detector said of a dataset's frames.

    Attributes:
        labels: (n,) 0 or 1.
        probabilities: (n,) of fake.
        videos: (n,) which video each frame is from.
        paths: (n,) strings: where each frame is, by which videos of several datasets are known to be the same; None:
            that is not known.
    """

    labels: Labels
    probabilities: Numbers
    videos: Names
    paths: NDArray[np.object_] | None = None

    def by_video(self) -> Scores:
        """One frame per video, in the order of their names: the mean probability; the label that all its frames have.

        Its path is that of its first frame. A video with frames of both labels counts as real, as it does in
        DeepfakeBench: its own keys make such videos.
        """
        names, first, index = np.unique(self.videos, return_index=True, return_inverse=True)
        count = np.bincount(index, minlength=len(names))
        mean = np.bincount(index, self.probabilities, minlength=len(names)) / count
        label = np.floor(np.bincount(index, self.labels, minlength=len(names)) / count).astype(np.int64)
        return Scores(label, mean, names, None if self.paths is None else self.paths[first])

    def fake(self, threshold: float) -> NDArray[np.bool_]:
        """(n,) which frames are called fake: those above the threshold."""
        return self.probabilities > threshold


@dataclass(frozen=True)
class Metric:
    """A number that says how well a detector does.

    Attributes:
        heading: of its column.
        better: 1 where more is better, -1 where less is.
        meaning: what it is, for documentation.
        value: of scores at a threshold; None where it is undefined.
        classes: whether it needs real and fake ones.
    """

    heading: str
    better: int
    meaning: str
    value: Callable[[Scores, float], float | None]
    classes: bool = True

    def of(self, scores: Scores, threshold: float = THRESHOLD) -> float | None:
        """Its value, None where the classes it needs are not there."""
        if self.classes and len(np.unique(scores.labels)) < 2:
            return None
        return self.value(scores, threshold)

    def worst(self, values: Mapping[str, float]) -> str:
        """By which of the names the worst value stands."""
        return min(values, key=lambda name: self.better * values[name])


def _share_right(labels: tuple[int, ...]) -> Callable[[Scores, float], float | None]:
    def value(scores: Scores, threshold: float) -> float | None:
        chosen = np.isin(scores.labels, labels)
        right = scores.fake(threshold) == (scores.labels == 1)
        return float(right[chosen].mean()) if chosen.any() else None

    return value


def _eer(scores: Scores, _: float) -> float:
    fpr, tpr, _thresholds = roc_curve(scores.labels, scores.probabilities)
    return float(fpr[np.argmin(np.abs(1 - tpr - fpr))])


def _tpr_at_fpr(most: float) -> Callable[[Scores, float], float]:
    def value(scores: Scores, _: float) -> float:
        fpr, tpr, _thresholds = roc_curve(scores.labels, scores.probabilities, drop_intermediate=False)
        return float(tpr[fpr <= most].max())

    return value


def _calibration_error(scores: Scores, _: float) -> float:
    bins = reliability(scores)
    return sum(one["count"] * abs(one["probability"] - one["fakes"]) for one in bins) / len(scores.labels)


METRICS = {
    "acc": Metric("acc", 1, "accuracy at the threshold", _share_right((0, 1)), classes=False),
    "acc_real": Metric("acc real", 1, "accuracy of reals", _share_right((0,)), classes=False),
    "acc_fake": Metric("acc fake", 1, "accuracy of fakes", _share_right((1,)), classes=False),
    "balanced_acc": Metric(
        "bal acc",
        1,
        "mean of the two accuracies",
        lambda scores, threshold: float(balanced_accuracy_score(scores.labels, scores.fake(threshold))),
    ),
    "f1": Metric(
        "F1",
        1,
        "of fakes, at the threshold",
        lambda scores, threshold: float(f1_score(scores.labels, scores.fake(threshold))),
    ),
    "mcc": Metric(
        "MCC",
        1,
        "Matthews correlation of labels and decisions; 0 where all decisions are the same",
        lambda scores, threshold: float(matthews_corrcoef(scores.labels, scores.fake(threshold))),
    ),
    "auc": Metric(
        "AUC",
        1,
        "how often a fake has more than a real, half where they tie",
        lambda scores, _: float(roc_auc_score(scores.labels, scores.probabilities)),
    ),
    "eer": Metric("EER", -1, "false-positive rate where it is nearest to the false-negative one", _eer),
    "ap": Metric(
        "AP",
        1,
        "average precision",
        lambda scores, _: float(average_precision_score(scores.labels, scores.probabilities)),
    ),
    "tpr_at_fpr_1": Metric(
        "TPR@1%", 1, "most fakes found while at most 1 % of the reals are called fake", _tpr_at_fpr(0.01)
    ),
    "tpr_at_fpr_5": Metric("TPR@5%", 1, "the same at 5 %", _tpr_at_fpr(0.05)),
    "ece": Metric(
        "ECE",
        -1,
        f"expected calibration error of the probability of fake, {BINS} bins of equal width",
        _calibration_error,
        classes=False,
    ),
    "brier": Metric(
        "Brier",
        -1,
        "mean squared distance of probability and label",
        lambda scores, _: float(brier_score_loss(scores.labels, scores.probabilities, pos_label=1)),
        classes=False,
    ),
}
KEYS = (*METRICS, *(f"{VIDEO}{name}" for name in METRICS))  # in files


def metric(key: str) -> Metric:
    """By its key, of frames or of videos."""
    return METRICS[key.removeprefix(VIDEO)]


def metrics(scores: Scores, threshold: float = THRESHOLD) -> dict[str, float | None]:
    """All of METRICS; of frames or of videos."""
    return {name: one.of(scores, threshold) for name, one in METRICS.items()}


def reliability(scores: Scores) -> list[dict[str, float]]:
    """How probabilities and what came of them agree, in bins of equal width that hold any frames.

    Each has ``from`` and ``to`` (a bin begins above ``from``, the first with it), ``count``, the mean ``probability``
    and the share of ``fakes``.
    """
    place = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], scores.probabilities)
    count, sums, fakes = (
        np.bincount(place, weights, minlength=BINS) for weights in (None, scores.probabilities, scores.labels)
    )
    return [
        {
            "from": index / BINS,
            "to": (index + 1) / BINS,
            "count": int(count[index]),
            "probability": float(sums[index] / count[index]),
            "fakes": float(fakes[index] / count[index]),
        }
        for index in np.flatnonzero(count).tolist()
    ]


def judge(scores: Scores, threshold: float = THRESHOLD) -> dict[str, Any]:
    """Everything about one dataset but its intervals."""
    videos = scores.by_video()
    counts = {
        "frames": len(scores.labels),
        "videos": len(videos.labels),
        "real videos": int((videos.labels == 0).sum()),
        "fake videos": int((videos.labels == 1).sum()),
    }
    over_videos = {f"{VIDEO}{name}": value for name, value in metrics(videos, threshold).items()}
    return {
        **counts,
        "threshold": threshold,
        **metrics(scores, threshold),
        **over_videos,
        "reliability": reliability(scores),
    }


def average(judged: Mapping[str, Mapping[str, Any]], keys: Iterable[str] = KEYS) -> dict[str, float | None]:
    """The mean of each metric over the datasets that define it."""
    defined = {key: list(_defined(judged, key).values()) for key in keys}
    return {key: float(np.mean(values)) if values else None for key, values in defined.items()}


def worst(judged: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Of each metric, on which dataset it is worst, and how bad."""
    found: dict[str, dict[str, Any] | None] = {}
    for key in KEYS:
        values = _defined(judged, key)
        name = metric(key).worst(values) if values else ""
        found[key] = {"dataset": name, "value": values[name]} if values else None
    return found


def _defined(judged: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float]:
    return {name: one[key] for name, one in judged.items() if one[key] is not None}
