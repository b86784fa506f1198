"""What happens to every picture after it was made, real or fake: noise, compression, 8-bit storage.

A detector must not be able to tell fakes by how the file was written. So the last steps are the same for
real photographs and forgeries, drawn from the same distributions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from r2m.demo.resampling import Picture, clip

# Luminance quantisation of the JPEG standard (ITU-T T.81, table K.1).
_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=np.float64,
)


def compress(picture: Picture, quality: float) -> Picture:
    """What JPEG does to a grey picture: each 8 by 8 block's cosine coefficients rounded to multiples.

    Args:
        picture: (m, n) float32 in [0, 1], m and n multiples of 8; so is the result.
        quality: 1 (coarse) to 99 (fine), on the scale of the Independent JPEG Group.
    """
    from scipy.fft import dctn, idctn

    percent = 5000.0 / quality if quality < 50 else 200.0 - 2.0 * quality
    steps = np.clip(np.floor((_LUMINANCE * percent + 50) / 100), 1, 255)
    height, width = picture.shape
    blocks = (picture.astype(np.float64) * 255 - 128).reshape(height // 8, 8, width // 8, 8)
    steps = steps[:, None, :]
    coefficients = np.round(dctn(blocks, axes=(1, 3), norm="ortho") / steps) * steps
    restored = idctn(coefficients, axes=(1, 3), norm="ortho").reshape(height, width)
    return clip((restored + 128) / 255)


def capture(picture: Picture, rng: np.random.Generator) -> Picture:
    """The demo's usual camera: gain within 5 %, noise of 0.5 to 1.5 grey levels, 8 bits; any shape, in [0, 1]."""
    gain = rng.uniform(0.95, 1.05)
    noise = rng.normal(0.0, rng.uniform(0.5, 1.5) / 255, picture.shape)
    return store(picture * gain + noise)


def capture_elsewhere(picture: Picture, rng: np.random.Generator) -> Picture:
    """Another camera, for the cross group: gamma, contrast, more noise, JPEG of quality 75 to 92, 8 bits."""
    gamma = np.exp(rng.uniform(-0.35, 0.35))
    contrast = rng.uniform(0.75, 1.1)
    toned = (np.power(picture, gamma) - 0.5) * contrast + 0.5 + rng.uniform(-0.05, 0.05)
    noisy = clip(toned + rng.normal(0.0, rng.uniform(1.0, 2.5) / 255, picture.shape))
    return store(compress(noisy, rng.uniform(75.0, 92.0)))


def store(picture: npt.NDArray[np.floating]) -> Picture:
    """Round to the 256 values of an 8-bit file: float32 multiples of 1/255 in [0, 1]."""
    return np.asarray(np.round(clip(picture) * np.float32(255)) / np.float32(255), dtype=np.float32)
