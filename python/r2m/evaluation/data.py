"""Datasets of frames: DeepfakeBench's and DF40's JSON, folders of images, and CSV files of finished scores."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from r2m.evaluation.metrics import Scores
from r2m.evaluation.request import Request
from r2m.places import read_small
from r2m_kernels.errors import BadFile, printable, quoted

COLUMNS = ("path", "label", "probability")  # of CSV files; video and dataset may be there
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# Names of folders that say what is in them.
FOLDERS = {"real": 0, "0_real": 0, "original": 0, "fake": 1, "1_fake": 1}
_MOST_JSON = 2**30


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


def read_dataset(path: str | Path, request: Request) -> dict[str, list[Frame]]:
    """Datasets by name.

    Args:
        path: a JSON file, or a directory with ``real`` and ``fake`` in it, or with directories of such.
        request: how.

    Raises:
        InvalidInput: no such file, not of these forms, or nothing in it.
    """
    datasets = (_folders if Path(path).is_dir() else _json)(Path(path), request)
    empty = [name for name, frames in datasets.items() if not frames]
    if empty or not datasets:
        what = f"dataset {quoted(empty[0])} " if empty else ""
        raise BadFile(f"data ({path}): {what}holds no frames of the split '{request.split}'")
    return datasets


def read_scores(path: str | Path) -> dict[str, Scores]:
    """Finished scores by dataset, from a CSV file with a header.

    Columns: ``path``, ``label`` (0 real, 1 fake), ``probability`` of fake, and where they are there ``video`` (default:
    the path's folder) and ``dataset`` (default: "data").

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
    video = row.get("video") or path.replace("\\", "/").rpartition("/")[0] or path
    return Frame(Path(path), int(label), video), probability


def _folders(directory: Path, request: Request) -> dict[str, list[Frame]]:
    def labelled(dataset: Path) -> dict[Path, int]:
        names = {entry: entry.name.lower() for entry in sorted(dataset.iterdir()) if entry.is_dir()}
        return {entry: FOLDERS[name] for entry, name in names.items() if name in FOLDERS}

    if labelled(directory):
        return {os.path.basename(os.path.realpath(directory)): _images(directory, labelled(directory), request)}
    inside = {entry: labelled(entry) for entry in sorted(directory.iterdir()) if entry.is_dir()}
    if not any(inside.values()):
        raise BadFile(
            f"data ({directory}): expected folders named {', '.join(FOLDERS)}, or datasets with such; there are none"
        )
    return {dataset.name: _images(dataset, folders, request) for dataset, folders in inside.items() if folders}


def _images(dataset: Path, folders: Mapping[Path, int], request: Request) -> list[Frame]:
    videos: dict[tuple[int, str], list[Path]] = {}
    for folder, label in folders.items():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in IMAGES:
                # An image that lies in no folder of its own is no frame of a video: it stands for itself.
                video = path if path.parent == folder else path.parent
                videos.setdefault((label, str(video.relative_to(dataset))), []).append(path)
    return [frame for (label, video), paths in videos.items() for frame in _video(paths, label, video, request)]


def _json(path: Path, request: Request) -> dict[str, list[Frame]]:
    what = f"data ({path})"
    if not path.is_file():
        raise BadFile(f"{what}: no such file or directory")
    text = read_small(path, what, _MOST_JSON, named=True)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{what}: not valid JSON ({printable(str(error))})") from None
    root = Path(request.root) if request.root else path.parent
    datasets: dict[str, list[Frame]] = {}
    for dataset, labels in _mapping(what, content).items():
        frames = datasets.setdefault(dataset, [])
        for name, splits in _mapping(f"{what}: {quoted(dataset)}", labels).items():
            where = f"{what}: {quoted(dataset)}: {quoted(name)}"
            videos = _mapping(where, splits).get(request.split, {})
            for video, entry in _of_compression(where, videos, request).items():
                frames += _frames(f"{where}: video {quoted(video)}", name, video, entry, root, request)
    return datasets


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        layout = "{dataset: {label: {split: {video: {label, frames}}}}}"
        raise BadFile(f"{what}: expected {layout}, got {type(value).__name__} in the place of a mapping")
    return value


def _of_compression(what: str, videos: Any, request: Request) -> dict[str, Any]:
    """The videos themselves; those of FF++ lie one level deeper."""
    held = _mapping(what, videos)
    if not held or any(isinstance(entry, dict) and "frames" in entry for entry in held.values()):
        return held
    if request.compression in held:
        return _mapping(what, held[request.compression])
    raise BadFile(f"{what}: has the compressions {', '.join(map(quoted, held))}, not {request.compression}")


def _frames(what: str, name: str, video: str, entry: Any, root: Path, request: Request) -> list[Frame]:
    entry = _mapping(what, entry)
    paths = entry.get("frames")
    if not isinstance(paths, list) or not all(isinstance(one, str) and one for one in paths):
        raise BadFile(f"{what}: expected frames: a list of paths")
    said = entry.get("label")
    name = said if isinstance(said, str) else name
    label = request.values.get(name, 0 if "real" in name.lower() else 1)
    # Written on Windows, some of them.
    images = [root / PureWindowsPath(one).as_posix() if "\\" in one else root / one for one in paths]
    return _video(images, label, str(images[0].parent) if images else video, request)


def _video(paths: Sequence[Path], label: int, key: str, request: Request) -> list[Frame]:
    """At most so many of a video's frames as are asked for."""
    count = request.frames
    if request.deepfakebench_compat:
        paths, key = paths[:count], key.rpartition("/")[2]
    elif len(paths) > count:
        paths = [paths[index * len(paths) // count] for index in range(count)]
    return [Frame(path, label, key) for path in paths]
