"""Pictures that judge: a validation group that choices may see, and test groups that they may not."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from r2m.demo.camera import capture
from r2m.demo.faces import SIZE, read_photographs, split_people
from r2m.demo.forgeries import TRAINED, forge
from r2m.demo.forgeries import UNSEEN as UNSEEN_BY_CODE
from r2m.demo.resampling import Picture, bilinear, smooth
from r2m.demo.samples import Group, make_group, make_pictures, stream

from bench.quality import settings, super_resolution
from bench.quality.forgeries import FURTHER_FORGERIES
from bench.quality.models import Run

GROUPS = {
    "scratch": ("in-distribution", "cross", "unseen", "natural"),
    "pretrained": ("in-distribution", "code", "neural"),
}
"""Regime → its groups. ``code``: forgeries by code, ``neural``: by networks, that nothing was trained on."""
UNSEEN = {"scratch": "unseen", "pretrained": "code"}
# Photographs without a face that wheels carry: of scikit-image, and of scikit-learn.
NATURAL = ("brick", "chelsea", "coffee", "coins", "grass", "gravel", "moon", "motorcycle_left", "rocket")
NATURAL_ELSEWHERE = ("china", "flower")
CROPS = 16  # of each


def validation_group(run: Run) -> Group:
    """The specialists' families on the validation people: all that a choice may look at."""
    return _group(run, split_people(run.seed).validation, TRAINED, run.setting.validation, "validation")


def groups_of(run: Run, names: Sequence[str] | None = None) -> dict[str, Group]:
    """Groups of the table, on the test people and on no people: all of the run's regime, or some.

    In the pretrained regime all have the same real pictures, in one array.
    """
    names = GROUPS[run.regime] if names is None else names
    people, test = split_people(run.seed).test, run.setting.test
    real = _pictures(run, people, "real", test.real, "test") if run.regime == "pretrained" else None

    def group(name: str) -> Group:
        if name == "natural":
            return _natural(run.seed)
        if real is None:
            return make_group(_photographs(), people, name, test.real, run.seed, "test")
        if name == "neural":
            make = functools.partial(super_resolution.make_pictures, _photographs(), people)
            drawn = (run.setting.unseen, run.seed, run.setting.size)
            return Group(real, {kind: make(kind, *drawn) for kind in super_resolution.NETWORKS})
        kinds, draws = (TRAINED, test.forged) if name == "in-distribution" else (UNSEEN_BY_CODE, run.setting.unseen)
        return Group(real, {kind: _pictures(run, people, kind, draws, "test") for kind in kinds})

    return {name: group(name) for name in names}


def all_families(run: Run) -> Group:
    """All six families on the test people, for merges of more than three specialists."""
    return _group(run, split_people(run.seed).test, settings.MAIN + settings.FURTHER, run.setting.test, "test")


def _group(run: Run, people: Sequence[int], kinds: Sequence[str], draws: settings.Draws, label: str) -> Group:
    real = _pictures(run, people, "real", draws.real, label)
    return Group(real, {kind: _pictures(run, people, kind, draws.forged, label) for kind in kinds})


def _pictures(run: Run, people: Sequence[int], kind: str, draws: int, label: str) -> Picture:
    named, forgery = f"{label} in-distribution", FURTHER_FORGERIES.get(kind)
    return make_pictures(_photographs(), people, kind, draws, run.seed, named, forgery=forgery, size=run.setting.size)


@functools.cache
def _photographs() -> np.ndarray:
    return read_photographs()


def _natural(seed: int) -> Group:
    pictures = natural_photographs()

    def make(kind: str) -> Picture:
        rng = stream(seed, f"natural/{kind}")
        made = []
        for (index, picture), _ in itertools.product(enumerate(pictures), range(CROPS)):
            donor = crop(pictures[(index + int(rng.integers(1, len(pictures)))) % len(pictures)], rng)
            cropped = crop(picture, rng)
            made.append(capture(cropped if kind == "real" else forge(kind, cropped, donor, rng), rng))
        return np.stack(made)

    return Group(make("real"), {kind: make(kind) for kind in TRAINED})


@functools.cache
def natural_photographs() -> tuple[Picture, ...]:
    """Grey photographs of things, softened as the faces are: float32 in [0, 1] of several sizes."""
    from skimage.color import rgb2gray
    from skimage.io import imread

    paths = [_find("skimage", f"data/{name}.*") for name in NATURAL]
    paths += [_find("sklearn", f"datasets/images/{name}.jpg") for name in NATURAL_ELSEWHERE]
    made = []
    for path in paths:
        pixels = imread(path)
        grey = rgb2gray(pixels[..., :3]) if pixels.ndim == 3 else pixels / 255.0
        made.append(smooth(grey.astype(np.float32), 0.6))
    return tuple(made)


def _find(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob(pattern)
    return path


def crop(picture: Picture, rng: np.random.Generator) -> Picture:
    """A random square of 80 to 90 pixels resampled to 48 × 48, as from the faces' photographs; half are mirrored."""
    height, width = picture.shape
    side = rng.uniform(80.0, 90.0)
    row, column = rng.uniform(0, height - side), rng.uniform(0, width - side)
    places = np.arange(SIZE) * (side / SIZE)
    rows, columns = np.meshgrid(row + places, column + places, indexing="ij")
    made = bilinear(picture, rows, columns)
    return made[:, ::-1].copy() if rng.random() < 0.5 else made
