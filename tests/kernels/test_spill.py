"""Factors come back as they went in, from memory and from disk."""

from __future__ import annotations

import os

import pytest
import torch

from r2m_kernels._stream.factors import Factors, row_lengths
from r2m_kernels._stream.spill import FactorStore


def factors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(3, 20, 4, generator=generator, dtype=dtype), torch.randn(3, 4, 30, generator=generator, dtype=dtype)
    )


def test_what_exceeds_the_budget_goes_to_disk_and_comes_back(tmp_path):
    one = factors(0).left.nbytes + factors(0).right.nbytes
    store = FactorStore(budget=2 * one, directory=tmp_path)
    for seed in range(4):
        store.put(f"t{seed}", factors(seed))
    store.put("double", factors(9, torch.float64))
    assert store.spilled_bytes == 4 * one  # two in float32, one in float64
    for seed in range(4):
        back = store.get(f"t{seed}")
        assert torch.equal(back.left, factors(seed).left)
        assert torch.equal(back.right, factors(seed).right)
    assert torch.equal(store.get("double").right, factors(9, torch.float64).right)
    assert "t3" in store
    assert "other" not in store
    assert list(tmp_path.iterdir()) == []
    store.close()


def test_without_a_budget_nothing_touches_the_disk(tmp_path):
    store = FactorStore(directory=tmp_path / "not there")
    store.put("t", factors(0))
    assert torch.equal(store.get("t").left, factors(0).left)
    assert store.spilled_bytes == 0


@pytest.mark.parametrize("ordered", [False, True])
def test_parts_and_lengths_of_rows_are_the_same_from_disk(tmp_path, ordered):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(3, 300, 70, generator=generator), torch.randn(3, 70, 1500, generator=generator)
    stores = [FactorStore(), FactorStore(budget=1, directory=tmp_path)]
    for store in stores:
        store.put("t", Factors(left, right, ordered=ordered))
    rows, columns = slice(20, 90), slice(1024, 1500)
    for store in stores:
        part = store.part("t", rows, columns)
        assert torch.equal(part.left, left[:, rows])
        assert torch.equal(part.right, right[:, :, columns])
        store.let_go("t")
        assert store.leading("t", 70)
        assert store.leading("t", 69) == ordered
    held, spilled = (store.row_lengths("t", 70) for store in stores)
    assert torch.equal(held, spilled)
    exact = (left.double() @ right.double()).norm(dim=2)
    assert ordered or torch.allclose(held, exact, rtol=1e-12)
    assert torch.equal(stores[1].row_lengths("t", 9), row_lengths(left[None, :, :, :9], right[None, :, :9], ordered)[0])


def test_calls_that_move_less_than_asked_are_repeated(tmp_path, monkeypatch):
    # Linux moves at most 2 GiB a call; here it is 1000 bytes, so that the loops have something to do.
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:1000]], offset))
    store = FactorStore(budget=1, directory=tmp_path)
    store.put("t", factors(0))
    store.put("u", factors(1))
    assert torch.equal(store.get("u").left, factors(1).left)
    assert torch.equal(store.get("t").right, factors(0).right)
