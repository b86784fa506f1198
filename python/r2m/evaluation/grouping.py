"""Images with labels, made into datasets: which reals a group's fakes are judged against, and how many frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from r2m.evaluation.data import CLASSES, FAKE, REAL, Dataset, Frame, some
from r2m.evaluation.request import Request


@dataclass(frozen=True)
class Image:
    """An image as a layout's reader finds it.

    Attributes:
        path: where it is.
        label: 1 fake, 0 real.
        video: what tells its video from all others of the data.
        said: the name that it has its label from.
    """

    path: Path
    label: int
    video: str
    said: str


def datasets(groups: Mapping[str, Iterable[Image]], request: Request) -> tuple[dict[str, Dataset], list[str]]:
    """Each group as a dataset; where some have fakes alone and others reals alone, the former share the latter's.

    Args:
        groups: name → its images, in order.
        request: how many frames of a video.

    Returns:
        By name, and notes.
    """
    split: dict[str, dict[int, list[Image]]] = {
        name: {label: [one for one in images if one.label == label] for label in (REAL, FAKE)}
        for name, images in ((name, list(images)) for name, images in groups.items())
    }
    alone = [name for name, one in split.items() if one[FAKE] and not one[REAL]]
    reals = [name for name, one in split.items() if one[REAL] and not one[FAKE]]
    if alone and reals:
        shared = [image for name in reals for image in split[name][REAL]]
        split = {name: {**one, REAL: one[REAL] or shared} for name, one in split.items() if name not in reals}
        notes = [f"{some(alone)} share the {len(shared)} reals of {some(reals)}"]
    else:
        notes = []
    found = {}
    for name, one in split.items():
        frames = [frame for label in (REAL, FAKE) for frame in _frames(one[label], request)]
        labels = {key: sorted({image.said for image in one[label]}) for key, label in CLASSES.items()}
        found[name] = Dataset(frames, labels)
    return found, notes


def _frames(images: Iterable[Image], request: Request) -> list[Frame]:
    """At most so many of a video's as are asked for, evenly spread."""
    videos: dict[str, list[Image]] = {}
    for one in images:
        videos.setdefault(one.video, []).append(one)
    frames = []
    for video in videos.values():
        count = min(request.frames, len(video))
        chosen = [video[index * len(video) // count] for index in range(count)]
        frames += [Frame(one.path, one.label, one.video) for one in chosen]
    return frames
