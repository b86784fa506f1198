"""The logits of every judged model, which is all that tables are made of: a file a run, committed.

A file has one row a model, as float16, and says of each row what it was made of; so a model that was judged is not
judged again, and a row whose rule, detectors or pictures changed is. Groups may share pictures, which are kept once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from r2m.demo.evaluation import Scores

from bench.machine import RESULTS

STORE = RESULTS / "quality"
GroupScores = dict[str, dict[str, Scores]]
"""Group → ``real`` and each forgery → (n,) logit differences."""
Places = dict[str, dict[str, tuple[int, int]]]
"""Group → ``real`` and each forgery → first picture and the one after the last, in the row of a model."""


@dataclass
class Judged:
    """The logits of one run.

    Attributes:
        places: where a row keeps what.
        logits: row → (pictures,) float16: logit of fake minus logit of real.
        made_of: row → hash of detectors and pictures, and of the rule that merged them.
        about: what else a reader may ask: commit, protocol, machine.
    """

    places: Places
    logits: dict[str, npt.NDArray[np.float16]] = field(default_factory=dict)
    made_of: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, row: str, pictures: Scores, made_of: str) -> None:
        """A model's scores of all pictures; those that are no finite float16 are refused."""
        largest = np.abs(pictures).max()
        if not largest < np.finfo(np.float16).max:
            raise ValueError(f"{row}: logits that are no finite float16, the largest {largest:g}")
        self.logits[row], self.made_of[row] = pictures.astype(np.float16), made_of

    def scores(self, row: str) -> GroupScores:
        """What ``row`` says of every picture, float64."""
        return split(self.logits[row].astype(np.float64), self.places)


def split(scores: Scores, places: Places) -> GroupScores:
    """The scores of all pictures, group by group."""
    return {
        group: {kind: scores[start:stop] for kind, (start, stop) in kinds.items()} for group, kinds in places.items()
    }


def logits_of(run: str, directory: Path) -> Path:
    """The file of a run."""
    return directory / "logits" / f"{run}.npz"


def save(judged: Judged, path: Path) -> None:
    """Replace the file as a whole; the same content makes the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"places": judged.places, "made_of": judged.made_of, "rows": list(judged.logits), "about": judged.about}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), logits=np.stack(list(judged.logits.values())))
    os.replace(part, path)


def load(path: Path) -> Judged:
    """What ``save`` wrote."""
    with np.load(path) as file:
        about: Mapping[str, Any] = json.loads(str(file["about"]))
        logits = file["logits"]
    places = {
        group: {kind: (start, stop) for kind, (start, stop) in kinds.items()}
        for group, kinds in about["places"].items()
    }
    return Judged(places, dict(zip(about["rows"], logits, strict=True)), about["made_of"], about["about"])
