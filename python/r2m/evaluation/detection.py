"""What ``r2m detect`` does: scores of pictures and videos that nobody has labelled, by the way of ``evaluate``."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from r2m.evaluation.ensemble import Ensemble, log_odds, together
from r2m.evaluation.folders import IMAGES, natural
from r2m.evaluation.metrics import THRESHOLD
from r2m.evaluation.models import load, preprocessing_of
from r2m.evaluation.pictures import prepared, read_image
from r2m.evaluation.request import Request
from r2m.evaluation.scoring import scored
from r2m.evaluation.videos import SUFFIXES, stills
from r2m.preprocessing import Preprocessing
from r2m.progress import bars
from r2m_kernels.errors import BadFile, printable

REAL, FAKE = "real", "fake"


@dataclass(frozen=True)
class Picture:
    """One that is scored.

    Attributes:
        file: the picture, or the video that it is from.
        video: the file or directory whose pictures are frames of one video; empty: it stands for itself.
        frame: its number in a video file.
        seconds: when that shows it.
        ready: as the detector sees it, or why it cannot be seen; None: that is to be read.
    """

    file: str
    video: str = ""
    frame: int | None = None
    seconds: float | None = None
    ready: Tensor | str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Detected:
    """What a model said.

    Attributes:
        rows: for each picture, each video after its own, and each file that could not be read, what it is: as JSON
            lines have it.
        failed: how many files could not be read, or not to their end.
    """

    rows: list[dict[str, Any]]
    failed: int


def detect(
    model: str,
    files: Sequence[str],
    request: Request,
    *,
    adapters: bool,
    videos: bool,
    quiet: bool,
    loaded: nn.Module | None = None,
) -> Detected:
    """Scores of files.

    Args:
        model: a checkpoint.
        files: pictures, videos and directories of them.
        request: how the model is loaded, threshold, frames of a video, batches, device.
        adapters: the checkpoint is one with adapters.
        videos: pictures of one directory are frames of one video.
        quiet: no progress.
        loaded: the model, where it is not as the checkpoint has it.

    Raises:
        InvalidInput: the model cannot be loaded, or there is nothing to look at.
    """
    listed = list(_listed(files))
    if not listed:
        kinds = ", ".join((*IMAGES, *SUFFIXES))
        raise BadFile(f"{printable(files[0])}: expected pictures or videos in it, by their names' ends: {kinds}")
    preprocessing = preprocessing_of("model", model, request)
    detector = load("model", model, request, adapters) if loaded is None else loaded
    names = list(detector.members) if isinstance(detector, Ensemble) else [""]
    found: dict[str, list[tuple[Picture, float | str]]] = {}
    with nullcontext() if quiet else bars() as shown:
        for name in names:
            rows = found[name] = []
            begun: set[str] = set()
            module = detector.with_adapter(name) if isinstance(detector, Ensemble) else detector
            pictures = _pictures(listed, preprocessing, request.frames, videos)
            read = functools.partial(_seen, preprocessing=preprocessing)
            for batch in scored("model", module, pictures, read, batch=request.batch, device=request.device):
                rows += [(replace(picture, ready=None), value) for picture, value in batch]  # without its pixels
                begun |= {picture.file for picture, _ in batch}
                if shown is not None:
                    shown.show(name or "model", len(begun), len(listed), f"{len(begun)}/{len(listed)}")
    return _told(found, THRESHOLD if request.threshold is None else request.threshold)


def images(files: Sequence[str], preprocessing: Preprocessing, frames: int) -> Iterator[Tensor]:
    """(3, s, s) float32 of each picture, and of frames of videos, as the detector sees it; without what is none."""
    for picture in _pictures([*_listed(files)], preprocessing, frames, videos=False):
        seen = _seen(picture, preprocessing)
        if isinstance(seen, Tensor):
            yield seen


def _listed(files: Sequence[str]) -> Iterator[str]:
    """Files as they were given, and those in directories that are pictures or videos by their names."""
    for file in files:
        if os.path.isdir(file):
            yield from _inside(file)
        else:
            yield file


def _inside(directory: str) -> Iterator[str]:
    """By number where names have one; linked directories too, each once."""
    seen = set()
    for place, folders, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=natural)
        for name in sorted(names, key=natural):
            if os.path.splitext(name)[1].lower() in (*IMAGES, *SUFFIXES):
                yield os.path.join(place, name)


def _pictures(files: Sequence[str], preprocessing: Preprocessing, frames: int, videos: bool) -> Iterator[Picture]:
    for file in files:
        if Path(file).suffix.lower() not in SUFFIXES:
            yield Picture(file, os.path.dirname(file) or "." if videos else "")
            continue
        for still in stills(Path(file), frames):
            if isinstance(still, str):
                yield Picture(file, file, ready=still)
            else:
                yield Picture(file, file, still.number, still.seconds, prepared(still.image, preprocessing))


def _seen(picture: Picture, preprocessing: Preprocessing) -> Tensor | str:
    return read_image(Path(picture.file), preprocessing) if picture.ready is None else picture.ready


def _told(found: Mapping[str, Sequence[tuple[Picture, float | str]]], threshold: float) -> Detected:
    """A row for each picture, and after the last of a video one for it."""
    first, *_ = found.values()
    last = {picture.video: place for place, (picture, _) in enumerate(first)}
    values: dict[str, dict[str, list[float]]] = {}  # video → adapter → probabilities
    rows: list[dict[str, Any]] = []
    for place, (picture, one) in enumerate(first):
        if isinstance(one, str):
            rows.append({"file": picture.file, "error": one})
        else:
            own = {name: [float(scores[place][1])] for name, scores in found.items()}
            for name, value in own.items():
                values.setdefault(picture.video, {}).setdefault(name, []).extend(value)
            where = {} if picture.frame is None else {"frame": picture.frame, "seconds": picture.seconds}
            rows.append({"file": picture.file, **where, **_judged(own, threshold)})
        if picture.video in values and picture.video and last[picture.video] == place:
            whole = values[picture.video]
            count = len(next(iter(whole.values())))
            rows.append({"video": picture.video, "frames": count, **_judged(whole, threshold)})
    return Detected(rows, len({row["file"] for row in rows if "error" in row}))


def _judged(values: Mapping[str, Sequence[float]], threshold: float) -> dict[str, Any]:
    """Score and label of a picture or of a video's frames, from each adapter's probabilities of them."""
    logits = log_odds(list(values.values()))
    score = float(np.mean(values[""] if "" in values else together(logits)))
    row: dict[str, Any] = {"score": score, "label": FAKE if score > threshold else REAL}
    if "" not in values:
        row["logits"] = dict(zip(values, logits.mean(axis=1).tolist(), strict=True))
        row["looks_like"] = max(row["logits"], key=lambda name: row["logits"][name])
    return row


def lines(found: Detected) -> list[str]:
    """For people: score, label, whose forgery it looks like, and the file at the end, whatever its length."""
    attributed = any("looks_like" in row for row in found.rows)
    width = max(len("looks like"), *(len(printable(row.get("looks_like", ""))) for row in found.rows))
    text = ["score  label  " + (f"{'looks like':{width}}  " if attributed else "") + "file"]
    for row in found.rows:
        if "error" in row or "frame" in row:  # told elsewhere, or by its video
            continue
        like = printable(row["looks_like"]) if row.get("looks_like") and row["label"] == FAKE else ""
        name = printable(row.get("video") or row["file"])
        frames = f": mean of {row['frames']} frames" if "video" in row else ""
        text.append(
            f"{row['score']:.3f}  {row['label']:5}  " + (f"{like:{width}}  " if attributed else "") + name + frames
        )
    return text


def errors(found: Detected) -> list[str]:
    """What could not be read."""
    return [f"{printable(row['file'])}: {row['error']}" for row in found.rows if "error" in row]
