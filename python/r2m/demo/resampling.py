"""Pixels by interpolation, soft masks and smoothing: what the crops and the forgeries are made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.float32]
"""A grey picture: (rows, columns) float32 in [0, 1], 48 by 48 unless said otherwise, always so in the demo."""

STATED = 48  # the width in pixels that lengths of forgeries are stated for

Coordinates = npt.NDArray[np.floating]


def bilinear(picture: Picture, rows: Coordinates, columns: Coordinates) -> Picture:
    """Read (m, n) at points of any shape, in pixels, between the four nearest; outside, at the nearest edge pixel."""
    height, width = picture.shape
    rows = np.clip(rows, 0.0, height - 1.0).astype(np.float32)
    columns = np.clip(columns, 0.0, width - 1.0).astype(np.float32)
    top = np.minimum(rows.astype(np.intp), height - 2)
    left = np.minimum(columns.astype(np.intp), width - 2)
    down, right = rows - top.astype(np.float32), columns - left.astype(np.float32)
    # Reads through flat indices: faster than indexing with two arrays, and crops are most of the work.
    pixels, corner = picture.ravel(), top * width + left
    upper_left, upper_right = pixels.take(corner), pixels.take(corner + 1)
    lower_left, lower_right = pixels.take(corner + width), pixels.take(corner + width + 1)
    upper = upper_left + (upper_right - upper_left) * right
    lower = lower_left + (lower_right - lower_left) * right
    return np.asarray(upper + (lower - upper) * down, dtype=np.float32)


def unit(picture: Picture) -> float:
    """How long one pixel of a picture 48 pixels wide is in this one."""
    return float(picture.shape[0] / STATED)


def grid(size: int) -> tuple[Coordinates, Coordinates]:
    """Row and column of every pixel of a square picture: two (size, size) float64 arrays."""
    rows, columns = np.meshgrid(np.arange(float(size)), np.arange(float(size)), indexing="ij")
    return rows, columns


def ellipse(
    size: int, centre: tuple[float, float], semi_axes: tuple[float, float], edge: float, angle: float = 0.0
) -> Picture:
    """Mask that is 1 inside an ellipse and falls linearly to 0 over about ``edge`` pixels at its border.

    ``centre`` and ``semi_axes`` are vertical and horizontal, in pixels; ``angle`` in radians; (size, size) float32.
    """
    rows, columns = grid(size)
    down, right = rows - centre[0], columns - centre[1]
    along = np.cos(angle) * down + np.sin(angle) * right
    across = np.cos(angle) * right - np.sin(angle) * down
    radius = np.hypot(along / semi_axes[0], across / semi_axes[1])
    # Distance to the border in pixels, exact on circles and near enough on ellipses that are nearly round.
    distance = (1.0 - radius) * min(semi_axes)
    return clip(0.5 + distance / edge)


def mix(picture: Picture, other: Picture, share: float | Picture) -> Picture:
    """``share`` of the other picture, everywhere or by pixel, in [0, 1]; the rest of the first."""
    return clip(picture * (1 - share) + other * share)


def smooth(picture: Picture, sigma: float) -> Picture:
    """Gaussian blur with standard deviation ``sigma`` pixels; same shape and dtype."""
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(picture, sigma, mode="nearest", output=np.float32))


def halve(picture: Picture) -> Picture:
    """Mean of each 2 by 2 cell: (2m, 2n) to (m, n) float32."""
    height, width = picture.shape
    return np.asarray(picture.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3), dtype=np.float32))


def clip(picture: npt.NDArray[np.floating]) -> Picture:
    """Limit values to [0, 1] and return float32."""
    return np.asarray(np.clip(picture, 0.0, 1.0), dtype=np.float32)
