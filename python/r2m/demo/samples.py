"""Pictures to train and to judge on: crops of photographs, forged or not, each set from its own seed."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from r2m.demo.camera import capture, capture_elsewhere, compress, store
from r2m.demo.faces import PHOTOGRAPHS_EACH, Photographs, crop_face
from r2m.demo.forgeries import TRAINED, UNSEEN, Forgery, forge
from r2m.demo.resampling import Picture, clip, halve, smooth

DEGRADATIONS = ("none", "blur", "noise", "compression", "half size", "contrast")
GROUPS = ("in-distribution", "cross", "unseen")


@dataclass(frozen=True)
class Group:
    """Real pictures and, for each forgery, as many forged ones: all (n, 48, 48) float32 in [0, 1]."""

    real: Picture
    forged: dict[str, Picture]


@dataclass(frozen=True)
class PretrainingSet:
    """Pictures for the base's generic task: (n, 48, 48) float32, and three (n,) int64 label arrays."""

    pictures: Picture
    rotation: npt.NDArray[np.int64]
    degradation: npt.NDArray[np.int64]
    identity: npt.NDArray[np.int64]


def _generator(seed: int, *labels: str) -> np.random.Generator:
    """A stream of its own for each named set, so that sets do not change when others are added."""
    return np.random.default_rng([seed, zlib.crc32("/".join(labels).encode())])


def _each(people: Sequence[int], draws: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Index of a person among these, and where a photograph lies: each ``draws`` times, in the order of a set."""
    for _, (index, person), number in itertools.product(range(draws), enumerate(people), range(PHOTOGRAPHS_EACH)):
        yield index, (person, number)


def make_real(
    photographs: Photographs,
    people: Sequence[int],
    draws: int,
    seed: int,
    label: str,
    *,
    elsewhere: bool = False,
) -> Picture:
    """Real pictures: ``draws`` random crops of each photograph of these people.

    Args:
        photographs: (40, 10, 112, 92) float32 in [0, 1].
        people: whose photographs.
        draws: crops of each photograph.
        seed, label: name the stream of random numbers.
        elsewhere: use the other camera.

    Returns:
        (people · 10 · draws, 48, 48) float32 in [0, 1], ordered by draw, person, photograph.
    """
    rng = _generator(seed, label, "real")
    camera = capture_elsewhere if elsewhere else capture
    return np.stack([camera(crop_face(photographs[at], rng), rng) for _, at in _each(people, draws)])


def make_forged(
    photographs: Photographs,
    people: Sequence[int],
    kind: str,
    draws: int,
    seed: int,
    label: str,
    *,
    elsewhere: bool = False,
    forgery: Forgery | None = None,
) -> Picture:
    """Forged pictures: as ``make_real``, with the forgery between crop and camera.

    Donors are other people among ``people``, so that no person crosses from one part of the split to another.
    ``elsewhere`` also shifts the forgery's parameters. ``forgery`` forges in place of the demo's of that name.
    """
    rng = _generator(seed, label, kind)
    camera = capture_elsewhere if elsewhere else capture
    forgery = forgery or partial(forge, kind, shifted=elsewhere)
    made = []
    for index, at in _each(people, draws):
        other = people[(index + int(rng.integers(1, len(people)))) % len(people)]
        donor = crop_face(photographs[other, rng.integers(PHOTOGRAPHS_EACH)], rng)
        made.append(camera(forgery(crop_face(photographs[at], rng), donor, rng), rng))
    return np.stack(made)


def make_group(photographs: Photographs, people: Sequence[int], name: str, draws: int, seed: int, label: str) -> Group:
    """One group of the evaluation.

    Args:
        photographs, people, draws, seed, label: as for ``make_real``.
        name: ``in-distribution`` (trained families), ``cross`` (the same, shifted, by another camera)
            or ``unseen`` (forgeries that nothing was trained on).
    """
    elsewhere = name == "cross"
    kinds = UNSEEN if name == "unseen" else TRAINED
    return Group(
        make_real(photographs, people, draws, seed, f"{label} {name}", elsewhere=elsewhere),
        {
            kind: make_forged(photographs, people, kind, draws, seed, f"{label} {name}", elsewhere=elsewhere)
            for kind in kinds
        },
    )


def make_pretraining(photographs: Photographs, people: Sequence[int], draws: int, seed: int) -> PretrainingSet:
    """Real pictures, degraded and turned by quarter turns, labelled with what was done and who it is.

    Nothing here is a forgery: it stands for the generic pretraining that real detectors start from.
    """
    rng = _generator(seed, "pretraining")
    pictures, labels = [], []
    for index, at in _each(people, draws):
        turns, kind = int(rng.integers(4)), int(rng.integers(len(DEGRADATIONS)))
        picture = degrade(DEGRADATIONS[kind], crop_face(photographs[at], rng), rng)
        pictures.append(np.rot90(capture(picture, rng), turns))
        labels.append((turns, kind, index))
    return PretrainingSet(np.stack(pictures), *np.array(labels).T.copy())


def degrade(kind: str, picture: Picture, rng: np.random.Generator) -> Picture:
    """Apply one of ``DEGRADATIONS`` with random strength; (48, 48) float32 in [0, 1] in and out."""
    if kind == "blur":
        return smooth(picture, rng.uniform(0.6, 1.4))
    if kind == "noise":
        return clip(picture + rng.normal(0.0, rng.uniform(0.01, 0.05), picture.shape))
    if kind == "compression":
        return compress(picture, rng.uniform(20.0, 70.0))
    if kind == "half size":
        return np.repeat(np.repeat(halve(picture), 2, axis=0), 2, axis=1)
    if kind == "contrast":
        return clip((picture - 0.5) * rng.uniform(0.4, 0.7) + 0.5)
    return store(picture)
