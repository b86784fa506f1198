"""From scores to what an evaluation says: metrics by dataset, means, the worst, intervals, differences, doubts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from r2m.evaluation.comparison import Role, baselines, differences
from r2m.evaluation.metrics import THRESHOLD, Numbers, Scores, average, judge, worst
from r2m.evaluation.request import Request
from r2m.evaluation.resampling import RESAMPLED, Resampled
from r2m_kernels.errors import BadOption, quoted

_SWAPPED = 0.25  # an AUC whose interval ends below it is that of a detector the other way round
_FEW = 5  # videos of a class, below which chance alone gives such an AUC


def _last_within(most: float) -> Callable[[Numbers, Numbers], int]:
    return lambda fpr, _: int(np.flatnonzero(fpr <= most)[-1])


# Where on a ROC curve (false- and true-positive rates, from where nothing is called fake) each puts the threshold.
CRITERIA: Mapping[str, Callable[[Numbers, Numbers], int]] = {
    "balanced_acc": lambda fpr, tpr: int(np.argmax(tpr - fpr)),
    "eer": lambda fpr, tpr: int(np.argmin(np.abs(1 - tpr - fpr))),
    "fpr_1": _last_within(0.01),
    "fpr_5": _last_within(0.05),
}


def judge_all(
    scores: Mapping[str, Mapping[str, Scores]], request: Request, roles: Mapping[str, Role] | None = None
) -> dict[str, Any]:
    """Everything that scores say of models.

    Args:
        scores: model → dataset → scores.
        request: thresholds, resamples, and with whom models are compared.
        roles: of the models, where they are known.

    Returns:
        ``models``: model → ``datasets``, ``average``, ``average_intervals``, ``worst``; ``differences``; ``warnings``.

    Raises:
        BadOption: a model or a dataset that an option names is not there, or has not both classes.
    """
    pairs = baselines(roles or {}, request.against, list(scores))
    calibration = request.threshold_from
    thresholds = {name: _threshold(name, one, request) for name, one in scores.items()}
    resampled = Resampled(scores, request.bootstrap, request.seed)
    models = {}
    for model, one in scores.items():
        datasets = {
            name: judge(of, thresholds[model])
            | {"intervals": {key: resampled.interval(model, name, key) for key in RESAMPLED}}
            for name, of in one.items()
        }
        tested = {name: judged for name, judged in datasets.items() if name != calibration}
        models[model] = {
            "datasets": datasets,
            "average": average(tested),
            "average_intervals": {
                key: resampled.mean_interval(model, [name for name in tested if tested[name][key] is not None], key)
                for key in RESAMPLED
            },
            "worst": worst(tested),
        }
    compared = differences(resampled, models, pairs, () if calibration is None else (calibration,))
    return {
        "models": models,
        "differences": compared.rows,
        "warnings": [*_swapped(models), *compared.unpaired, *_seen(scores, calibration)],
    }


def check_names(request: Request, models: Sequence[str], datasets: Collection[str]) -> None:
    """Refuse options that name what is not there, before the work.

    Raises:
        BadOption: no such model, or no such dataset.
    """
    baselines({}, request.against, models)
    if request.threshold_from is not None and request.threshold_from not in datasets:
        raise BadOption(
            f"--threshold-from {request.threshold_from}: expected the name of a dataset, one of "
            f"{', '.join(map(quoted, sorted(datasets)))}"
        )


def chosen_threshold(scores: Scores, by: str) -> float:
    """Between two of the scores, where a criterion is best or, of false positives, just met.

    Args:
        scores: of a set with both classes.
        by: one of :data:`CRITERIA`.
    """
    fpr, tpr, above = roc_curve(scores.labels, scores.probabilities, drop_intermediate=False)
    place = CRITERIA[by](fpr, tpr)
    # Called fake is what lies above the threshold: one between the last score that is to be and the next below it.
    if place == 0:
        return (float(scores.probabilities.max()) + 1) / 2
    last = float(above[place])
    lower = float(scores.probabilities[scores.probabilities < last].max(initial=0.0))
    middle = (lower + last) / 2
    return middle if middle < last else lower


def _threshold(model: str, scores: Mapping[str, Scores], request: Request) -> float:
    name = request.threshold_from
    if name is None:
        return THRESHOLD if request.threshold is None else request.threshold
    if name not in scores:
        listed = ", ".join(map(quoted, scores))
        raise BadOption(f"--threshold-from {name}: model {quoted(model)} has no scores on it; expected one of {listed}")
    if len(np.unique(scores[name].labels)) < 2:
        raise BadOption(f"--threshold-from {name}: expected real and fake pictures, got one of the two alone")
    return chosen_threshold(scores[name], request.threshold_by)


def _swapped(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on AUCs that chance does not give: whoever ranks so well the wrong way round knows the right one."""
    doubts = []
    for model, one in models.items():
        for dataset, judged in one["datasets"].items():
            value, interval = judged["auc"], judged["intervals"]["auc"]
            if value is None or min(judged["real videos"], judged["fake videos"]) < _FEW:
                continue
            if (value if interval is None else interval[1]) < _SWAPPED:
                doubts.append(
                    f"{quoted(model)} on {quoted(dataset)}: AUC {value:.3f}: labels swapped? Either those of the data "
                    "(--label) or the order of the detector's outputs"
                )
    return doubts


def _seen(scores: Mapping[str, Mapping[str, Scores]], calibration: str | None) -> list[str]:
    """A sentence where pictures that gave the thresholds are judged by them in other datasets too."""
    shared: set[str] = set()
    for one in scores.values():
        chosen = one[calibration].paths if calibration is not None and calibration in one else None
        known = set() if chosen is None else set(chosen.tolist())
        others = {name: of.paths for name, of in one.items() if name != calibration and of.paths is not None}
        shared |= {name for name, paths in others.items() if not known.isdisjoint(paths.tolist())}
    if not shared:
        return []
    listed = ", ".join(map(quoted, sorted(shared)))
    return [
        f"thresholds were chosen on pictures of {quoted(str(calibration))} that are also in {listed}, whose accuracies "
        "look better for it: choose them on a dataset with reals of its own"
    ]
