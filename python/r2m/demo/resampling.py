"""Pixels by interpolation, soft masks and smoothing: what the crops and the forgeries are made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.float32]
"""A grey picture: (rows, columns) float32 in [0, 1], 48 by 48 unless said otherwise."""

Coordinates = npt.NDArray[np.floating]


def bilinear(picture: Picture, rows: Coordinates, columns: Coordinates) -> Picture:
    """Interpolate between the four nearest pixels; points outside take the nearest edge pixel.

    Args:
        picture: (m, n) float32.
        rows, columns: points to read, in pixels, of one shape.

    Returns:
        float32 of the shape of ``rows``.
    """
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


def grid(size: int) -> tuple[Coordinates, Coordinates]:
    """Row and column of every pixel of a square picture: two (size, size) float64 arrays."""
    rows, columns = np.meshgrid(np.arange(float(size)), np.arange(float(size)), indexing="ij")
    return rows, columns


def ellipse(
    size: int, centre: tuple[float, float], semi_axes: tuple[float, float], edge: float, angle: float = 0.0
) -> Picture:
    """Mask that is 1 inside an ellipse and falls linearly to 0 over about ``edge`` pixels at its border.

    Args:
        size: side of the mask.
        centre: row and column, in pixels.
        semi_axes: vertical and horizontal, in pixels.
        edge: width of the border, in pixels, > 0.
        angle: turn in radians.

    Returns:
        (size, size) float32 in [0, 1].
    """
    rows, columns = grid(size)
    down, right = rows - centre[0], columns - centre[1]
    along = np.cos(angle) * down + np.sin(angle) * right
    across = np.cos(angle) * right - np.sin(angle) * down
    radius = np.hypot(along / semi_axes[0], across / semi_axes[1])
    # Distance to the border in pixels, exact on circles and near enough on ellipses that are nearly round.
    distance = (1.0 - radius) * min(semi_axes)
    return clip(0.5 + distance / edge)


def smooth(picture: Picture, sigma: float) -> Picture:
    """Gaussian blur with standard deviation ``sigma`` pixels; same shape and dtype."""
    from scipy.ndimage import gaussian_filter

    made: Picture = gaussian_filter(picture, sigma, mode="nearest", output=np.float32)
    return made


def halve(picture: Picture) -> Picture:
    """Mean of each 2 by 2 cell: (2m, 2n) to (m, n) float32."""
    height, width = picture.shape
    made: Picture = picture.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3), dtype=np.float32)
    return made


def clip(picture: npt.NDArray[np.floating]) -> Picture:
    """Limit values to [0, 1] and return float32."""
    made: Picture = np.clip(picture, 0.0, 1.0).astype(np.float32)
    return made
