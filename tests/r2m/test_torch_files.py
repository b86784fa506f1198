"""Files of torch.save: read in place, bit for bit what torch.load gives, and never by running what is in them."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from r2m.checkpoints import torch_file
from r2m.checkpoints.reader import open_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from r2m_kernels import InvalidInput

if TYPE_CHECKING:
    from conftest import Checkpoints, Result


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state_dict() -> dict[str, torch.Tensor]:
    whole = torch.randn(6, 8)
    return {
        "whole": whole,
        "tied": whole,
        "rows": whole[2:5],
        "transposed": whole.T,
        "every other": whole[::2, 1::3],
        "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(7).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(3, dtype=torch.float64),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.randn(3)),
    }


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.double(), right.double())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_every_tensor_is_what_torch_load_gives(wrapper: str | None) -> None:
    state = OrderedDict(state_dict())
    torch.save({wrapper: state, "epoch": 3, "lr": 0.1} if wrapper else state, "clip.pth")
    source = open_checkpoint("clip.pth", "base (clip.pth)")
    assert list(source.specs) == list(state)
    for name, tensor in state.items():
        assert same(source.read(name), tensor.detach()), name
        count = tensor.numel()
        for start, stop in ((0, count), (count // 3, count // 2), (count, count)):
            assert same(source.read_elements(name, start, stop), tensor.detach().reshape(-1)[start:stop]), name
    assert source.aliases == {"tied": "whole"}


def test_torch_says_where_a_storage_lies() -> None:
    """Under a name that is not a promise of torch's: what the reader stands on."""
    torch.save({"a": torch.arange(3.0), "b": torch.arange(5.0)}, "clip.pth")
    with open("clip.pth", "rb") as file:
        loaded = torch.load(file, map_location="meta", weights_only=True)
        for name, count in (("a", 3), ("b", 5)):
            file.seek(loaded[name].untyped_storage()._checkpoint_offset)
            assert file.read(4 * count) == torch.arange(float(count)).numpy().tobytes()


def test_torch_2_10_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts the positions into fake tensors alone; later versions know them, too."""
    state = state_dict()
    torch.save(state, "clip.pth")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.0"))
    source = open_checkpoint("clip.pth", "base")
    assert list(source.specs) == list(state)
    assert all(same(source.read(name), tensor.detach()) for name, tensor in state.items())


def test_records_are_found_by_name_wherever_they_lie() -> None:
    """Torch's own arithmetic of positions goes by the order in which it once wrote them."""
    state = {name: torch.full((4,), value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    torch.save(state, "clip.pth")
    with zipfile.ZipFile("clip.pth") as old, zipfile.ZipFile("other.pth", "w") as new:
        for entry in reversed(old.infolist()):
            new.writestr(entry.filename, old.read(entry))
    loaded = torch.load("other.pth", weights_only=True)
    assert all(same(loaded[name], tensor) for name, tensor in state.items())
    source = open_checkpoint("other.pth", "base")
    assert all(same(source.read(name), tensor) for name, tensor in state.items())


def test_tensors_are_not_mapped() -> None:
    torch.save({"a": torch.ones(2**20)}, "clip.pth")
    source = open_checkpoint("clip.pth", "base")
    assert "clip.pth" not in Path("/proc/self/maps").read_text()
    assert source.read("a").sum() == 2**20


def test_a_file_that_changes_is_noticed() -> None:
    torch.save({"a": torch.ones(2)}, "clip.pth")
    source = open_checkpoint("clip.pth", "base")
    os.utime("clip.pth", ns=(0, 0))
    with pytest.raises(InvalidInput, match=r"^base: tensor 'a': file 'clip.pth' was changed while it was in use$"):
        source.read("a")


def test_a_merge_of_torch_files_is_that_of_safetensors(
    checkpoints: Checkpoints, command: Callable[..., Result], here: Path
) -> None:
    os.chdir(here)
    torch.save(checkpoints.base, "base.pth")
    words = ["--base", "base.pth"]
    for name, tensors in checkpoints.experts.items():
        torch.save({"state_dict": tensors, "epoch": 1}, f"{name}.pth")
        words += ["--expert", f"{name}={name}.pth"]
    assert command("merge", *words, "--out", "merged").code == 0
    assert command("merge", *checkpoints.arguments, "--out", "other").code == 0
    assert Path("merged/model.safetensors").read_bytes() == Path("other/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "clip.pth"])
def test_a_directory_of_torch_files(name: str) -> None:
    Path("model").mkdir()
    torch.save({"a": torch.ones(2)}, Path("model") / name)
    assert list(open_checkpoint("model", "base").specs) == ["a"]
    save_file({"b": torch.ones(2)}, "model/model.safetensors")
    assert list(open_checkpoint("model", "base").specs) == ["b"]  # first, as in transformers


def test_shards_of_torch_files() -> None:
    Path("model").mkdir()
    torch.save({"a": torch.ones(2)}, "model/one.bin")
    torch.save({"b": torch.zeros(2)}, "model/two.bin")
    text = '{"weight_map": {"b": "two.bin", "a": "one.bin"}}'
    Path("model/pytorch_model.bin.index.json").write_text(text)
    source = open_checkpoint("model", "base")
    assert list(source.specs) == ["b", "a"]
    assert source.read("a").sum() == 2


def refusal(path: str, what: str = "base (x)") -> str:
    with pytest.raises(InvalidInput) as caught:
        open_checkpoint(path, what)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Call:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


def rewritten(name: str, *, compression: int = zipfile.ZIP_STORED, **contents: bytes) -> None:
    """``clip.pth`` again with other entries."""
    with zipfile.ZipFile("clip.pth") as old, zipfile.ZipFile(name, "w", compression) as new:
        for entry in old.infolist():
            last = entry.filename.rpartition("/")[2].replace(".", "_")
            new.writestr(entry.filename, contents.get(last, old.read(entry)))


def marked_encrypted(content: bytes) -> bytes:
    """The flag of the first entry, which is data.pkl, in the list of entries and beside it."""
    edited = bytearray(content)
    edited[6] |= 1
    edited[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(edited)


def hostile(name: str) -> None:
    """A file of each kind that is refused."""
    torch.save({"a": torch.ones(2, 3)}, "clip.pth")
    whole = Path("clip.pth").read_bytes()
    makers: dict[str, Callable[[], object]] = {
        "code": lambda: torch.save({"a": torch.ones(2), "b": Call(os.system, "touch code-was-run")}, name),
        "code alone": lambda: rewritten(name, data_pkl=pickle.dumps(Call(os.system, "touch code-was-run"), 2)),
        "module": lambda: torch.save(nn.Linear(2, 3), name),
        "script": lambda: torch.jit.save(torch.jit.script(nn.Linear(2, 3)), name),
        "old": lambda: torch.save({"a": torch.ones(2)}, name, _use_new_zipfile_serialization=False),
        "cut": lambda: Path(name).write_bytes(whole[:-30]),
        "start cut": lambda: Path(name).write_bytes(b"PK\x03\x04" + whole[40:]),
        "compressed": lambda: rewritten(name, compression=zipfile.ZIP_DEFLATED),
        "short record": lambda: rewritten(name, **{"0": b"abc"}),
        "bytearray": lambda: rewritten(
            name, data_pkl=b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + b"\x7f" * 6 + b"\x85R."
        ),
        "no dict": lambda: torch.save([1, 2], name),
        "nothing by name": lambda: torch.save({"epoch": 3, "nested": {"deeper": {"a": torch.ones(2)}}}, name),
        "mixed": lambda: torch.save({"a": torch.ones(2), "epoch": 3}, name),
        "sparse": lambda: torch.save({"a": torch.eye(3).to_sparse()}, name),
        "meta": lambda: torch.save({"a": torch.empty(3, device="meta")}, name),
        "conjugate": lambda: torch.save({"a": torch.ones(2, dtype=torch.complex64).conj()}, name),
        "expanded": lambda: torch.save({"a": torch.ones(1).expand(2**40)}, name),
        "quantized": lambda: torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, name),
        "big-endian": lambda: rewritten(name, byteorder=b"big"),
        "encrypted": lambda: Path(name).write_bytes(marked_encrypted(whole)),
        "garbage": lambda: Path(name).write_bytes(b"\x00" * 9 + b"garbage"),
    }
    makers[name.removesuffix(".pth")]()


REFUSED = {
    "code": "holds 'posix.system', which could run code when it is loaded, and only tensors are",
    "code alone": "holds 'posix.system', which could run code",
    "module": "holds 'torch.nn.modules.linear.Linear', which could run code",
    "script": "a TorchScript archive, which is a program; save the state_dict() of what torch.jit.load gives",
    "old": "a file of torch.save before torch 1.6",
    "cut": "not a whole file of torch.save: its end is missing (cut off?)",
    "start cut": "the entry ",
    "compressed": "is compressed, which torch never does",
    "short record": "tensor 'a': its storage is not one of the file's records",
    "bytearray": "holds 'builtins.bytearray', which could run code",
    "no dict": "expected a state dict, got list",
    "nothing by name": "holds no tensors by name, neither at the top nor under state_dict, model, model_state_dict",
    "mixed": "expected a state dict of tensors, got int for 'epoch'",
    "sparse": "tensor 'a': expected a dense tensor, got one of torch.sparse_coo",
    "meta": "tensor 'a': expected a dense tensor, got one without data",
    "conjugate": "tensor 'a': expected a tensor as it is stored, got a conjugate or negative view",
    "expanded": "tensor 'a': shape (1099511627776,) repeats the 4 bytes that are stored",
    "quantized": "expected dense tensors, got quantized ones",
    "big-endian": "its numbers are 'big'-endian, and this machine's are little",
    "encrypted": "is encrypted, password required for extraction",
    "garbage": "neither safetensors nor torch's",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_file_is_refused_in_one_sentence(kind: str) -> None:
    hostile(f"{kind}.pth")
    sentence = refusal(f"{kind}.pth")
    assert sentence.startswith("base (x): ")
    assert REFUSED[kind] in sentence
    assert not Path("code-was-run").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_the_command_refuses_it_and_leaves_nothing(
    kind: str, checkpoints: Checkpoints, command: Callable[..., Result]
) -> None:
    hostile(f"{kind}.pth")
    before = sorted(os.listdir())
    result = command("merge", *checkpoints.arguments, "--expert", f"odd={kind}.pth", "--out", "new/merged")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(rf"Error: expert 'odd' \({kind}\.pth\): .*\n", result.err)
    assert sorted(os.listdir()) == before
    assert not Path("code-was-run").exists()


def test_the_same_archive_entry_twice() -> None:
    torch.save({"a": torch.ones(2)}, "clip.pth")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile("clip.pth", "a") as archive:
        archive.writestr("clip/data.pkl", b"\x80\x02}.")
    assert refusal("clip.pth") == "base (x): holds 'clip/data.pkl' twice"


def test_an_archive_of_two_directories() -> None:
    torch.save({"a": torch.ones(2)}, "clip.pth")
    with zipfile.ZipFile("clip.pth", "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    assert refusal("clip.pth") == "base (x): the entry 'other/data.pkl' lies beside 'clip', where the others do"


def test_a_list_of_entries_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, "clip.pth")
    with monkeypatch.context() as patched:
        patched.setattr("r2m.checkpoints.torch_file._MOST_DIRECTORY", 100)
        assert "its list of entries has" in refusal("clip.pth")
    monkeypatch.setitem(torch_file._DESCRIBING, "data.pkl", 10)
    assert "its data.pkl has" in refusal("clip.pth")


def test_an_index_that_leads_out_by_a_link() -> None:
    Path("elsewhere").mkdir()
    save_file({"a": torch.ones(2)}, "elsewhere/secret.safetensors")
    Path("model").mkdir()
    Path("model/x.safetensors").symlink_to("../elsewhere/secret.safetensors")
    Path("model/model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    sentence = "shard 'x.safetensors' is a link that leads out of its directory"
    assert refusal("model") == f"base (x): index 'model.safetensors.index.json': {sentence}"


def test_the_hub_s_cache_keeps_contents_elsewhere() -> None:
    cache = Path("models--someone--clip")
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/abc").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, cache / "blobs/1234")
    (cache / "snapshots/abc/x.safetensors").symlink_to("../../blobs/1234")
    index = cache / "snapshots/abc/model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert open_checkpoint(cache / "snapshots/abc", "base").read("a").sum() == 2


def test_a_name_given_twice_in_a_header_or_index() -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    Path("f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert refusal("f") == "base (x): header: holds 'a' twice"
    Path("model").mkdir()
    Path("model/model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert refusal("model") == "base (x): index 'model.safetensors.index.json': holds 'a' twice"


def test_names_are_shown_escaped(command: Callable[..., Result]) -> None:
    name = "a\nError: all is well\x1b[31m\u202e"
    for path, value in (("base", 1.0), ("expert", torch.nan)):
        save_file({name: torch.full((3,), value), "b": torch.ones(3)}, f"{path}.safetensors")
    result = command("merge", "--base", "base.safetensors", "--expert", "e=expert.safetensors", "--out", "merged")
    assert result.code == 2
    shown = "'a\\nError: all is well\\x1b[31m\\u202e'"
    assert result.err == (
        f"Error: expert 'e' (expert.safetensors): tensor {shown} holds NaN or Inf in 3 of 3 elements\n"
    )
    save_file({name: torch.ones(4), "b": torch.ones(3)}, "expert.safetensors")
    result = command("merge", "--base", "base.safetensors", "--expert", "e=expert.safetensors", "--out", "merged")
    assert "\x1b" not in result.err
    assert result.err.count("\n") == 1


def test_a_tensor_beyond_two_gibibytes_is_read_in_place() -> None:
    """A sparse file: what the kernel gives in one call ends at 2 147 479 552 bytes."""
    elements = 2**29 + 3
    header = f'{{"a":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{4 * elements}]}}}}'.encode()
    with open("large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        data = file.tell()
        for position in (0, 2**29 - 1024, elements - 1):
            file.seek(data + 4 * position)
            file.write(torch.tensor(position + 0.5, dtype=torch.float32).numpy().tobytes())
    source = open_checkpoint("large.safetensors", "base")
    assert source.specs["a"].nbytes > 2**31
    for position in (0, 2**29 - 1024, elements - 1):
        wanted = torch.tensor(position + 0.5, dtype=torch.float32)
        assert source.read_elements("a", position, position + 1) == wanted


@pytest.mark.slow
def test_a_tensor_beyond_two_gibibytes_is_merged_within_a_budget(command: Callable[..., Result], here: Path) -> None:
    elements = 2**29 + 3
    header = f'{{"a":{{"dtype":"F32","shape":[{elements}],"data_offsets":[0,{4 * elements}]}}}}'.encode()
    for name, value in (("base", 0.0), ("one", 1.0), ("two", 3.0)):
        with open(f"{name}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            data = file.tell()
            file.truncate(data + 4 * elements)
            file.seek(data + 4 * (elements - 1))
            file.write(torch.tensor(value).numpy().tobytes())
    words = "--base base.safetensors --expert one.safetensors --expert two.safetensors --method weight_average"
    assert command("merge", *words.split(), "--out", "merged", "--memory-budget", "64MiB").code == 0
    source = open_checkpoint("merged", "merged")
    assert source.read_elements("a", elements - 2, elements).tolist() == [0.0, 2.0]
    whole = source.read("a")
    assert whole[-1] == 2.0
    assert whole.count_nonzero() == 1


def test_safetensors_of_io_bytes_are_not_confused() -> None:
    """A safetensors file by content stays one, whatever its name."""
    save_file({"a": torch.ones(2)}, "model.pth")
    assert load_file("model.pth")["a"].equal(open_checkpoint("model.pth", "base").read("a"))
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream)
    Path("model.safetensors").write_bytes(stream.getvalue())
    assert open_checkpoint("model.safetensors", "base").read("a").sum() == 0
