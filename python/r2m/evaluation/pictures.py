"""Pictures as a detector sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from r2m.preprocessing import Preprocessing
from r2m_kernels.errors import printable

Change = Callable[[Image.Image], Image.Image]


def read_image(path: Path, preprocessing: Preprocessing, change: Change | None = None) -> Tensor | str:
    """(3, s, s) float32, or why there is none; ``change``: what becomes of the picture before."""
    picture = read_picture(path)
    if isinstance(picture, str):
        return picture
    return prepared(picture if change is None else change(picture), preprocessing)


def read_picture(path: Path) -> Image.Image | str:
    """In red, green and blue, or why there is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what its decoders raise
        return f"not a readable image: {printable(str(error))}"


def prepared(picture: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """(3, s, s) float32 of a picture in red, green and blue."""
    side = (preprocessing.size, preprocessing.size)
    pixels = np.asarray(picture.resize(side, Image.Resampling.BICUBIC), np.float32) / 255
    normal = (pixels - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)
    return torch.from_numpy(normal.transpose(2, 0, 1).copy())
