"""Forgeries made by code: three families to train on and six that no detector sees in training.

Each is a pure function ``(picture, donor, rng) -> picture`` on square float32 pictures in [0, 1], 48 pixels wide in the
demo; all randomness comes from ``rng``. ``donor`` is another person's face. They stop before the camera:
``camera.capture`` is applied afterwards to real and forged pictures alike.

Lengths on the face are given for 48 pixels and grow with the picture (``unit``). What a method does to pixels does not:
grids, blur and noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import Generator
from torch.nn.functional import conv_transpose2d

from r2m.demo.camera import compress
from r2m.demo.resampling import Picture, bilinear, clip, ellipse, grid, halve, mix, smooth, unit
from r2m_kernels.errors import BadOption

Forgery = Callable[[Picture, Picture, Generator], Picture]
Range = tuple[float, float]


def forge(kind: str, picture: Picture, donor: Picture, rng: Generator, *, shifted: bool = False) -> Picture:
    """Forge one picture by a kind in ``TRAINED`` or ``UNSEEN``; all are square float32 in [0, 1], none is modified.

    ``shifted`` takes the cross group's parameters, which only the trained families have.

    Raises:
        BadOption: no forgery of that name, or no shifted form of it.
    """
    table = _SHIFTED if shifted else {**_TRAINED, **_UNSEEN}
    if kind not in table:
        what = "shifted forgery" if shifted else "forgery"
        raise BadOption(f"no {what} named {kind!r}; there are {', '.join(table)}")
    return clip(table[kind](picture, donor, rng))


def _swap(picture: Picture, donor: Picture, rng: Generator, *, size: Range, edge: Range, corrected: Range) -> Picture:
    """FS, face swap: an ellipse of another face, turned and scaled, its tone partly corrected, its edge blended."""
    side, one = picture.shape[0], unit(picture)
    middle = (side - 1) / 2
    angle, scale = rng.uniform(-0.12, 0.12), rng.uniform(0.92, 1.08)
    rows, columns = grid(side)
    down, right = (rows - middle) * scale, (columns - middle) * scale
    face = bilinear(
        donor,
        middle + np.cos(angle) * down - np.sin(angle) * right + rng.uniform(-1.5, 1.5) * one,
        middle + np.sin(angle) * down + np.cos(angle) * right + rng.uniform(-1.5, 1.5) * one,
    )
    factor = rng.uniform(*size)
    mask = ellipse(
        side,
        (middle + rng.uniform(-1.5, 1.5) * one, middle + rng.uniform(-1.5, 1.5) * one),
        (17.0 * factor * one, 13.0 * factor * one),
        rng.uniform(*edge) * one,
        rng.uniform(-0.15, 0.15),
    )
    replaced, inside, share = picture[mask > 0.5], face[mask > 0.5], rng.uniform(*corrected)
    mean = inside.mean()
    gain = 1 + share * (replaced.std() / max(inside.std(), 1e-3) - 1)
    toned = (face - mean) * gain + mean + share * (replaced.mean() - mean)
    return mix(picture, toned, mask)


def _warp(picture: Picture, donor: Picture, rng: Generator, *, bumps: int, push: Range, width: Range) -> Picture:
    """FR, face reenactment: a smooth local warp: Gaussian bumps push the features of the face by some pixels each."""
    side, one = picture.shape[0], unit(picture)
    rows, columns = grid(side)
    down, right = np.zeros_like(rows), np.zeros_like(rows)
    for _ in range(bumps):
        row, column = rng.uniform(0.25 * side, 0.8 * side), rng.uniform(0.25 * side, 0.75 * side)
        direction, length, sigma = rng.uniform(0, 2 * np.pi), rng.uniform(*push) * one, rng.uniform(*width) * one
        bump = length * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * sigma**2))
        down += np.sin(direction) * bump
        right += np.cos(direction) * bump
    return bilinear(picture, rows + down, columns + right)


def _synthesise(picture: Picture, donor: Picture, rng: Generator, *, unevenness: Range, kept: Range) -> Picture:
    """EFS, entire face synthesis: rebuilt by a random transposed convolution, with the faint grid of generators."""
    # A 4 by 4 kernel with stride 2 gives each of the four output phases its own 2 by 2 kernel: even ones
    # interpolate, uneven ones leave a pattern of period 2. Part of the fine detail passes by, as through a
    # skip connection.
    line = np.array([0.25, 0.75, 0.75, 0.25])
    even = np.outer(line, line)
    small = halve(picture)
    made = _transposed_convolution(small, even)
    made += np.float32(rng.uniform(*kept)) * (picture - made)
    # Sharpened to the detail of the original, so that blur gives little away.
    low = smooth(made, 1.0)
    detail, original = made - low, picture - smooth(picture, 1.0)
    sharp = low + detail * (original.std() / max(detail.std(), 1e-4))
    uneven = even * rng.uniform(*unevenness) * rng.normal(size=(4, 4))
    return clip(sharp + _transposed_convolution(small, uneven))


def _transposed_convolution(small: Picture, kernel: npt.NDArray[np.floating]) -> Picture:
    """Stride 2, 4 by 4 kernel: (n, n) to (2n, 2n) float32, edges repeated."""
    padded = torch.from_numpy(np.pad(small, 1, mode="edge")).double()
    made = conv_transpose2d(padded[None, None], torch.from_numpy(kernel)[None, None], stride=2, padding=3)
    return made[0, 0].float().numpy()


def compression_splice(picture: Picture, donor: Picture, rng: Generator) -> Picture:
    """An ellipse that was compressed coarsely, on a grid of its own, before it was pasted back."""
    offset = rng.integers(0, 8, 2)
    coarse = compress(np.roll(picture, offset, axis=(0, 1)), rng.uniform(25.0, 50.0))
    return _blend(picture, np.roll(coarse, -offset, axis=(0, 1)), rng)


def nearest_grid(picture: Picture, donor: Picture, rng: Generator) -> Picture:
    """An ellipse that was enlarged by 1.3 to 1.7 with the nearest pixel: a grid of doubled pixels."""
    side = picture.shape[0]
    scale, shift = rng.uniform(1.3, 1.7), rng.uniform(0, 1, 2)
    middle = (side - 1) / 2
    rows, columns = grid(side)

    def snap(places: npt.NDArray[np.floating], start: float) -> npt.NDArray[np.floating]:
        return np.asarray((np.round((places - middle) / scale + start) - start) * scale + middle)

    return _blend(picture, bilinear(picture, snap(rows, shift[0]), snap(columns, shift[1])), rng)


def median_inpainting(picture: Picture, donor: Picture, rng: Generator) -> Picture:
    """An ellipse filled with the 3 by 3 median of its surroundings: a smeared patch."""
    from scipy.ndimage import median_filter

    filled = np.asarray(median_filter(picture, size=3, mode="nearest"), dtype=np.float32)
    return _blend(picture, filled, rng)


def wavelet_denoising(picture: Picture, donor: Picture, rng: Generator) -> Picture:
    """Small Haar wavelet coefficients set to zero everywhere: the flat 2 by 2 cells of a denoiser."""
    a, b, c, d = picture[::2, ::2], picture[::2, 1::2], picture[1::2, ::2], picture[1::2, 1::2]
    mean = (a + b + c + d) / 4
    limit = rng.uniform(0.015, 0.03)
    bands = [(a + b - c - d) / 4, (a - b + c - d) / 4, (a - b - c + d) / 4]
    vertical, horizontal, diagonal = (np.where(np.abs(band) > limit, band, 0.0) for band in bands)
    made = np.empty_like(picture)
    made[::2, ::2] = mean + vertical + horizontal + diagonal
    made[::2, 1::2] = mean + vertical - horizontal - diagonal
    made[1::2, ::2] = mean - vertical + horizontal - diagonal
    made[1::2, 1::2] = mean - vertical - horizontal + diagonal
    return clip(made)


def phase_noise(picture: Picture, donor: Picture, rng: Generator) -> Picture:
    """Phases of the middle and high frequencies disturbed: the spectrum's magnitudes stay as they were."""
    spectrum = np.fft.rfft2(picture)
    frequency = np.hypot(np.fft.fftfreq(picture.shape[0])[:, None], np.fft.rfftfreq(picture.shape[1])[None, :])
    strength = rng.uniform(0.5, 0.9) * np.clip((frequency - 0.08) / 0.1, 0.0, 1.0)
    disturbed = spectrum * np.exp(1j * strength * rng.normal(size=spectrum.shape))
    return clip(np.fft.irfft2(disturbed, s=picture.shape))


def morph(picture: Picture, donor: Picture, rng: Generator) -> Picture:
    """The average of two people, 35 to 65 % each."""
    return mix(picture, donor, rng.uniform(0.35, 0.65))


def _blend(picture: Picture, changed: Picture, rng: Generator) -> Picture:
    """Put an ellipse of ``changed``, about a third of the picture, into ``picture`` with a soft edge."""
    side, one = picture.shape[0], unit(picture)
    centre = (side / 2 + rng.uniform(-4.0, 4.0) * one, side / 2 + rng.uniform(-4.0, 4.0) * one)
    axes = (rng.uniform(13.0, 18.0) * one, rng.uniform(11.0, 15.0) * one)
    mask = ellipse(side, centre, axes, rng.uniform(1.0, 2.5) * one)
    return mix(picture, changed, mask)


_TRAINED: dict[str, Forgery] = {
    "FS": partial(_swap, size=(0.85, 1.1), edge=(2.0, 4.0), corrected=(0.6, 0.95)),
    "FR": partial(_warp, bumps=4, push=(1.5, 3.2), width=(5.0, 9.0)),
    "EFS": partial(_synthesise, unevenness=(0.004, 0.016), kept=(0.4, 0.8)),
}
_SHIFTED: dict[str, Forgery] = {
    "FS": partial(_swap, size=(0.65, 0.85), edge=(1.5, 3.0), corrected=(0.7, 1.0)),
    "FR": partial(_warp, bumps=6, push=(1.0, 2.4), width=(4.0, 7.0)),
    "EFS": partial(_synthesise, unevenness=(0.006, 0.014), kept=(0.3, 0.6)),
}
_UNSEEN: dict[str, Forgery] = {
    "compression splice": compression_splice,
    "nearest-pixel grid": nearest_grid,
    "median inpainting": median_inpainting,
    "wavelet denoising": wavelet_denoising,
    "phase noise": phase_noise,
    "morph": morph,
}
TRAINED = tuple(_TRAINED)
UNSEEN = tuple(_UNSEEN)
