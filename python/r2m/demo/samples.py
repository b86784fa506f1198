"""Pictures to train and to judge on: crops of photographs, forged or not, each set from its own seed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from r2m.demo.camera import capture, capture_elsewhere, compress, store
from r2m.demo.faces import PHOTOGRAPHS_EACH, SIZE, Photographs, crop_face
from r2m.demo.forgeries import TRAINED, UNSEEN, Forgery, forge
from r2m.demo.resampling import Picture, clip, halve, smooth

GROUPS = ("in-distribution", "cross", "unseen")


class Group(NamedTuple):
    """Real pictures and, for each forgery, forged ones: all (n, size, size) float32 in [0, 1], 48 in the demo."""

    real: Picture
    forged: dict[str, Picture]


class PretrainingSet(NamedTuple):
    """Pictures for the base's generic task, and what was done to them."""

    pictures: Picture  # (n, 48, 48)
    labels: npt.NDArray[np.int64]  # (3, n): quarter turns, index of the degradation, index of the person


def stream(seed: int, name: str) -> np.random.Generator:
    """Random numbers of its own for each named set, so that sets do not change when others are added."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def make_pictures(
    photographs: Photographs,
    people: Sequence[int],
    kind: str,
    draws: int,
    seed: int,
    label: str,
    *,
    elsewhere: bool = False,
    forgery: Forgery | None = None,
    size: int = SIZE,
) -> Picture:
    """Real or forged pictures: ``draws`` random crops of each photograph of these people, ordered by draw and person.

    Donors are other people among ``people``, so that no person crosses from one part of the split to another.

    Args:
        photographs: (40, 10, 112, 92) float32 in [0, 1].
        people: whose photographs.
        kind: ``real``, or a forgery, made between crop and camera.
        draws: crops of each photograph.
        seed, label: name the stream of random numbers.
        elsewhere: use the other camera and the forgery's shifted parameters.
        forgery: forges in place of the demo's of that name.
        size: pixels on a side, a multiple of 8.

    Returns:
        (people · 10 · draws, size, size) float32 in [0, 1].
    """
    rng = stream(seed, f"{label}/{kind}")
    camera = capture_elsewhere if elsewhere else capture
    forgery = forgery or partial(forge, kind, shifted=elsewhere)
    made = []
    for _, (index, person), number in product(range(draws), enumerate(people), range(PHOTOGRAPHS_EACH)):
        if kind == "real":
            picture = crop_face(photographs[person, number], rng, size)
        else:
            other = people[(index + int(rng.integers(1, len(people)))) % len(people)]
            donor = crop_face(photographs[other, rng.integers(PHOTOGRAPHS_EACH)], rng, size)
            picture = forgery(crop_face(photographs[person, number], rng, size), donor, rng)
        made.append(camera(picture, rng))
    return np.stack(made)


def make_group(photographs: Photographs, people: Sequence[int], name: str, draws: int, seed: int, label: str) -> Group:
    """One group of the evaluation, of people and streams as for ``make_pictures``.

    ``name``: ``in-distribution`` (trained families), ``cross`` (the same, shifted, by another camera) or ``unseen``
    (forgeries that nothing was trained on).
    """

    def make(kind: str) -> Picture:
        named = f"{label} {name}"
        return make_pictures(photographs, people, kind, draws, seed, named, elsewhere=name == "cross")

    return Group(make("real"), {kind: make(kind) for kind in (UNSEEN if name == "unseen" else TRAINED)})


def make_pretraining(photographs: Photographs, people: Sequence[int], draws: int, seed: int) -> PretrainingSet:
    """Real pictures, degraded and turned by quarter turns, labelled with what was done and who it is.

    Nothing here is a forgery: it stands for the generic pretraining that real detectors start from.
    """
    rng = stream(seed, "pretraining")
    pictures, labels = [], []
    for _, (index, person), number in product(range(draws), enumerate(people), range(PHOTOGRAPHS_EACH)):
        turns, kind = int(rng.integers(4)), int(rng.integers(len(DEGRADATIONS)))
        picture = degrade(DEGRADATIONS[kind], crop_face(photographs[person, number], rng), rng)
        pictures.append(np.rot90(capture(picture, rng), turns))
        labels.append((turns, kind, index))
    return PretrainingSet(np.stack(pictures), np.array(labels).T)


def degrade(kind: str, picture: Picture, rng: np.random.Generator) -> Picture:
    """Apply one of ``DEGRADATIONS`` with random strength; (48, 48) float32 in [0, 1] in and out."""
    return _DEGRADE[kind](picture, rng)


_DEGRADE: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {
    "none": lambda picture, rng: store(picture),
    "blur": lambda picture, rng: smooth(picture, rng.uniform(0.6, 1.4)),
    "noise": lambda picture, rng: clip(picture + rng.normal(0.0, rng.uniform(0.01, 0.05), picture.shape)),
    "compression": lambda picture, rng: compress(picture, rng.uniform(20.0, 70.0)),
    "half size": lambda picture, rng: halve(picture).repeat(2, axis=0).repeat(2, axis=1),
    "contrast": lambda picture, rng: clip((picture - 0.5) * rng.uniform(0.4, 0.7) + 0.5),
}
DEGRADATIONS = tuple(_DEGRADE)
