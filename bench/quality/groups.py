"""Pictures that judge: a validation group that choices may see, and test groups that they may not."""

from __future__ import annotations

import functools
import importlib.util
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from r2m.demo.camera import capture
from r2m.demo.faces import SIZE, read_photographs, split_people
from r2m.demo.forgeries import TRAINED, forge
from r2m.demo.resampling import Picture, bilinear, smooth
from r2m.demo.samples import Group, make_forged, make_group, make_real

from bench.quality import settings
from bench.quality.forgeries import FURTHER_FORGERIES
from bench.quality.models import Run

GROUPS = ("in-distribution", "cross", "unseen", "natural")
# Photographs without a face that wheels carry: of scikit-image, and of scikit-learn.
NATURAL = ("brick", "chelsea", "coffee", "coins", "grass", "gravel", "moon", "motorcycle_left", "rocket")
NATURAL_ELSEWHERE = ("china", "flower")
CROPS = 16  # of each


def validation_group(run: Run, kinds: Sequence[str] = TRAINED) -> Group:
    """The specialists' families on the validation people: all that a choice may look at."""
    return _group(run, split_people(run.seed).validation, kinds, _draws(run, settings.VALIDATION_DRAWS), "validation")


def groups_of(run: Run, names: Sequence[str] = GROUPS) -> dict[str, Group]:
    """Groups of the table, on the test people and on no people: all four, or some."""
    people, draws = split_people(run.seed).test, _draws(run, settings.TEST_DRAWS)

    def group(name: str) -> Group:
        if name == "natural":
            return _natural(run.seed)
        return make_group(_photographs(), people, name, draws, run.seed, "test")

    return {name: group(name) for name in names}


def all_families(run: Run) -> Group:
    """All six families on the test people, for merges of more than three specialists."""
    return _group(
        run, split_people(run.seed).test, settings.MAIN + settings.FURTHER, _draws(run, settings.TEST_DRAWS), "test"
    )


def _draws(run: Run, full: int) -> int:
    return 1 if run.quick else full


def _group(run: Run, people: Sequence[int], kinds: Sequence[str], draws: int, label: str) -> Group:
    where = (_photographs(), people)
    named = f"{label} in-distribution"
    forged = {
        kind: make_forged(*where, kind, draws, run.seed, named, forgery=FURTHER_FORGERIES.get(kind)) for kind in kinds
    }
    return Group(make_real(*where, draws, run.seed, named), forged)


@functools.cache
def _photographs() -> np.ndarray:
    return read_photographs()


def _natural(seed: int) -> Group:
    pictures = natural_photographs()

    def stream(label: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(f"natural/{label}".encode())])

    def make(label: str, change: Callable[[Picture, Picture, np.random.Generator], Picture]) -> Picture:
        rng = stream(label)
        made = []
        for index, picture in enumerate(pictures):
            for _ in range(CROPS):
                other = pictures[(index + int(rng.integers(1, len(pictures)))) % len(pictures)]
                donor = crop(other, rng)
                made.append(capture(change(crop(picture, rng), donor, rng), rng))
        return np.stack(made)

    def forged(kind: str) -> Callable[[Picture, Picture, np.random.Generator], Picture]:
        return lambda picture, donor, rng: forge(kind, picture, donor, rng)

    return Group(
        make("real", lambda picture, donor, rng: picture), {kind: make(kind, forged(kind)) for kind in TRAINED}
    )


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
