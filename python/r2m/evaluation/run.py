"""Detectors over datasets: images in, probabilities out, and what could not be read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from r2m.evaluation.data import Dataset, Frame
from r2m.evaluation.detectors import probabilities
from r2m.evaluation.request import Request
from r2m.evaluation.tables import FILES, FORMATS, Table
from r2m.places import csv_table, new_file
from r2m.preprocessing import Preprocessing
from r2m.records import EVALUATION
from r2m_kernels.errors import BadFile, BadOption, printable, quoted
from r2m_kernels.streaming import usable_device

_THREADS = 4  # that read images, while the detector works
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
) -> Evaluated:
    """Probabilities of fake for all frames that can be read.

    Args:
        name: of the model, for error messages.
        model: in evaluation mode.
        datasets: by name.
        preprocessing: the model's.
        request: on which device, how many images at a time, and what becomes of those that cannot be read.
        progress: called with the number of frames done so far.

    Raises:
        InvalidInput: outputs that are no probabilities, an unreadable image while strict, or a dataset of which none
            can be read.
    """
    device = usable_device(request.device)
    model = model.to(device)
    evaluated = Evaluated()
    done = 0
    known: dict[Path, float] = {}  # an image that several datasets share is looked at once
    for dataset, one in datasets.items():
        seen = known.keys() | evaluated.unreadable.keys()
        fresh = {frame.path: frame for frame in one.frames if not {frame.path, str(frame.path)} & seen}
        for batch in _loaded(list(fresh.values()), preprocessing, request.batch):
            unreadable = {str(frame.path): image for frame, image in batch if isinstance(image, str)}
            if unreadable and request.strict:
                path, reason = next(iter(unreadable.items()))
                raise BadFile(f"dataset {quoted(dataset)}: {path}: {reason}")
            evaluated.unreadable |= unreadable
            readable = [(frame, image) for frame, image in batch if isinstance(image, Tensor)]
            if readable:
                with torch.inference_mode():
                    output = model(torch.stack([image for _, image in readable]).to(device))
                    values = probabilities(output, f"model '{name}'").tolist()
                if len(values) != len(readable):
                    raise BadOption(f"model '{name}': expected {len(readable)} outputs, got {len(values)}")
                known |= {frame.path: value for (frame, _), value in zip(readable, values, strict=True)}
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


def read_image(path: Path, preprocessing: Preprocessing) -> Tensor | str:
    """(3, s, s) float32, or why there is none."""
    try:
        with Image.open(path) as image:
            side = (preprocessing.size, preprocessing.size)
            pixels = np.asarray(image.convert("RGB").resize(side, Image.Resampling.BICUBIC), np.float32) / 255
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what its decoders raise
        return f"not a readable image: {printable(str(error))}"
    normal = (pixels - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)
    return torch.from_numpy(normal.transpose(2, 0, 1).copy())


def _loaded(
    frames: Sequence[Frame], preprocessing: Preprocessing, count: int
) -> Iterator[list[tuple[Frame, Tensor | str]]]:
    """Batches of frames with their images, the next being read while one is used."""
    with ThreadPoolExecutor(_THREADS) as pool:
        begun = (
            [(frame, pool.submit(read_image, frame.path, preprocessing)) for frame in frames[start : start + count]]
            for start in range(0, len(frames), count)
        )
        for batch, _next in pairwise(chain(begun, [[]])):
            yield [(frame, image.result()) for frame, image in batch]


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
