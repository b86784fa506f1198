"""Sets of pictures: independent streams, real and forged handled alike, each person in one part only."""

from __future__ import annotations

import numpy as np
import pytest
from r2m.demo.forgeries import TRAINED, UNSEEN
from r2m.demo.samples import (
    DEGRADATIONS,
    GROUPS,
    degrade,
    make_group,
    make_pictures,
    make_pretraining,
)

PEOPLE = (3, 5, 8)


@pytest.fixture(scope="module")
def photographs():
    """Made-up photographs of three people; all others are NaN, so that touching one shows."""
    made = np.full((40, 10, 112, 92), np.nan, dtype=np.float32)
    made[list(PEOPLE)] = np.random.default_rng(0).uniform(0.2, 0.8, size=(3, 10, 112, 92))
    return made


@pytest.mark.parametrize("name", GROUPS)
def test_groups_hold_their_forgeries_and_only_their_people(photographs, name):
    group = make_group(photographs, PEOPLE, name, 2, 0, "test")
    assert tuple(group.forged) == (UNSEEN if name == "unseen" else TRAINED)
    for pictures in (group.real, *group.forged.values()):
        assert pictures.shape == (3 * 10 * 2, 48, 48)
        assert pictures.dtype == np.float32
        assert np.isfinite(pictures).all()  # donors are from these people too


def test_real_and_forged_are_stored_alike(photographs):
    for name in GROUPS:
        group = make_group(photographs, PEOPLE, name, 1, 0, "test")
        for pictures in (group.real, *group.forged.values()):
            levels = pictures * 255
            assert np.abs(levels - np.round(levels)).max() < 1e-4


def test_streams_are_independent_and_repeatable(photographs):
    first = make_pictures(photographs, PEOPLE, "real", 1, 0, "test")
    make_pictures(photographs, PEOPLE, "FR", 1, 0, "test")
    assert np.array_equal(first, make_pictures(photographs, PEOPLE, "real", 1, 0, "test"))
    assert not np.array_equal(first, make_pictures(photographs, PEOPLE, "real", 1, 1, "test"))
    assert not np.array_equal(first, make_pictures(photographs, PEOPLE, "real", 1, 0, "training"))


def test_cross_uses_the_other_camera_for_real_and_forged_alike(photographs):
    # The other camera's contrast and gamma vary the mean brightness more from picture to picture.
    def spreads(name):
        group = make_group(photographs, PEOPLE, name, 2, 0, "test")
        return np.array([pictures.mean(axis=(1, 2)).std() for pictures in (group.real, *group.forged.values())])

    assert (spreads("cross") > 1.5 * spreads("in-distribution")).all()


def test_pretraining_labels_are_what_was_done(photographs):
    data = make_pretraining(photographs, PEOPLE, 4, 0)
    assert data.pictures.shape == (120, 48, 48)
    rotation, degradation, identity = data.labels
    assert set(rotation) == {0, 1, 2, 3}
    assert set(degradation) == set(range(len(DEGRADATIONS)))
    assert np.array_equal(np.bincount(identity), [40, 40, 40])
    low_contrast = degradation == DEGRADATIONS.index("contrast")
    untouched = degradation == DEGRADATIONS.index("none")
    spreads = data.pictures.std(axis=(1, 2))
    assert spreads[low_contrast].max() < spreads[untouched].min()


def test_rotation_labels_are_quarter_turns():
    ramp = np.zeros((40, 10, 112, 92), dtype=np.float32) + np.linspace(0, 1, 112, dtype=np.float32)[:, None]
    data = make_pretraining(ramp, (0,), 4, 0)
    for picture, turns in zip(data.pictures, data.labels[0], strict=True):
        upright = np.rot90(picture, -turns)
        assert upright[-8:].mean() > upright[:8].mean() + 0.2  # bright below, as photographed


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_degradations_change_pictures_and_keep_their_kind(kind):
    picture = np.random.default_rng(1).uniform(0.2, 0.8, (48, 48)).astype(np.float32)
    made = degrade(kind, picture, np.random.default_rng(0))
    assert made.shape == (48, 48)
    assert made.dtype == np.float32
    assert (np.abs(made - picture).max() > 0.01) == (kind != "none")
