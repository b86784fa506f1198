"""Frames and the datasets that they make, and CSV files of finished scores."""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from r2m.evaluation.metrics import Scores
from r2m_kernels.errors import BadFile, printable, quoted

COLUMNS = ("path", "label", "probability")  # of CSV files; video and dataset may be there
REAL, FAKE = 0, 1
CLASSES = {"real": REAL, "fake": FAKE}
_SHOWN = 6  # names in a line


@dataclass(frozen=True)
class Frame:
    """An image.

    Attributes:
        path: where it is.
        label: 1 fake, 0 real.
        video: what tells its video from all others of the dataset.
    """

    path: Path
    label: int
    video: str


@dataclass(frozen=True)
class Dataset:
    """What is judged as one: a generator's fakes, for instance, beside its reals or those that all generators share.

    Attributes:
        frames: the reals first. Those that are shared are in several datasets, with the same path and video.
        labels: ``real`` and ``fake``: names (folders, or labels of a list) that were taken as such.
    """

    frames: Sequence[Frame]
    labels: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class LeftOut:
    """Images of the data that are in no dataset.

    Attributes:
        data: what was given.
        what: the folder, label or kind of file in it.
        images: how many.
        why: in a few words.
    """

    data: str
    what: str
    images: int
    why: str


@dataclass(frozen=True)
class Data:
    """All that detectors are judged on.

    Attributes:
        datasets: by name, in order.
        left_out: what is in none of them.
        notes: what was understood in a way that somebody may not have meant, a sentence each.
    """

    datasets: dict[str, Dataset] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """``labels`` and ``left_out`` of ``evaluation.json``."""
        return {
            "labels": {
                name: {key: list(names) for key, names in one.labels.items()} for name, one in self.datasets.items()
            },
            "left_out": [vars(one) for one in self.left_out],
        }

    def told(self) -> list[str]:
        """What names were taken as, and what was left out, in lines."""
        lines = []
        for key in CLASSES:
            ends = dict.fromkeys(name.rpartition("/")[2] for one in self.datasets.values() for name in one.labels[key])
            lines.append(f"{key}: {some(list(ends))}" if ends else f"{key}: none")
        told = [f"taken as {'; as '.join(lines)}"] if self.datasets else []
        told += [printable(one) for one in self.notes]
        return told + [
            f"{printable(one.data)}: left out {one.images} images of {printable(one.what)}: {one.why}"
            for one in self.left_out
        ]


def some(names: Sequence[str]) -> str:
    """A few of them, and how many there are more."""
    shown = ", ".join(printable(name) for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def read_scores(path: str | Path) -> dict[str, Scores]:
    """Finished scores by dataset, from a CSV file with a header.

    Columns: ``path``, ``label`` (0 real, 1 fake), ``probability`` of fake, and where they are there ``video`` (default:
    each image is its own) and ``dataset`` (default: "data").

    Raises:
        InvalidInput: a column, a label or a probability is missing or wrong; the line is named.
    """
    what = f"scores ({path})"
    if not Path(path).is_file():
        raise BadFile(f"{what}: no such file")
    rows: dict[str, list[tuple[Frame, float]]] = {}
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            got = ", ".join(map(quoted, reader.fieldnames or ())) or "nothing"
            raise BadFile(f"{what}: expected the columns {', '.join(COLUMNS)} in its first line, got {got}")
        try:
            for row in reader:
                scored = _row(f"{what}: line {reader.line_num}", row)
                rows.setdefault(row.get("dataset") or "data", []).append(scored)
        except csv.Error as error:
            raise BadFile(f"{what}: line {reader.line_num}: {error}") from None
    if not rows:
        raise BadFile(f"{what}: holds no rows")
    return scores_of(rows)


def scores_of(datasets: Mapping[str, Sequence[tuple[Frame, float]]]) -> dict[str, Scores]:
    """By dataset, from the probability of each frame."""
    return {
        name: Scores(
            np.array([frame.label for frame, _ in rows], np.int64),
            np.array([probability for _, probability in rows], np.float64),
            np.array([frame.video for frame, _ in rows], np.str_),
            np.array([str(frame.path) for frame, _ in rows], np.object_),
        )
        for name, rows in datasets.items()
    }


def _row(what: str, row: Mapping[str, str | None]) -> tuple[Frame, float]:
    label, path = row["label"], row["path"] or ""
    if label not in ("0", "1"):
        raise BadFile(f"{what}: label: expected 0 (real) or 1 (fake), got {quoted(str(label))}")
    probability = math.nan
    with contextlib.suppress(ValueError):
        probability = float(row["probability"] or "")
    if not 0 <= probability <= 1:
        raise BadFile(f"{what}: probability: expected a number from 0 to 1, got {quoted(str(row['probability']))}")
    return Frame(Path(path), int(label), row.get("video") or path), probability
