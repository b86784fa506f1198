"""Lists of images: DeepfakeBench's and DF40's JSON, and rows with a path and a label, as JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from r2m.evaluation import classes
from r2m.evaluation.data import CLASSES, FAKE, Data, Dataset, Frame, LeftOut
from r2m.evaluation.folders import SPLITS
from r2m.evaluation.grouping import Image, datasets
from r2m.evaluation.layouts import shapes
from r2m.evaluation.request import Request
from r2m.places import read_small
from r2m_kernels.errors import BadFile, printable, quoted

_MOST = 2**30  # bytes of a list
_NESTED = "{dataset: {label: {split: {video: {label, frames}}}}}"  # DeepfakeBench's and DF40's
# Names of columns, whatever their case: ForensicHub's, OpenFake's, Community Forensics' and what others call the same.
_COLUMNS: Mapping[str, Sequence[str]] = {
    "path": ("path", "file_name", "filename", "filepath", "image_path", "imagepath", "image", "file"),
    "label": ("label",),
    "group": ("model", "generator", "generatorname", "model_name", "dataset"),
    "video": ("video",),
    "split": ("split",),
}


def read_list(path: Path, request: Request) -> Data:
    """Datasets of a list.

    Raises:
        BadFile: it is none, or holds no frames of the split.
    """
    what = f"data ({path})"
    text = read_small(path, what, _MOST, named=True)
    root = Path(request.root) if request.root else path.parent
    if path.suffix.lower() in (".csv", ".tsv"):
        return _rows(what, path, _table(what, text, "\t" if path.suffix.lower() == ".tsv" else ","), root, request)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{what}: not valid JSON ({printable(str(error))})") from None
    if isinstance(content, list):
        return _rows(what, path, ((f"entry {index}", one) for index, one in enumerate(content)), root, request)
    return _deepfakebench(what, content, root, request)


def _table(what: str, text: bytes, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text.decode("utf-8-sig", "surrogateescape"), newline=""), delimiter=delimiter)
    try:
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise BadFile(f"{what}: line {reader.line_num}: {error}") from None


def _rows(what: str, path: Path, rows: Iterator[tuple[str, Any]], root: Path, request: Request) -> Data:
    """A dataset for each generator, or for all where none is named."""
    groups: dict[str, list[Image]] = {}
    skipped: Counter[str] = Counter()
    for where, row in rows:
        found = _found(row)
        if not found.get("path") or found.get("label") in (None, ""):
            raise BadFile(
                f"{what}: {where}: expected a path and a label ({_expected()}), got {printable(str(row))[:80]}"
            )
        split = found.get("split")
        if split and SPLITS.get(str(split).lower(), request.split) != request.split:
            skipped[str(split)] += 1
            continue
        label = classes.of_label(found["label"], request.values)
        if label is None:
            raise BadFile(
                f"{what}: {where}: label: expected 0 or real, 1 or fake, got {quoted(str(found['label'])[:80])}; "
                "--label NAME=0|1 says what it is"
            )
        group = str(found.get("group") or path.stem)
        name = str(found["path"])
        video = f"{group}/{found['video']}" if found.get("video") else name
        groups.setdefault(group, []).append(Image(_image(root, name), label, video, str(found["label"])))
    if not groups:
        raise BadFile(f"{what}: holds no frames of the split '{request.split}'")
    made, notes = datasets(groups, request)
    why = f"the split is {request.split} (--split)"
    return Data(made, [LeftOut(str(path), f"the split {name}", count, why) for name, count in skipped.items()], notes)


def _found(row: Any) -> dict[str, Any]:
    """A row by what its columns are."""
    if not isinstance(row, dict):
        return {}
    there = {str(name).strip().lower(): value for name, value in row.items()}
    return {
        meaning: there[name] for meaning, names in _COLUMNS.items() for name in [*filter(there.__contains__, names)][:1]
    }


def _expected() -> str:
    return ", ".join(" or ".join(_COLUMNS[one][:2]) for one in ("path", "label"))


def _deepfakebench(what: str, content: Any, root: Path, request: Request) -> Data:
    groups: dict[str, list[Image]] = {}
    for dataset, labels in _mapping(what, content).items():
        images = groups.setdefault(dataset, [])
        for name, splits in _mapping(f"{what}: {quoted(dataset)}", labels).items():
            where = f"{what}: {quoted(dataset)}: {quoted(name)}"
            videos = _mapping(where, splits).get(request.split, {})
            for video, entry in _of_compression(where, videos, request).items():
                images += _frames(f"{where}: video {quoted(video)}", name, video, entry, root, request)
    empty = [name for name, images in groups.items() if not images]
    if empty or not groups:
        one = f"dataset {quoted(empty[0])} " if empty else ""
        raise BadFile(f"{what}: {one}holds no frames of the split '{request.split}'")
    if not request.deepfakebench_compat:
        made, notes = datasets(groups, request)
        return Data(made, notes=notes)
    as_theirs = {
        name: Dataset(
            [Frame(one.path, one.label, one.path.parent.name) for one in images],
            {key: sorted({one.said for one in images if one.label == label}) for key, label in CLASSES.items()},
        )
        for name, images in groups.items()
    }
    return Data(as_theirs)


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        got = type(value).__name__
        raise BadFile(
            f"{what}: expected {_NESTED}, got {got} in the place of a mapping. Known are {shapes(listed=True)}"
        )
    return value


def _of_compression(what: str, videos: Any, request: Request) -> dict[str, Any]:
    """The videos themselves; those of FF++ lie one level deeper."""
    held = _mapping(what, videos)
    if not held or any(isinstance(entry, dict) and "frames" in entry for entry in held.values()):
        return held
    if request.compression in held:
        return _mapping(what, held[request.compression])
    raise BadFile(f"{what}: has the compressions {', '.join(map(quoted, held))}, not {request.compression}")


def _frames(what: str, name: str, video: str, entry: Any, root: Path, request: Request) -> list[Image]:
    """A video's; a label that says neither real nor fake is a manipulation's name (``FF-DF``)."""
    entry = _mapping(what, entry)
    paths = entry.get("frames")
    if not isinstance(paths, list) or not all(isinstance(one, str) and one for one in paths):
        raise BadFile(f"{what}: expected frames: a list of paths")
    said = entry.get("label", name)
    said = said if isinstance(said, str | int) else name
    label = classes.of_label(said, request.values)
    if request.deepfakebench_compat:
        paths = sorted(paths, key=lambda path: _number(what, path))[: request.frames]
    images = (_image(root, one) for one in paths)
    return [Image(image, FAKE if label is None else label, f"{name}/{video}", str(said)) for image in images]


def _number(what: str, path: str) -> int:
    """By which DeepfakeBench sorts: the frame's name up to its first point."""
    stem = PureWindowsPath(path).name.partition(".")[0]
    try:
        return int(stem)
    except ValueError:
        raise BadFile(
            f"{what}: frame {quoted(stem)}: --deepfakebench-compat sorts frames by number, as DeepfakeBench does, and "
            "this is none"
        ) from None


def _image(root: Path, path: str) -> Path:
    """Written on Windows, some of them."""
    return root / PureWindowsPath(path).as_posix() if "\\" in path else root / path
