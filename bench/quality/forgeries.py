"""Three more forgery families that specialists can be trained on, beside the demo's; same form, same rules."""

from __future__ import annotations

import numpy as np
from r2m.demo.forgeries import Forgery
from r2m.demo.resampling import Picture, bilinear, clip, ellipse, grid, mix, smooth, unit


def feature_exchange(picture: Picture, donor: Picture, rng: np.random.Generator) -> Picture:
    """FE, face editing: one feature, eyes or mouth, of another person, in a small soft patch of matched tone."""
    side, one = picture.shape[0], unit(picture)
    eyes = rng.random() < 0.5
    centre = (side * (0.42 if eyes else 0.72) + rng.uniform(-2.0, 2.0) * one, side / 2 + rng.uniform(-2.0, 2.0) * one)
    ranges = ((4.5, 6.5), (11.0, 14.0)) if eyes else ((5.0, 7.0), (8.0, 11.0))
    axes = (rng.uniform(*ranges[0]) * one, rng.uniform(*ranges[1]) * one)
    mask = ellipse(side, centre, axes, rng.uniform(1.5, 3.0) * one)
    rows, columns = grid(side)
    patch = bilinear(donor, rows + rng.uniform(-1.5, 1.5) * one, columns + rng.uniform(-1.5, 1.5) * one)
    inside = mask > 0.5
    toned = patch + rng.uniform(0.6, 0.95) * (picture[inside].mean() - patch[inside].mean())
    return mix(picture, toned, mask)


def noise_and_denoise(picture: Picture, donor: Picture, rng: np.random.Generator) -> Picture:
    """DD, diffusion: noised and denoised three times by a local Wiener filter, so that texture is made up anew."""
    made = picture
    for _ in range(3):
        level = rng.uniform(0.02, 0.035)
        noisy = made + rng.normal(0.0, level, made.shape).astype(np.float32)
        mean = smooth(noisy, 1.2)
        variance = np.maximum(smooth((noisy - mean) ** 2, 1.2) - level**2, 0.0)
        made = mean + variance / (variance + level**2) * (noisy - mean)
    low = smooth(made, 1.0)
    detail, original = made - low, picture - smooth(picture, 1.0)
    return clip(low + detail * (original.std() / max(float(detail.std()), 1e-4)))


def retouching(picture: Picture, donor: Picture, rng: np.random.Generator) -> Picture:
    """RT, retouching: skin smoothed where it is nearly flat, edges kept and local contrast raised, in one ellipse."""
    side, one = picture.shape[0], unit(picture)
    low = smooth(picture, rng.uniform(1.2, 1.8))
    detail = picture - low
    limit = rng.uniform(0.03, 0.05)
    flat = np.exp(-((smooth(np.abs(detail), 1.5) / limit) ** 2))
    changed = low + (1 - 0.9 * flat) * detail * rng.uniform(1.05, 1.2)
    centre = (side / 2 + rng.uniform(-2.0, 2.0) * one, side / 2 + rng.uniform(-2.0, 2.0) * one)
    axes = (rng.uniform(16.0, 20.0) * one, rng.uniform(13.0, 16.0) * one)
    mask = ellipse(side, centre, axes, rng.uniform(3.0, 5.0) * one)
    return mix(picture, changed, mask)


FURTHER_FORGERIES: dict[str, Forgery] = {"FE": feature_exchange, "DD": noise_and_denoise, "RT": retouching}
