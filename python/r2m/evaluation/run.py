"""Detectors over datasets: images in, probabilities out, and what could not be read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from r2m.evaluation.data import Dataset, Frame
from r2m.evaluation.pictures import Change, read_image
from r2m.evaluation.request import Request
from r2m.evaluation.scoring import scored
from r2m.evaluation.tables import FILES, FORMATS, Table
from r2m.places import csv_table, new_file
from r2m.preprocessing import Preprocessing
from r2m.records import EVALUATION
from r2m_kernels.errors import BadFile, printable, quoted

_LISTED = 20


@dataclass
class Evaluated:
    """One model's scores.

    Attributes:
        rows: dataset → (frame, probability) in order.
        unreadable: paths that could not be read, and why.
    """

    rows: dict[str, list[tuple[Frame, float]]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def run_detector(
    name: str,
    model: nn.Module,
    datasets: Mapping[str, Dataset],
    preprocessing: Preprocessing,
    request: Request,
    progress: Callable[[int], None],
    change: Change | None = None,
) -> Evaluated:
    """Probabilities of fake for all frames that can be read.

    Args:
        name: of the model, for error messages.
        model: in evaluation mode.
        datasets: by name.
        preprocessing: the model's.
        request: on which device, how many images at a time, and what becomes of those that cannot be read.
        progress: called with the number of frames done so far.
        change: what becomes of each picture before preprocessing.

    Raises:
        InvalidInput: outputs that are no probabilities, an unreadable image while strict, or a dataset of which none
            can be read.
    """
    evaluated = Evaluated()
    done = 0
    known: dict[Path, float] = {}  # an image that several datasets share is looked at once

    def read(path: Path) -> Tensor | str:
        return read_image(path, preprocessing, change)

    for dataset, one in datasets.items():
        seen = known.keys() | evaluated.unreadable.keys()
        fresh = dict.fromkeys(frame.path for frame in one.frames if not {frame.path, str(frame.path)} & seen)
        for batch in scored(name, model, fresh, read, batch=request.batch, device=request.device):
            unreadable = {str(path): found for path, found in batch if isinstance(found, str)}
            if unreadable and request.strict:
                path, reason = next(iter(unreadable.items()))
                raise BadFile(f"dataset {quoted(dataset)}: {path}: {reason}")
            evaluated.unreadable |= unreadable
            known |= {path: found for path, found in batch if not isinstance(found, str)}
            done += len(batch)
            progress(done)
        rows = [(frame, known[frame.path]) for frame in one.frames if frame.path in known]
        if not rows:
            path, reason = next((str(one.path), evaluated.unreadable[str(one.path)]) for one in one.frames)
            raise BadFile(
                f"dataset {quoted(dataset)}: none of its {len(one.frames)} images can be read: {path}: {reason}"
            )
        evaluated.rows[dataset] = rows
    return evaluated


def write_result(
    out: Path, result: Mapping[str, Any], evaluated: Mapping[str, Evaluated], shown: Sequence[Table]
) -> None:
    """``evaluation.json``, the scores of every model that was run, as CSV files that can be read again, and tables."""
    out.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(evaluated.values(), start=1):
        rows = [
            {**asdict(frame), "dataset": dataset, "probability": probability}
            for dataset, scored in one.rows.items()
            for frame, probability in scored
        ]
        new_file(out / f"scores-{number}.csv", csv_table(rows, "surrogateescape"))
    for table, (kind, suffix) in itertools.product(shown, FILES.items()):
        text = "\n".join(FORMATS[kind](table)) + "\n"
        new_file(out / f"{table.name}.{suffix}", text.encode(errors="backslashreplace"))
    new_file(out / EVALUATION.file, EVALUATION.text(result))


def left_out(unreadable: Mapping[str, str]) -> list[str]:
    """What could not be read, in lines."""
    if not unreadable:
        return []
    reasons = Counter(reason.partition(":")[0] for reason in unreadable.values())
    kinds = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    lines = [f"{len(unreadable)} images were left out: {kinds}"]
    lines += [f"  {printable(path)}: {reason}" for path, reason in islice(unreadable.items(), _LISTED)]
    return lines + [f"  … and {len(unreadable) - _LISTED} more"] * (len(unreadable) > _LISTED)
