"""What becomes of pictures on their way: compressed, scaled, blurred, noisy. Each is one entry of DEGRADATIONS.

They are applied to the picture as it is stored, before the detector's preprocessing, and are the same for all models.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter

Degradation = Callable[[Image.Image, np.random.Generator], Image.Image]


def _jpeg(quality: int) -> Degradation:
    def degrade(image: Image.Image, _: np.random.Generator) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return degrade


def _smaller(share: float) -> Degradation:
    def degrade(image: Image.Image, _: np.random.Generator) -> Image.Image:
        width, height = (max(round(share * side), 1) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    return degrade


def _blurred(deviation: float) -> Degradation:
    return lambda image, _: image.filter(ImageFilter.GaussianBlur(deviation))


def _noisy(deviation: float) -> Degradation:
    def degrade(image: Image.Image, dice: np.random.Generator) -> Image.Image:
        pixels = np.asarray(image, np.float32)
        noise = dice.standard_normal(pixels.shape, np.float32) * deviation
        return Image.fromarray(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8))

    return degrade


DEGRADATIONS: Mapping[str, Degradation] = {
    **{f"jpeg-{quality}": _jpeg(quality) for quality in (90, 70, 50, 30)},
    **{f"resize-{share}": _smaller(share) for share in (0.5, 0.25)},
    **{f"blur-{deviation}": _blurred(deviation) for deviation in (1, 2)},
    **{f"noise-{deviation}": _noisy(deviation) for deviation in (5, 10)},
}


def degraded(image: Image.Image, name: str, seed: int) -> Image.Image:
    """A picture after one of DEGRADATIONS; noise is a function of the seed and of what is in the picture.

    Args:
        image: in RGB.
        name: of the degradation.
        seed: of the noise.
    """
    dice = np.random.default_rng([seed & (2**64 - 1), zlib.crc32(image.tobytes())])
    return DEGRADATIONS[name](image, dice)
