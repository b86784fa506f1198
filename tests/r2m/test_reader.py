"""The reader against the safetensors library, and what it says about files that cannot be read."""

from __future__ import annotations

import json
import os
import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.safetensors_file import _DTYPE_NAMES, _in_order, open_file
from safetensors.torch import load_file, save_file

from r2m_kernels import InvalidInput
from r2m_kernels.heads import head_names

DTYPES = [getattr(torch, name) for name in _DTYPE_NAMES.values()]


def random_tensor(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Every bit pattern of the dtype may occur, NaN included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """All dtypes, odd shapes, a 0-d and an empty tensor, in a file without a suffix."""
    tensors = {
        str(dtype): random_tensor(dtype, 3, 5, 2, seed=seed)
        for seed, dtype in enumerate(DTYPES)
        if dtype is not torch.float4_e2m1fn_x2
    }
    tensors["4 bit"] = random_tensor(torch.uint8, 3, 4).view(torch.float4_e2m1fn_x2)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(3, 0, 2)
    path = tmp_path / "weights"
    save_file(tensors, path)
    return path


def test_every_dtype_and_shape_is_read_as_the_library_reads_it(mixed: Path) -> None:
    source = open_checkpoint(mixed, "base")
    expected = load_file(mixed)
    assert set(source.specs) == set(expected)
    assert len(expected) == len(DTYPES) + 2
    for name, tensor in expected.items():
        assert source.specs[name].shape == tuple(tensor.shape)
        assert source.specs[name].dtype == tensor.dtype
        assert same_bits(source.read(name), tensor), name


def test_names_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate("cab")}
    text = json.dumps(dict(sorted(header.items()))).encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text + bytes([10, 11, 12]))
    source = open_checkpoint(tmp_path / "f", "base")
    assert list(source.specs) == ["c", "a", "b"]
    assert [int(source.read(name)) for name in source.specs] == [10, 11, 12]


def test_short_reads_are_continued(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    source = open_checkpoint(mixed, "base")
    for name, tensor in load_file(mixed).items():
        assert same_bits(source.read(name), tensor), name


def test_threads_do_not_disturb_one_another(tmp_path: Path) -> None:
    tensors = {str(seed): random_tensor(torch.float32, 300, 100, seed=seed) for seed in range(16)}
    save_file(tensors, tmp_path / "f.safetensors")
    source = open_checkpoint(tmp_path / "f.safetensors", "base")
    with ThreadPoolExecutor(8) as pool:
        for name, tensor in zip(list(tensors) * 4, pool.map(source.read, list(tensors) * 4), strict=True):
            assert same_bits(tensor, tensors[name])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_nothing_stays_mapped_or_open(mixed: Path) -> None:
    source = open_checkpoint(mixed, "base")
    tensor = source.read("torch.float32")
    assert str(mixed) not in Path("/proc/self/maps").read_text()
    assert str(mixed) not in [os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors()]
    assert tensor.numel() == 30


def descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def shards(directory: Path, weight_map: dict[str, Any]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_directory_with_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "whatever.safetensors")
    (tmp_path / "._whatever.safetensors").write_bytes(b"a companion of another system")
    assert float(open_checkpoint(tmp_path, "base").read("a").sum()) == 2


def test_a_directory_with_shards(tmp_path: Path) -> None:
    save_file({"a": torch.tensor(1.0), "c": torch.tensor(3.0)}, tmp_path / "x.safetensors")
    save_file({"b": torch.tensor(2.0), "not in the index": torch.tensor(9.0)}, tmp_path / "y.safetensors")
    shards(tmp_path, {"c": "x.safetensors", "b": "y.safetensors", "a": "x.safetensors"})
    source = open_checkpoint(tmp_path, "base")
    assert list(source.specs) == ["c", "b", "a"]
    assert [float(source.read(name)) for name in source.specs] == [3, 2, 1]
    assert sorted(file.name for file in source.files) == ["x.safetensors", "y.safetensors"]


def test_model_safetensors_is_preferred_as_transformers_does(tmp_path: Path) -> None:
    save_file({"a": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    save_file({"a": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    shards(tmp_path, {"a": "x.safetensors"})
    assert float(open_checkpoint(tmp_path, "base").read("a")) == 1


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


WHOLE = header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))
NOT_WHOLE = "base (f): not a whole safetensors file: "
DAMAGED = {
    "empty": (b"", "base (f): the file is empty"),
    "a few bytes": (b"abc", NOT_WHOLE + "it is shorter than any safetensors file"),
    "garbage": (b"\xa5" * 64, NOT_WHOLE + "its header would be larger than the format allows"),
    "huge header": (
        header(b"{}", length=1 << 62),
        NOT_WHOLE + "its header would be larger than the format allows",
    ),
    "long header": (
        header(b"{}", length=90_000_000),
        NOT_WHOLE + "its header would end after the file, which is cut off or no safetensors file",
    ),
    "truncated": (WHOLE[:-1], NOT_WHOLE + "it is cut off, or longer than its header says"),
    "too long": (WHOLE + b"\0", NOT_WHOLE + "it is cut off, or longer than its header says"),
    "no tensors": (header(b"{}"), "base (f): holds no tensors"),
    "overflow": (
        header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', bytes(4)),
        NOT_WHOLE + "its header announces a tensor too large for any file",
    ),
    "a large shape of nothing": (
        header(b'{"a":{"dtype":"F32","shape":[0,4611686018427387904,8],"data_offsets":[0,0]}}'),
        "base (f): tensor 'a': shape (0, 4611686018427387904, 8) is too large",
    ),
    "6 bit": (
        header(b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', bytes(3)),
        f"base (f): tensor 'a': torch {torch.__version__} has no type for the safetensors dtype F6_E2M3",
    ),
    "odd rows of 4 bit": (
        header(b'{"a":{"dtype":"F4","shape":[2,1],"data_offsets":[0,1]}}', bytes(1)),
        "base (f): tensor 'a': torch cannot hold 4-bit rows of odd length, shape (2, 1)",
    ),
    "unknown dtype": (
        header(b'{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        NOT_WHOLE + "invalid JSON in header: unknown variant `F31`",
    ),
    "a pickle": (
        b"\x80\x02}q\x00.",
        "base (f): a pickle of Python that torch.save did not write",
    ),
}


@pytest.mark.parametrize(
    ("read", "others", "note"),
    [
        ("model.safetensors", ["pytorch_model.bin"], "pytorch_model.bin beside model.safetensors is not read"),
        (
            "model.safetensors",
            ["model.fp16.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
            "model.fp16.safetensors, model.safetensors.index.json beside model.safetensors are not read",
        ),
        ("model.safetensors", ["optimizer.pt", "training_args.bin", "config.json"], ""),
        ("epoch.safetensors", ["last.pth"], ""),
    ],
)
def test_another_checkpoint_in_a_directory_is_told(read: str, others: list[str], note: str, tmp_path: Path) -> None:
    """A later one may have been saved in the other format; a file that is named says which is meant."""
    for name in (read, *others):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    assert open_checkpoint(tmp_path, "x").notes == ((note,) if note else ())
    assert open_checkpoint(tmp_path / read, "x").notes == ()


def test_an_index_is_not_told_its_own_shards(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "part.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    told = "other.safetensors beside model.safetensors.index.json is not read"
    assert open_checkpoint(tmp_path, "x").notes == (told,)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    content, sentence = DAMAGED[case]
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InvalidInput, match=re.escape(sentence)) as caught:
        open_checkpoint(tmp_path / "f", "base (f)")
    assert "\n" not in str(caught.value)


def test_what_the_metadata_say_is_no_tensor_because_it_equals_a_name(tmp_path: Path) -> None:
    tensors = {"head.weight": torch.ones(2), "a": torch.ones(1)}
    metadata = {"format": "pt", "title": "head.weight", "author": "a", "best.metric": "head.weight"}
    save_file(tensors, tmp_path / "f", metadata)
    assert sorted(open_checkpoint(tmp_path / "f", "base").specs) == sorted(tensors)
    save_file(tensors, tmp_path / "f", {"lm.weight": "head.weight"})  # as save_model has it
    assert open_checkpoint(tmp_path / "f", "base").aliases == {"lm.weight": "head.weight"}


ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}",
        b'{"a":' + ENTRY + b',"\\u0061":' + ENTRY + b"}",
        b'{"a":' + ENTRY + b',"a":' + ENTRY.replace(b"_", b"\\u005f") + b"}",
    ],
)
def test_a_name_given_twice_is_found_however_it_is_written(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(header(text, bytes(1)))
    with pytest.raises(InvalidInput, match=r"^base: header: holds 'a' twice$"):
        open_checkpoint(tmp_path / "f", "base")


def test_time_grows_with_the_number_of_tensors(tmp_path: Path) -> None:
    """Of a million in 10 s: a hundredth of them here, at a time per tensor that no square of their number allows."""
    count = 10_000
    entries = {
        f"{i}.head.weight": {"dtype": "U8", "shape": [1, 2], "data_offsets": [2 * i, 2 * i + 2]} for i in range(count)
    }
    metadata = {"__metadata__": {f"tied{i}.weight": f"{i}.head.weight" for i in range(count)}}
    (tmp_path / "f").write_bytes(header(json.dumps({**metadata, **entries}).encode(), bytes(2 * count)))
    started = time.process_time()
    source = open_checkpoint(tmp_path / "f", "base")
    assert len(source.specs) == 2 * count
    head_names({name: spec.shape for name, spec in source.specs.items()})
    assert time.process_time() - started < 5


INDEX = "base: index 'model.safetensors.index.json': "


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", INDEX + "not valid JSON"),
        ("[" * 100_000, INDEX + "not valid JSON"),
        (
            "[]",
            INDEX + "expected a JSON object, got list",
        ),
        ('{"weight_map": {"a": 3}}', "holds no 'weight_map' from tensor names to file names"),
        ('{"weight_map": {}}', INDEX + "holds no tensors"),
        (
            '{"weight_map": {"a": "../x.safetensors"}}',
            INDEX + "shard '../x.safetensors' is not the name of a file in the same directory",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', "shard '/etc/passwd' is not the name of a file"),
        ('{"weight_map": {"a": ".."}}', "shard '..' is not the name of a file"),
        (
            '{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}',
            "base: 1 of 2 shards missing: y.safetensors",
        ),
        (
            '{"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}}',
            "base: shard 'x.safetensors': lacks tensor 'b', which the index says it holds (and 1 more",
        ),
        (
            '{"weight_map": {"a": "cut.safetensors"}}',
            "base: shard 'cut.safetensors': not a whole safetensors file: it is cut off",
        ),
    ],
)
def test_a_wrong_index_is_refused_in_one_sentence(index: str, sentence: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(WHOLE[:-1])
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidInput, match=re.escape(sentence)):
        open_checkpoint(tmp_path, "base")


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^base: no such file or directory$"):
        open_checkpoint(tmp_path / "nothing", "base")
    with pytest.raises(InvalidInput, match=r"no such file or directory; from the Hub it is hf://openai/clip-vit$"):
        open_checkpoint("openai/clip-vit", "base")
    with pytest.raises(InvalidInput, match=r"^base: the directory holds no safetensors file and none of torch.save$"):
        open_checkpoint(tmp_path, "base")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match=r"^base: not a regular file$"):
        open_checkpoint(tmp_path / "pipe", "base")
    for name in "ba":
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InvalidInput, match=r"^base: holds 2 \*.safetensors files \(a.safetensors, b.safetensors\)"):
        open_checkpoint(tmp_path, "base")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(2)}, path)
    source = open_checkpoint(path, "base")
    save_file({"a": torch.zeros(2)}, path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InvalidInput, match=r"^base: tensor 'a': file 'f.safetensors' was changed while it was in use$"):
        source.read("a")


def test_a_file_that_changes_in_place_and_puts_its_time_back_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.ones(2)}, path)
    status, read = path.stat(), os.preadv

    def change() -> None:
        time.sleep(0.02)  # the clock of a file system has ticks
        with open(path, "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(bytes(8))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def read_and_change(*arguments: Any) -> int:
        count = read(*arguments)
        change()
        return count

    pattern = r"^base: tensor 'a': file 'f.safetensors' was changed while it was in use$"
    source = open_checkpoint(path, "base")
    change()
    with pytest.raises(InvalidInput, match=pattern):
        source.read("a")
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert open_checkpoint(path, "base").fingerprints != source.fingerprints
    source = open_checkpoint(path, "base")
    monkeypatch.setattr(os, "preadv", read_and_change)
    with pytest.raises(InvalidInput, match=pattern):
        source.read("a")


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=4), st.integers(0, len(WHOLE) - 1))
def test_a_mutated_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, patch: bytes, at: int) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(WHOLE[:at] + patch + WHOLE[at + len(patch) :])
    try:
        source = open_checkpoint(path, "base")
    except InvalidInput as error:
        assert str(error).startswith("base: ")  # noqa: PT017 - both endings are right
    else:
        assert sum(source.read(name).nbytes for name in source.specs) == 8


ORDER = (
    '{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
    '"b":{"dtype":"BF16","shape":[],"data_offsets":[16,18]},"c":{"dtype":"I64","shape":[0,3],"data_offsets":[18,18]}}'
)
DOUBTFUL = {
    "a gap": ("[16,18]", "[17,19]"),
    "an overlap": ("[16,18]", "[14,16]"),
    "another size": ("[2,2]", "[2,3]"),
    "no number": ("[0,16]", "[false,16]"),
    "a fraction": ("[0,16]", "[0,16.0]"),
    "a negative size": ("[2,2]", "[-2,-2]"),
    "a bool as a size": ("[2,2]", "[true,4]"),
    "an unknown type": ("BF16", "F17"),
    "a packed type": ('"BF16","shape":[]', '"F4","shape":[4]'),
    "an escape": ('"b"', '"\\u0062"'),
    "a name twice": ('"b"', '"a"'),
    "a field twice": ('"shape":[2,2]', '"shape":[9],"shape":[2,2]'),
    "a field more": ('"shape":[2,2]', '"shape":[2,2],"x":1'),
    "a field less": ('"dtype":"F32",', ""),
    "three places": ("[0,16]", "[0,16,16]"),
    "metadata of numbers": ('"pt"', "1"),
    "metadata that are none": ('{"format":"pt"}', "[]"),
    "an order of its own": ('"b":{"dtype":"BF16","shape":[],"data_offsets":[16,18]},', ""),
    "no object": ('{"__metadata__"', '[{"__metadata__"'),
    "a space before": ('{"__metadata__"', ' {"__metadata__"'),
    "a nested shape": ("[2,2]", "[[2],2]"),
    "a shape of letters": ("[2,2]", '"22"'),
}


def test_a_large_header_that_is_in_order_is_read_as_the_library_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(ORDER)) + ORDER.encode() + bytes(range(18)))
    judged = open_file(path, "x")
    monkeypatch.setattr("r2m.checkpoints.safetensors_file._LARGE", 0)
    monkeypatch.delattr("r2m.checkpoints.safetensors_file.safe_open")
    assert open_file(path, "x") == judged


@pytest.mark.parametrize("case", DOUBTFUL)
def test_a_large_header_with_anything_doubtful_is_for_the_library(case: str) -> None:
    old, new = DOUBTFUL[case]
    header = ORDER.replace(old, new, 1).encode()
    assert header != ORDER.encode()
    assert _in_order(ORDER.encode(), 8 + len(ORDER) + 18) is not None
    assert _in_order(header, 8 + len(header) + 18) is None
    assert _in_order(ORDER.encode(), 8 + len(ORDER) + 17) is None
