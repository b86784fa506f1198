"""The writer against the safetensors library, and its promise that equal merges give equal bytes."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from r2m.checkpoints.layout import parse_size
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.safetensors_file import _DTYPE_NAMES, plan_files
from r2m.checkpoints.writer import SafetensorsSink
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2m_kernels import InvalidInput, TensorSpec

DTYPES = [getattr(torch, name) for name in _DTYPE_NAMES.values()]


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def written(directory: Path, tensors: Mapping[str, Tensor], max_shard_size: int = 10**9) -> dict[str, bytes]:
    """Write in the mapping's order; file name → content."""
    directory.mkdir()
    sink = SafetensorsSink(directory, {"recipe": "{}"}, max_shard_size)
    sink.begin(specs_of(tensors))
    for name, tensor in tensors.items():
        sink.write(name, tensor)
    sink.finish()
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def mixed() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        if dtype is torch.bool:
            tensors[f"{number % 3}/{dtype}"] = torch.tensor([True, False, True])
        else:
            data = torch.randint(0, 256, (3 * 4 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
            tensors[f"{number % 3}/{dtype}"] = data.view(dtype).reshape(3, 4)
    return {
        **tensors,
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        'ünïcode "name"': torch.ones(3),
    }


def test_the_file_is_the_one_the_library_writes(tmp_path: Path) -> None:
    tensors = mixed()
    sink = SafetensorsSink(tmp_path, {}, 10**9)
    sink.begin(specs_of(tensors))
    for name, tensor in tensors.items():
        sink.write(name, tensor)
    sink.finish()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "model.safetensors"]


@pytest.mark.parametrize("max_shard_size", [10**9, 100, 1])
def test_any_order_gives_the_same_bytes(max_shard_size: int, tmp_path: Path) -> None:
    tensors = mixed()
    expected = written(tmp_path / "first", tensors, max_shard_size)
    for seed in range(4):
        names = list(tensors)
        random.Random(seed).shuffle(names)
        shuffled = {name: tensors[name] for name in names}
        assert written(tmp_path / str(seed), shuffled, max_shard_size) == expected


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((500, 100), float(i)) for i in range(20)}
    sink = SafetensorsSink(tmp_path, {}, 10**6)
    sink.begin(specs_of(tensors))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: sink.write(name, tensors[name]), tensors))
    sink.finish()
    source = open_checkpoint(tmp_path, "merged")
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = written(tmp_path / "whole", mixed())
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
    assert written(tmp_path / "pieces", mixed()) == expected


def test_tensors_of_any_layout_are_written(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    written(tmp_path / "out", {"t": tensor.T, "s": tensor[:, ::2], "g": tensor.clone().requires_grad_()})
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded["t"], tensor.T)
    assert torch.equal(loaded["s"], tensor[:, ::2])
    assert torch.equal(loaded["g"], tensor)


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {name: torch.full((size,), 1.0) for name, size in {"d": 1, "c": 100, "b": 5, "a": 5}.items()}
    files = written(tmp_path / "out", tensors, max_shard_size=40)
    assert list(files) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert json.loads(files["model.safetensors.index.json"]) == {
        "metadata": {"total_size": 444},
        "weight_map": {
            "a": "model-00001-of-00003.safetensors",
            "b": "model-00001-of-00003.safetensors",
            "c": "model-00002-of-00003.safetensors",  # larger than a shard: alone
            "d": "model-00003-of-00003.safetensors",
        },
    }
    for name, tensor in tensors.items():
        shard = json.loads(files["model.safetensors.index.json"])["weight_map"][name]
        assert torch.equal(load_file(tmp_path / "out" / shard)[name], tensor)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8),
        st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES[2:])),
        max_size=12,
    ),
    st.integers(1, 2000),
)
def test_layout(contents: dict[str, tuple[list[int], torch.dtype]], max_shard_size: int) -> None:
    specs = {name: TensorSpec(tuple(shape), dtype) for name, (shape, dtype) in contents.items()}
    files = plan_files(specs, {"b": "2", "a": "1"}, max_shard_size)
    assert sorted(name for file in files for name in file.offsets) == sorted(specs)
    for file in files:
        sizes = [specs[name].nbytes for name in file.offsets]
        assert sum(sizes) <= max_shard_size or sum(size > 0 for size in sizes) == 1
        assert len(file.header) % 8 == 0
        assert file.header[8:].startswith(b'{"__metadata__":{"a":"1","b":"2","format":"pt"}')
        position = len(file.header)
        for name, offset in file.offsets.items():
            assert offset == position
            assert offset % specs[name].dtype.itemsize == 0
            position += specs[name].nbytes
        assert position == file.size
    # Greedy: the next tensor would not have fitted.
    for file, following in itertools.pairwise(files):
        total = sum(specs[name].nbytes for name in file.offsets)
        assert total + specs[min(following.offsets)].nbytes > max_shard_size


def test_an_unfinished_file_is_no_checkpoint(tmp_path: Path) -> None:
    sink = SafetensorsSink(tmp_path, {}, 10**9)
    sink.begin({"a": TensorSpec((2,), torch.float32), "b": TensorSpec((2,), torch.float32)})
    sink.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="1 tensors were never written as a whole, such as 'b'"):
        sink.finish()
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "model.safetensors")


def test_wrong_writes_are_refused(tmp_path: Path) -> None:
    sink = SafetensorsSink(tmp_path, {}, 10**9)
    sink.begin({"a": TensorSpec((2,), torch.float32)})
    with pytest.raises(ValueError, match="tensor 'b' was not announced"):
        sink.write("b", torch.ones(2))
    with pytest.raises(ValueError, match=r"announced as \(2,\) torch.float32, written as \(2,\) torch.float64"):
        sink.write("a", torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"written as \(2, 1\)"):
        sink.write("a", torch.ones(2, 1))
    sink.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="tensor 'a' was written twice"):
        sink.write("a", torch.ones(2))


def test_a_dtype_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^tensor 'a': safetensors cannot store torch.complex128$"):
        SafetensorsSink(tmp_path, {}, 1).begin({"a": TensorSpec((2,), torch.complex128)})


def test_an_error_names_the_file(tmp_path: Path) -> None:
    sink = SafetensorsSink(tmp_path, {}, 10**9)
    with pytest.raises(OSError, match="large") as caught:
        sink.begin({"a": TensorSpec((1 << 60,), torch.int8)})
    assert caught.value.filename == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("12345", 12345), (12345, 12345), ("1.5kb", 1500)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "-1", "0", "GB", "1e3", "nan", 0, -5])
def test_bad_sizes(text: str | int) -> None:
    with pytest.raises(InvalidInput, match=r"^max_shard_size: expected a positive size such as 4GiB or 500MB, got"):
        parse_size(text)
