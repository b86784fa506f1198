"""Scores and AUC: how well a detector ranks forged pictures above real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from r2m.demo.networks import Detector
from r2m.demo.resampling import Picture
from r2m.demo.samples import Group
from r2m_kernels.errors import BadOption

Scores = npt.NDArray[np.float64]
"""(n,): logit of fake minus logit of real. It ranks as the probability does, and does not saturate at 1."""


def score(detector: Detector, pictures: Picture, *, batch: int = 64) -> Scores:
    """Score pictures; (n, 48, 48) float32 in [0, 1] to (n,) float64, larger is more likely forged.

    Means of these scores over detectors are differences of mean logits, which is what an ensemble is.
    """
    detector.eval()
    scores = []
    with torch.inference_mode():
        for start in range(0, len(pictures), batch):
            logits = detector(torch.from_numpy(pictures[start : start + batch]))
            scores.append((logits[:, 1] - logits[:, 0]).double().numpy())
    return np.concatenate(scores)


def auc(real: Scores, forged: Scores) -> float:
    """Area under the ROC curve of forged against real scores.

    A value below 0.5 stays as it is: a detector that ranks the wrong way round is worse than chance, and
    turning it would need labels that a user does not have. Where one of the two is empty, it is a BadOption.
    """
    from sklearn.metrics import roc_auc_score

    if len(real) == 0 or len(forged) == 0:
        raise BadOption(f"AUC needs real and forged scores, got {len(real)} and {len(forged)}")
    return float(roc_auc_score(*pooled({"real": real, "forged": forged})))


def pooled(group: Mapping[str, Scores]) -> tuple[Scores, Scores]:
    """Labels, 0 for real pictures and 1 for forgeries, and scores of a group.

    Each forgery has as many pictures as the others, so the AUC of the two is the group's mean AUC.
    """
    labels = [np.full(len(scores), float(name != "real")) for name, scores in group.items()]
    return np.concatenate(labels), np.concatenate(list(group.values()))


def score_group(detector: Detector, group: Group) -> dict[str, Scores]:
    """Scores of all pictures of a group: ``real`` and each forgery's name."""
    return {kind: score(detector, pictures) for kind, pictures in {"real": group.real, **group.forged}.items()}


def ensemble(members: Sequence[Mapping[str, Scores]]) -> dict[str, Scores]:
    """Mean logit of several detectors on one group, picture by picture."""
    return {name: np.mean([member[name] for member in members], axis=0) for name in members[0]}


def auc_by_forgery(scores: Mapping[str, Scores]) -> dict[str, float]:
    """AUC of each forgery of a group against the group's real pictures."""
    return {name: auc(scores["real"], forged) for name, forged in scores.items() if name != "real"}


def group_auc(scores: Mapping[str, Scores]) -> float:
    """AUC of a group: the mean over its forgeries, so that each counts the same."""
    return float(np.mean(list(auc_by_forgery(scores).values())))
