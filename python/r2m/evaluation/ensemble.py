"""A model with each of its adapters in turn, from one in memory: their mean logit, and whose a forgery looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from r2m import labels
from r2m.arrangement import plain, renamed
from r2m.checkpoints.adapters import onto
from r2m.checkpoints.formats import ADAPTERS
from r2m.checkpoints.layout import some
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.saved_names import family_of, in_models
from r2m.checkpoints.view import View
from r2m.evaluation.data import Frame
from r2m.evaluation.detectors import load_detector
from r2m.evaluation.run import Evaluated
from r2m.places import MOST_RECORD, read_beside, read_small
from r2m.recipe import ENSEMBLE, Arrangement
from r2m.records import REPORT
from r2m_kernels.errors import BadFile, DoesNotFit, quoted

# Beyond it a probability is 0 or 1 in float64, and its logit no number.
_LEAST = 1e-15


@dataclass(frozen=True)
class Ensemble:
    """A detector and its adapters.

    Attributes:
        model: in evaluation mode, with the weights of whoever was asked for last.
        members: adapter → the tensors of the model with it.
        paths: adapter → its directory.
        changed: tensors that any of them changes → what the model calls them.
    """

    model: nn.Module
    members: Mapping[str, View]
    paths: Mapping[str, str]
    changed: Mapping[str, str]

    def with_adapter(self, member: str) -> nn.Module:
        """The detector with one adapter."""
        view = self.members[member]
        self.model.load_state_dict({own: view.read(name) for name, own in self.changed.items()}, strict=False)
        return self.model


def load_ensemble(kind: str, out: str, label: str, arrangement: Arrangement) -> Ensemble:
    """What a merge with ``--format adapters`` wrote, as a detector; arguments and errors are :func:`load_detector`'s.

    Raises:
        BadFile: there are no adapters.
        DoesNotFit: they change what the detector has not.
    """
    place = Path(out) / ADAPTERS.beside
    names = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    if not names:
        raise BadFile(f"{label}: expected what a merge with --format {ADAPTERS.name} wrote, got no {ADAPTERS.beside}/")
    about = read_beside(Path(out) / REPORT.file, MOST_RECORD).get("adapters")
    if isinstance(about, dict) and about.get("kind") != ENSEMBLE:
        raise BadFile(f"{label}: its adapters are parts of one merge, and none is a detector; expected an {ENSEMBLE}")
    base = plain(open_checkpoint(out, label, arrangement.key), arrangement)
    members = {}
    for name in names:
        adapter = open_checkpoint(place / name, f"{label}: adapter {quoted(name)}", adapters=True)
        members[name] = onto(base, renamed(adapter, arrangement))
    pairs = ((name, one) for view in members.values() for name, one in view.tensors.items())
    parts = sorted({name for name, one in pairs if base.tensors.get(name) is not one})
    model = load_detector(kind, out, label, arrangement)
    known, config = model.state_dict().keys(), Path(out) / labels.FILE
    family = family_of(read_small(config, label)) if config.is_file() else None
    changed = {name: in_models(name, family) if family and name not in known else name for name in parts}
    strange = [name for name, own in changed.items() if own not in known]
    if strange:
        raise DoesNotFit(f"{label}: its adapters change what the detector {quoted(kind)} has not: {some(strange)}")
    return Ensemble(model, members, {name: str(place / name) for name in names}, changed)


def combined(members: Mapping[str, Evaluated]) -> Evaluated:
    """The scores of all together: of each frame the mean logit, as a probability."""
    first = next(iter(members.values()))
    rows: dict[str, list[tuple[Frame, float]]] = {}
    for dataset, scored in first.rows.items():
        means = together(_logits(members, dataset)).tolist()
        rows[dataset] = [(frame, mean) for (frame, _), mean in zip(scored, means, strict=True)]
    return Evaluated(rows, dict(first.unreadable))


def attribution(
    members: Mapping[str, Evaluated], all_of_them: Evaluated, threshold: float
) -> dict[str, dict[str, float]]:
    """Dataset → adapter → for which share of the frames that all together call fake its logit is the largest.

    Fake is what is above the threshold. Datasets without such frames are not there.
    """
    shares = {}
    for dataset, scored in all_of_them.rows.items():
        fake = np.array([probability > threshold for _, probability in scored])
        looks_like = Counter(_logits(members, dataset)[:, fake].argmax(axis=0).tolist())
        if fake.any():
            shares[dataset] = {name: looks_like[place] / int(fake.sum()) for place, name in enumerate(members)}
    return shares


def log_odds(probabilities: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """(adapters, frames) logits, from probabilities of fake."""
    values = np.clip(np.array(probabilities, np.float64), _LEAST, 1 - _LEAST)
    return np.log(values) - np.log1p(-values)


def together(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """(frames,) probabilities of all adapters together: of their mean logit."""
    probabilities: NDArray[np.float64] = 1 / (1 + np.exp(-logits.mean(axis=0)))
    return probabilities


def _logits(members: Mapping[str, Evaluated], dataset: str) -> NDArray[np.float64]:
    return log_odds([[probability for _, probability in one.rows[dataset]] for one in members.values()])
