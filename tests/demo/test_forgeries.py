"""Forgeries: pure, seeded, and doing what their name says."""

from __future__ import annotations

import numpy as np
import pytest
from r2m.demo.camera import capture, capture_elsewhere, compress
from r2m.demo.forgeries import TRAINED, UNSEEN, forge
from r2m.demo.resampling import bilinear, ellipse, grid, halve, smooth

from r2m_kernels.errors import BadOption

FORMS = [
    *((kind, False) for kind in TRAINED),
    *((kind, True) for kind in TRAINED),
    *((kind, False) for kind in UNSEEN),
]


def face(seed):
    """Smooth noise with some detail, inside (0, 1): no photograph is needed here."""
    noise = np.random.default_rng(seed).normal(size=(48, 48)).astype(np.float32)
    return (0.5 + 0.6 * smooth(noise, 2.0) + 0.02 * noise).clip(0.05, 0.95).astype(np.float32)


@pytest.mark.parametrize(("kind", "shifted"), FORMS)
def test_same_seed_same_forgery_and_other_seed_another(kind, shifted):
    def made(seed):
        return forge(kind, face(1), face(2), np.random.default_rng(seed), shifted=shifted)

    assert np.array_equal(made(3), made(3))
    assert not np.array_equal(made(3), made(4))


@pytest.mark.parametrize(("kind", "shifted"), FORMS)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_shape_dtype_and_range_are_kept(kind, shifted, level):
    # Black and white too, where overshoots must be clipped, and flat, where a spread is zero.
    for picture in (np.full((48, 48), level, np.float32), np.clip(face(1) * 3 - level, 0, 1)):
        made = forge(kind, picture, face(2), np.random.default_rng(0), shifted=shifted)
        assert made.shape == (48, 48)
        assert made.dtype == np.float32
        assert made.min() >= 0
        assert made.max() <= 1


@pytest.mark.parametrize(("kind", "shifted"), FORMS)
def test_the_picture_is_changed_and_the_arguments_are_not(kind, shifted):
    picture, donor = face(1), face(2)
    made = forge(kind, picture, donor, np.random.default_rng(0), shifted=shifted)
    assert np.abs(made - picture).mean() > 0.5 / 255  # more than storing in 8 bits does on average
    assert np.array_equal(picture, face(1))
    assert np.array_equal(donor, face(2))


@pytest.mark.parametrize("kind", TRAINED)
def test_cross_parameters_are_others(kind):
    usual, shifted = (
        forge(kind, face(1), face(2), np.random.default_rng(0), shifted=shifted) for shifted in (False, True)
    )
    assert not np.array_equal(usual, shifted)


def test_face_swap_puts_the_donor_inside_and_leaves_the_rest():
    picture, donor = face(1), face(2)
    made = forge("FS", picture, donor, np.random.default_rng(0))
    assert np.array_equal(made[:4], picture[:4])
    middle = np.s_[18:30, 18:30]
    moved = [np.roll(donor, (i, j), (0, 1))[middle] for i in range(-4, 5) for j in range(-4, 5)]
    likeness = max(np.corrcoef(made[middle].ravel(), part.ravel())[0, 1] for part in moved)
    assert likeness > 0.9
    assert np.corrcoef(made[middle].ravel(), picture[middle].ravel())[0, 1] < 0.7


def test_reenactment_moves_points_by_a_few_pixels():
    rows, _ = grid(48)
    ramp = (rows / 47).astype(np.float32)  # the value is the row, so a change is a shift
    shifts = np.abs(forge("FR", ramp, ramp, np.random.default_rng(0)) - ramp) * 47
    assert 0.5 < shifts.max() < 4 * 3.2


def test_synthesis_leaves_a_pattern_of_period_two():
    picture = np.full((48, 48), 0.5, dtype=np.float32)
    made = forge("EFS", picture, picture, np.random.default_rng(0))
    repeated = np.tile(made[:2, :2], (24, 24))
    assert made == pytest.approx(repeated, abs=1e-6)
    assert 1 / 255 < np.ptp(made) < 0.1  # faint, and not lost in 8 bits


def test_phase_noise_keeps_the_spectrum_and_wavelets_flatten_cells():
    picture = 0.3 + 0.4 * face(1)  # away from black and white, where clipping would change the spectrum
    noisy = forge("phase noise", picture, picture, np.random.default_rng(0))
    assert np.abs(np.fft.rfft2(noisy)).sum() == pytest.approx(np.abs(np.fft.rfft2(picture)).sum(), rel=0.05)
    flat = forge("wavelet denoising", picture, picture, np.random.default_rng(0))
    assert (np.abs(np.diff(flat, axis=1)[:, ::2]) < 1e-6).mean() > 0.3
    assert (np.abs(np.diff(picture, axis=1)[:, ::2]) < 1e-6).mean() < 0.05


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(BadOption, match=r"no forgery named 'XX'; there are FS, FR, EFS, compression splice"):
        forge("XX", face(1), face(2), np.random.default_rng(0))
    with pytest.raises(BadOption, match=r"no shifted forgery named 'morph'; there are FS, FR, EFS$"):
        forge("morph", face(1), face(2), np.random.default_rng(0), shifted=True)


@pytest.mark.parametrize("camera", [capture, capture_elsewhere])
def test_cameras_store_eight_bits(camera):
    shot = camera(face(1), np.random.default_rng(0))
    assert shot.dtype == np.float32
    assert np.abs(shot * 255 - np.round(shot * 255)).max() < 1e-4
    assert shot.min() >= 0
    assert shot.max() <= 1
    assert not np.array_equal(shot, camera(face(1), np.random.default_rng(1)))


def test_compression_loses_more_at_lower_quality():
    errors = [np.abs(compress(face(1), quality) - face(1)).mean() for quality in (99, 75, 40, 10)]
    assert errors == sorted(errors)
    assert errors[0] < 1 / 255 < errors[-1]


def test_bilinear_reads_pixels_between_pixels_and_beyond_the_edge():
    picture = face(1)
    rows, columns = grid(48)
    assert np.array_equal(bilinear(picture, rows, columns), picture)
    between = bilinear(picture, np.array([3.25]), np.array([7.0]))
    assert between == pytest.approx(0.75 * picture[3, 7] + 0.25 * picture[4, 7], abs=1e-6)
    beyond = bilinear(picture, np.array([-5.0, 99.0]), np.array([0.0, 47.0]))
    assert np.array_equal(beyond, picture[[0, 47], [0, 47]])


def test_ellipse_is_full_inside_and_empty_outside():
    mask = ellipse(48, (20.0, 24.0), (12.0, 8.0), 2.0)
    assert mask[20, 24] == 1
    assert mask[20 + 10, 24] == 1
    assert mask[20, 24 + 10] == 0
    assert mask[20, 24 + 8] == pytest.approx(0.5)
    assert 0.9 < mask.sum() / (np.pi * 12 * 8) < 1.1


def test_halve_is_the_mean_of_cells():
    assert np.array_equal(halve(np.arange(16, dtype=np.float32).reshape(4, 4)), [[2.5, 4.5], [10.5, 12.5]])
