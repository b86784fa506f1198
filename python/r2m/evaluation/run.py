"""Detectors over datasets: images in, probabilities out, and what could not be read."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from PIL import Image
from torch import Tensor, nn

from r2m.evaluation.data import Frame, scores_of
from r2m.evaluation.detectors import as_batch, probabilities
from r2m.evaluation.metrics import Scores, average, judge
from r2m.places import new_file
from r2m.preprocessing import Preprocessing
from r2m_kernels import __version__
from r2m_kernels.errors import BadFile, BadOption, printable, quoted
from r2m_kernels.streaming import usable_device

RESULT_FILE = "evaluation.json"
AVERAGED = ("acc", "auc", "eer", "ap", "video_acc", "video_auc", "video_eer", "video_ap")
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

    def scores(self) -> dict[str, Scores]:
        """By dataset."""
        return {
            name: scores_of([(frame.label, probability, frame.video) for frame, probability in rows])
            for name, rows in self.rows.items()
        }


def run_detector(
    model: nn.Module,
    datasets: Mapping[str, Sequence[Frame]],
    preprocessing: Preprocessing,
    *,
    label: str,
    device: str = "cpu",
    batch: int = 32,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Evaluated:
    """Probabilities of fake for all frames that can be read.

    Args:
        model: in evaluation mode.
        datasets: frames by dataset.
        preprocessing: the model's.
        label: how error messages name the model.
        device: where it runs.
        batch: images at a time.
        strict: an image that cannot be read ends it.
        progress: called with the number of frames done so far.

    Raises:
        InvalidInput: outputs that are no probabilities, an unreadable image while strict, or a dataset of which none
            can be read.
    """
    where = usable_device(device)
    model = model.to(where)
    evaluated = Evaluated()
    done = 0
    for name, frames in datasets.items():
        rows: list[tuple[Frame, float]] = []
        for chunk in _loaded(frames, preprocessing, batch):
            images: list[Tensor] = []
            there: list[Frame] = []
            for frame, image in chunk:
                if isinstance(image, str):
                    if strict:
                        raise BadFile(f"dataset {quoted(name)}: {frame.path}: {image}")
                    evaluated.unreadable[str(frame.path)] = image
                else:
                    images.append(image)
                    there.append(frame)
            if images:
                with torch.inference_mode():
                    values = probabilities(model(as_batch(images, where)), label).tolist()
                if len(values) != len(there):
                    raise BadOption(f"{label}: expected {len(there)} outputs, got {len(values)}")
                rows += zip(there, values, strict=True)
            done += len(chunk)
            if progress is not None:
                progress(done)
        if not rows:
            path, reason = next(iter(evaluated.unreadable.items()))
            raise BadFile(f"dataset {quoted(name)}: none of its {len(frames)} images can be read: {path}: {reason}")
        evaluated.rows[name] = rows
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
    frames: Sequence[Frame], preprocessing: Preprocessing, batch: int
) -> Iterator[list[tuple[Frame, Tensor | str]]]:
    """Batches of frames with their images, the next being read while one is used."""
    with ThreadPoolExecutor(_THREADS) as pool:

        def begin(chunk: list[Frame]) -> list[Any]:
            return [pool.submit(read_image, frame.path, preprocessing) for frame in chunk]

        rest = iter(frames)
        chunk = list(islice(rest, batch))
        begun = begin(chunk)
        while chunk:
            ahead = list(islice(rest, batch))
            begun_ahead = begin(ahead)
            yield [(frame, one.result()) for frame, one in zip(chunk, begun, strict=True)]
            chunk, begun = ahead, begun_ahead


def judged(scores: Mapping[str, Scores], *, resamples: int, seed: int) -> dict[str, Any]:
    """Metrics by dataset, and their means over datasets."""
    datasets = {name: judge(of, resamples=resamples, seed=seed) for name, of in scores.items()}
    return {"datasets": datasets, "average": average(datasets, AVERAGED)}


def write_result(out: Path, result: Mapping[str, Any], evaluated: Mapping[str, Evaluated]) -> None:
    """``evaluation.json`` and the scores of every model that was run, as CSV files that can be read again."""
    out.mkdir(parents=True, exist_ok=True)
    for number, (_, one) in enumerate(evaluated.items(), start=1):
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["path", "label", "video", "dataset", "probability"])
        for dataset, rows in one.rows.items():
            writer.writerows(
                [frame.path, frame.label, frame.video, dataset, repr(probability)] for frame, probability in rows
            )
        new_file(out / f"scores-{number}.csv", table.getvalue().encode(errors="surrogateescape"))
    text = json.dumps(result, allow_nan=False, indent=2, ensure_ascii=False) + "\n"
    new_file(out / RESULT_FILE, text.encode(errors="backslashreplace"))


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "r2m_kernels": __version__,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
    }


def left_out(unreadable: Mapping[str, str]) -> list[str]:
    """What could not be read, in lines."""
    if not unreadable:
        return []
    reasons = Counter(reason.partition(":")[0] for reason in unreadable.values())
    kinds = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    lines = [f"{len(unreadable)} images were left out: {kinds}"]
    lines += [f"  {printable(path)}: {reason}" for path, reason in islice(unreadable.items(), _LISTED)]
    return lines + [f"  … and {len(unreadable) - _LISTED} more"] * (len(unreadable) > _LISTED)
