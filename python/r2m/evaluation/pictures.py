"""Pictures as a detector sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from r2m.preprocessing import RESAMPLES, Preprocessing
from r2m_kernels.errors import printable

_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's greys of 16 bits
_UNSCALED = ("I", "F")  # its greys of 32, of which nobody says what is white


Change = Callable[[Image.Image], Image.Image]


def read_image(path: Path, preprocessing: Preprocessing, change: Change | None = None) -> Tensor | str:
    """(3, s, s) float32, or why there is none; ``change``: what becomes of the picture before."""
    picture = read_picture(path)
    if isinstance(picture, str):
        return picture
    return prepared(picture if change is None else change(picture), preprocessing)


def read_picture(path: Path) -> Image.Image | str:
    """Upright and in red, green and blue of 8 bits each; or why there is none.

    Transparency is left away, as the libraries do that detectors are trained with; of greys of 16 bits the upper 8 are
    taken, as of colours of 16 bits, where Pillow would cut off what is above 255.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in _UNSCALED:
                return f"not a readable image: grey of 32 bits (mode {upright.mode}), of which white is not known"
            if upright.mode in _WIDE:
                upright = Image.fromarray((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8))
            return upright.convert("RGBA").convert("RGB") if upright.mode == "P" else upright.convert("RGB")
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what its decoders raise
        return f"not a readable image: {printable(str(error))}"


def prepared(picture: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """(3, s, s) float32 of a picture in red, green and blue."""
    resample = Image.Resampling(RESAMPLES.index(preprocessing.resample))
    sides = _sides(picture, preprocessing)
    if sides != picture.size:
        picture = picture.resize(sides, resample)
    size = preprocessing.size
    if picture.size != (size, size):
        left, top = (_corner(side, preprocessing) for side in picture.size)
        whole = Image.new("RGB", (size, size), preprocessing.fill)
        whole.paste(picture, (-left, -top))
        picture = whole
    values = (np.asarray(picture, np.float64) * preprocessing.rescale).astype(np.float32)
    normal = (values - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)
    return torch.from_numpy(normal.transpose(2, 0, 1).copy())


def _sides(picture: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height that it is resized to."""
    scale, (width, height) = preprocessing.scale, picture.size
    if preprocessing.resize == "none":
        return picture.size
    if preprocessing.resize == "squash":
        return scale, scale
    if preprocessing.resize == "longest":  # as timm and open_clip round, which alone have it
        ratio = max(width / scale, height / scale)
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    return (scale, int(scale * height / width)) if width <= height else (int(scale * width / height), scale)


def _corner(side: int, preprocessing: Preprocessing) -> int:
    """Where the cut begins; before the picture where there is to be filled."""
    size = preprocessing.size
    if preprocessing.corner == "down":
        return (side - size) // 2
    return round((side - size) / 2) if side >= size else -((size - side) // 2)
