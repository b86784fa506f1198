"""Files of torch.save: read in place, bit for bit what torch.load gives, and never by running what is in them."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from r2m.checkpoints import pickles, torch_file
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
        "cut": lambda: Path(name).write_bytes(whole[:-30]),
        "start cut": lambda: Path(name).write_bytes(b"PK\x03\x04" + whole[40:]),
        "compressed": lambda: rewritten(name, compression=zipfile.ZIP_DEFLATED),
        "short record": lambda: rewritten(name, **{"0": b"abc"}),
        "bytearray": lambda: rewritten(
            name, data_pkl=b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + b"\x7f" * 6 + b"\x85R."
        ),
        "no dict": lambda: torch.save([1, 2], name),
        "nothing by name": lambda: torch.save({"epoch": 3, "nested": {"deeper": {"a": torch.ones(2)}}}, name),
        "nothing": lambda: torch.save({"epoch": 3, "inner": {"lr": 0.1}}, name),
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
    "cut": "not a whole file of torch.save: its end is missing (cut off?)",
    "start cut": "the entry ",
    "compressed": "is compressed, which torch never does",
    "short record": "tensor 'a': its storage is not one of the file's records",
    "bytearray": "holds 'builtins.bytearray', which could run code",
    "no dict": "expected a state dict, got list",
    "nothing by name": "holds tensors under nested.deeper (1); expected one of state_dict, model, …: say which with "
    "--key nested.deeper",
    "nothing": "holds no tensors by name, neither at the top nor under its keys; it has epoch, inner",
    "sparse": "tensor 'a': expected a dense tensor as it is stored, got one of torch.sparse_coo",
    "meta": "tensor 'a': expected a dense tensor as it is stored, got one without data",
    "conjugate": "tensor 'a': expected a dense tensor as it is stored, got a conjugate or negative view",
    "expanded": "tensor 'a': shape (1099511627776,) repeats the 4 bytes that are stored",
    "quantized": "tensor 'a': expected a dense tensor as it is stored, got a quantized one",
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


@pytest.mark.parametrize("where", ["", "net", "params", "model.state_dict", "teacher", "module"])
def test_a_file_from_before_torch_1_6_is_what_torch_load_gives(where: str) -> None:
    state = state_dict()
    del state["eight"]  # which torch itself cannot load from such a file
    inner: Any = OrderedDict(state)
    for key in reversed(where.split(".") if where else []):
        inner = {key: inner, "epoch": 3, "lr": 0.1, "args": argparse.Namespace(lr=0.1)}
    torch.save(inner, "old.pth", _use_new_zipfile_serialization=False)
    torch.save(inner, "new.pth")
    for name in ("old.pth", "new.pth"):
        source = open_checkpoint(name, "base")
        assert list(source.specs) == list(state)
        assert source.keys == ({where} if where else set())
        assert source.aliases == {"tied": "whole"}
        loaded = torch.load(name, weights_only=False)
        for key in where.split(".") if where else []:
            loaded = loaded[key]
        assert all(same(source.read(one), tensor.detach()) for one, tensor in loaded.items())


def test_a_state_dict_under_two_keys_is_found_under_the_known_one() -> None:
    state = {"a": torch.ones(2)}
    for keys, known in ((("ema", "model"), "model"), (("student", "teacher"), "teacher")):
        torch.save(dict.fromkeys(keys, state), "twice.pth")
        assert open_checkpoint("twice.pth", "base").keys == {known}
    torch.save(state["a"], "one.pth")
    assert refusal("one.pth") == "base (x): expected a state dict, got one tensor"


def test_a_file_of_python_2_is_read() -> None:
    """An OrderedDict of pairs, texts in bytes, a view of a storage."""
    torch.save({"a": torch.arange(6.0)}, "old.pth", _use_new_zipfile_serialization=False)
    whole = Path("old.pth").read_bytes()
    start, end = whole.index(b"\x80\x02}q\x00X\x01\x00\x00\x00a"), whole.rindex(b"\x80\x02]")
    key = re.search(rb"X.\x00\x00\x00(\d{6,})", whole)
    assert key is not None

    def text(word: bytes) -> bytes:
        return b"U" + bytes([len(word)]) + word

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(key[1]) + text(b"cpu") + b"K\x06"
    storage += b"(" + text(b"v") + b"K\x01K\x04ttQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x01K\x03\x85K\x01\x85tR"
    pairs = b"\x80\x02ccollections\nOrderedDict\n](](" + text(b"a") + tensor + b"ee\x85R."
    Path("py2.pth").write_bytes(whole[:start] + pairs + whole[end:])
    assert open_checkpoint("py2.pth", "base").read("a").tolist() == [2, 3, 4]


@pytest.mark.parametrize("cut", [100, 300, 480, 497])
def test_a_file_from_before_torch_1_6_that_is_cut_off(cut: int) -> None:
    torch.save({"a": torch.ones(2), "b": torch.arange(3)}, "old.pth", _use_new_zipfile_serialization=False)
    Path("old.pth").write_bytes(Path("old.pth").read_bytes()[:cut])
    assert "not a whole file of torch.save" in refusal("old.pth")


def test_what_lies_beside_the_weights_is_left_out_and_told(command: Callable[..., Result]) -> None:
    state = {"conv.weight": torch.randn(8, 3, 3, 3), "fc.weight": torch.randn(2, 8)}
    ema = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({**state, "epoch": 3, "conv._extra_state": None}, "stray.pth")
    torch.save({"model": state, "model_ema": ema, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "ema.pth")
    source = open_checkpoint("stray.pth", "base")
    assert list(source.specs) == list(state)
    assert source.notes == ("epoch, conv._extra_state are left out, as no tensor",)
    source = open_checkpoint("ema.pth", "base")
    assert source.notes == ("weights under 'model_ema' are left out (--key model_ema takes those)",)
    assert same(source.read("fc.weight"), state["fc.weight"])
    shadow = {"decay": 0.9, "shadow_params": list(ema.values()), "collected_params": []}
    torch.save({"model": state, "ema": shadow, "sizes": [1, 2]}, "shadow.pth")  # torch_ema's
    told = "tensors without names under 'ema.shadow_params' are left out: others' weights?"
    assert open_checkpoint("shadow.pth", "base").notes == (told,)
    assert same(open_checkpoint("ema.pth", "base", "model_ema").read("fc.weight"), ema["fc.weight"])
    words = ("--base", "stray.pth", "--expert", "e=ema.pth", "--method", "weight_average")
    for key, expected in (((), state), (("--key", "model_ema"), ema)):
        result = command("merge", *words, *key, "--out", "out", "--overwrite")
        assert result.code == 0
        assert "Note: base (stray.pth): epoch, conv._extra_state are left out, as no tensor" in result.err
        assert load_file("out/model.safetensors")["fc.weight"].equal(expected["fc.weight"])
    assert "key: model_ema" in Path("out/r2m_config.yaml").read_text()
    assert "--key" in command("inspect", "ema.pth").out
    assert command("convert", "ema.pth", "ema.safetensors", "--key", "model_ema").code == 0
    assert load_file("ema.safetensors")["fc.weight"].equal(ema["fc.weight"])
    result = command("merge", *words, "--key", "nets", "--out", "new")
    assert result.err == "Error: key: no checkpoint has anything under 'nets'\n"


def text_of(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


_ENCODE = b"c_codecs\nencode\n"
GROWING = {
    "a key that takes for ever to hash": b"})q\x00"
    + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200))
    + b"K\x01s.",
    "bytes doubled": b"}" + text_of(b"a") + _ENCODE + text_of(b"x" * 64) + text_of(b"latin1") + b"\x86R" + b"s.",
    "another codec": b"}" + text_of(b"a") + _ENCODE + text_of(b"x" * 64) + text_of(b"hex") + b"\x86Rs.",
    "punycode": b"}" + text_of(b"a") + _ENCODE + text_of(b"x" * 64) + text_of(b"punycode") + b"\x86Rs.",
    "a place far away": b"}r\xff\xff\xff\x7f.",
    "one list in many mappings": b"(](K\x01K\x02\x86K\x01K\x02\x86eq\x00"
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 2000
    + b"l.",
    "one list in many ordered mappings": b"("
    + b"]q\x00("
    + b"K\x01K\x02\x86" * 2000
    + b"e0ccollections\nOrderedDict\nq\x01"
    + b"h\x01h\x00\x85R" * 2000
    + b"t.",
    "a shape of many": b"("
    + b"K\x01" * 100_000
    + b"tq\x00"
    + b"ctorch._utils\n_rebuild_tensor_v2\nq\x01"
    + b"h\x01h\x00R" * 1000
    + b".",
    "mappings in mappings": b"}q\x00"
    + b"".join(
        b"}q"
        + bytes([level + 1])
        + b"("
        + b"".join(text_of(b"%d" % i) + b"h" + bytes([level]) for i in range(300))
        + b"u"
        for level in range(5)
    )
    + b".",
    "a length beyond the end": b"X\xff\xff\xff\xff.",
    "a number of many digits": b"I" + b"9" * 10**6 + b"\n.",
    "deep": b"(" * 10**5 + b"t" * 10**5 + b".",
    "an unknown call": b"cos\nsystem\nX\x05\x00\x00\x00touch\x85R.",
    "a call of a value": b"NN\x85R.",
    "by a protocol of today": b"\x8c\x02os\x8c\x06system\x93.",
}


def test_opcodes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, "clip.pth")
    rewritten("x.pth", data_pkl=b"\x80\x02" + b"N0" * 1000 + b".")
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 1000)
    assert refusal("x.pth") == (
        "base (x): not a whole file of torch.save: its pickle has more than 1000 opcodes, as a quarter of a million "
        "tensors have; expected fewer, or safetensors"
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize("old", [False, True])
def test_a_small_pickle_takes_little_time_and_memory(kind: str, old: bool) -> None:
    torch.save({"a": torch.ones(2)}, "clip.pth", _use_new_zipfile_serialization=not old)
    content = b"\x80\x02" + GROWING[kind]
    if old:
        whole = Path("clip.pth").read_bytes()
        start = whole.index(b"\x80\x02}q\x00X\x01\x00\x00\x00a")
        Path("x.pth").write_bytes(whole[:start] + content + whole[whole.rindex(b"\x80\x02]") :])
    else:
        rewritten("x.pth", data_pkl=content)
    tracemalloc.start()
    started = time.process_time()
    sentence = refusal("x.pth")
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sentence.startswith("base (x): ")
    assert seconds < 20  # traced, which takes five times as long
    # A value is an object of 100 bytes or so, and an opcode leaves one at most.
    assert peak < 100 * len(content) + 2**23


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
