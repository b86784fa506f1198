"""Folders of images: which of their names are a class, a split, a generator, a category or a video."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r2m.evaluation import classes
from r2m.evaluation.data import FAKE, REAL, Data, LeftOut, some
from r2m.evaluation.grouping import Image, datasets
from r2m.evaluation.layouts import shapes
from r2m.evaluation.request import Request
from r2m_kernels.errors import BadFile

IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
# That could have been meant, and are not read.
_OTHERS = (
    ".avif",
    ".heic",
    ".heif",
    ".npy",
    ".npz",
    ".raw",
    ".dng",
    ".mp4",
    ".avi",
    ".mov",
    ".mkv",
    ".webm",
    ".parquet",
)
SPLITS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_MOST_DEEP = 32  # folders in one another
_DIGITS = re.compile(r"([0-9]{1,18})")


@dataclass(frozen=True)
class _Folder:
    """One with images in it.

    Attributes:
        parts: its path within the data.
        images: names, sorted.
        prefix, rest: of the parts, what is before and after the one that says the class; without a split.
        label: of its images; None: nothing says it.
        said: path of the part that says it.
        split: of its images; None: nothing says it.
        stills: whether sets with such a name have no videos.
    """

    parts: tuple[str, ...]
    images: Sequence[str]
    prefix: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()
    label: int | None = None
    said: str = ""
    split: str | None = None
    stills: bool = False


@dataclass
class _Walked:
    folders: list[_Folder] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)


def read_folders(directory: Path, request: Request) -> Data:
    """Datasets in a directory; linked folders are followed.

    Raises:
        BadFile: no folder in it has a name that says real or fake, or none is of the split.
    """
    what = f"data ({directory})"
    walked = _walk(directory)
    known = [_placed(one, request.values) for one in walked.folders]
    labelled = [one for one in known if one.label is not None]
    if not labelled:
        raise BadFile(
            f"{what}: expected folders named {', '.join(classes.FOLDERS)}, 0_real or the like, with images; there are "
            f"none (--label NAME=0|1 says what others are). Known are {shapes(listed=False)}"
        )
    left_out = _unlabelled(directory, [one for one in known if one.label is None])
    left_out += [
        LeftOut(str(directory), f"files of the kind {suffix}", count, "no images that are read here")
        for suffix, count in sorted(walked.others.items())
    ]
    labelled, other_splits = _of_split(what, labelled, request)
    left_out += [LeftOut(str(directory), *one) for one in other_splits]
    groups: dict[str, list[_Folder]] = {}
    deep = max(len(one.prefix) for one in labelled)
    kept = max(1, deep - 1)
    for one in labelled:
        groups.setdefault("/".join(one.prefix[:kept]), []).append(one)
    whole = os.path.basename(os.path.realpath(directory))
    notes = _merged(groups, kept)
    found, shared = datasets(dict(_images(directory, whole, groups, request)), request)
    return Data(found, left_out, notes + shared)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """What sorts frame 2 before frame 10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name) if part)


def _walk(directory: Path) -> _Walked:
    """All folders with images, links followed but never into a folder that they are in."""
    walked = _Walked()

    def enter(place: str, parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> None:
        with os.scandir(place) as entries:
            inside = sorted((one for one in entries if not one.name.startswith(".")), key=lambda one: natural(one.name))
        images = []
        for one in inside:
            suffix = os.path.splitext(one.name)[1].lower()
            if one.is_dir():
                status = os.stat(one.path)
                key = (status.st_dev, status.st_ino)
                if key not in above and len(parts) < _MOST_DEEP:
                    enter(one.path, (*parts, one.name), above | {key})
            elif suffix in IMAGES:
                images.append(one.name)
            elif suffix in _OTHERS:
                walked.others[suffix] = walked.others.get(suffix, 0) + 1
        if images:
            walked.folders.append(_Folder(parts, images))

    status = os.stat(directory)
    enter(str(directory), (), frozenset({(status.st_dev, status.st_ino)}))
    return walked


def _placed(folder: _Folder, said: Mapping[str, int]) -> _Folder:
    """With what the names in its path say: the first that says a class, and a split before or right after it."""
    labels = [classes.of_folder(name, said) for name in folder.parts]
    place = next((index for index, label in enumerate(labels) if label is not None), None)
    if place is None:
        return folder
    prefix, rest = list(folder.parts[:place]), list(folder.parts[place + 1 :])
    split = None
    for names in (prefix, rest[:1]):
        index = next((index for index, name in enumerate(names) if name.lower() in SPLITS), None)
        if index is not None and split is None:
            split = SPLITS[names[index].lower()]
            del (prefix if names is prefix else rest)[index]
    return _Folder(
        folder.parts,
        folder.images,
        tuple(prefix),
        tuple(rest),
        labels[place],
        "/".join(folder.parts[: place + 1]),
        split,
        classes.holds_stills(folder.parts[place]),
    )


def _unlabelled(directory: Path, folders: Sequence[_Folder]) -> list[LeftOut]:
    """By the part of their paths that stands beside what is known."""
    counts: dict[str, int] = {}
    for one in folders:
        name = "/".join(one.parts[:2]) or "the folder itself"
        counts[name] = counts.get(name, 0) + len(one.images)
    why = "no name in their path says real or fake (--label NAME=0|1)"
    return [LeftOut(str(directory), name, count, why) for name, count in sorted(counts.items())]


def _of_split(
    what: str, folders: Sequence[_Folder], request: Request
) -> tuple[list[_Folder], list[tuple[str, int, str]]]:
    """Those of the split that is asked for, or of val where there is no test; and what the others are."""
    there = {one.split for one in folders} - {None}
    chosen = request.split
    if there and chosen not in there:
        if chosen == "test" and "val" in there:
            chosen = "val"
        else:
            raise BadFile(f"{what}: has the splits {', '.join(sorted(map(str, there)))}, not {chosen} (--split)")
    counts: dict[str, int] = {}
    for one in folders:
        if one.split not in (None, chosen):
            counts[str(one.split)] = counts.get(str(one.split), 0) + len(one.images)
    why = f"the split is {chosen} (--split)"
    others = [(f"the split {name}", count, why) for name, count in counts.items()]
    return [one for one in folders if one.split in (None, chosen)], others


def _merged(groups: Mapping[str, Sequence[_Folder]], kept: int) -> list[str]:
    """What is said of groups that are made of several folders between their name and the class."""
    notes = []
    for name, folders in groups.items():
        categories = sorted({"/".join(one.prefix[kept:]) for one in folders} - {""})
        if len(categories) > 1:
            notes.append(f"{name} is {some(categories)} together")
    return notes


def _images(
    directory: Path, whole: str, groups: Mapping[str, Sequence[_Folder]], request: Request
) -> Iterator[tuple[str, list[Image]]]:
    """Each group's images by name; a group whose fakes are of several generators is one for each, with its reals."""
    for name, folders in groups.items():
        apart, in_videos = _inside(folders, request)
        reals: list[Image] = []
        fakes: dict[str, list[Image]] = {}
        for one in folders:
            generator = one.rest[:1] if apart and one.label == FAKE else ()
            is_video = in_videos and len(one.rest) > len(generator)
            images = [_image(directory, one, image, is_video) for image in one.images]
            group = "/".join(filter(None, (name, *generator))) or whole
            (fakes.setdefault(group, []) if one.label == FAKE else reals).extend(images)
        for group, images in (fakes or {name or whole: []}).items():
            yield group, [*reals, *images]


def _inside(folders: Sequence[_Folder], request: Request) -> tuple[bool, bool]:
    """Whether the folders in fake are generators, and whether images in a folder of their own are a video's frames.

    They are generators where fake has a level of folders more than real, or two; videos where both have some besides.
    """
    deep = {label: [len(one.rest) for one in folders if one.label == label] for label in (REAL, FAKE)}
    real, fake = (max(deep[label], default=max(deep[1 - label], default=0)) for label in (REAL, FAKE))
    by_itself = request.subfolders == "auto" and not any(one.stills for one in folders)
    apart = request.subfolders == "generator" or (by_itself and (fake > real or fake > 1))
    guessed = by_itself or request.subfolders == "generator"
    return apart, request.subfolders == "video" or (guessed and min(real, fake - apart) > 0)


def _image(directory: Path, folder: _Folder, name: str, is_video: bool) -> Image:
    """A frame of its folder's video, or one for itself."""
    video = "/".join(folder.parts if is_video else (*folder.parts, name))
    return Image(directory.joinpath(*folder.parts, name), folder.label or REAL, video, folder.said)
