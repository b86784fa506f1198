"""Files of torch.save as output, and ``r2m convert``: what is in them, that they load, that none is half-written."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from forked import Child
from r2m.checkpoints import torch_file
from r2m.checkpoints.reader import open_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]
Start = Callable[..., Child]


def loaded(path: str) -> dict[str, torch.Tensor]:
    found = torch.load(path, weights_only=True)
    assert isinstance(found, dict)
    return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_a_merge_to_pth_holds_the_same_tensors(checkpoints: Checkpoints, command: Command) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "a").code == 0
    assert command("merge", *checkpoints.arguments, "--out", "b", "--format", "pth").code == 0
    assert sorted(os.listdir("b")) == ["README.md", "model.pth", "r2m_config.yaml", "r2m_report.json", "r2m_state.json"]
    assert same(loaded("b/model.pth"), load_file("a/model.safetensors"))
    assert zipfile.ZipFile("b/model.pth").testzip() is None
    assert not Path("b.partial").exists()
    # Each has a storage of its own: a file of 10 tensors is not loaded whole for one.
    state = loaded("b/model.pth")
    assert list(state) == list(open_checkpoint("base.safetensors", "base").specs)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    # Its recipe repeats it, and another merge takes it in.
    assert command("merge", "b/r2m_config.yaml", "--out", "c").code == 0
    assert same(loaded("c/model.pth"), state)
    assert command("merge", "--base", checkpoints.base_path, "--expert", "b", "--out", "d").code == 0


SAVING = """
import sys
from pathlib import Path
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.torch_file import save_file
source = open_checkpoint("large.safetensors", "source")
def most(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
before = most()
save_file(source, Path("large.pth"), list(source.specs))
print(most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's peak memory is read from /proc")
def test_a_file_of_torch_save_is_written_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {
        "large": torch.rand(2**25),
        "half": torch.rand(3, 5).half(),
        "none": torch.empty(0),
        "one": torch.tensor(3),
    }
    save_file(state, "large.safetensors")
    taken = int(subprocess.run([sys.executable, "-c", SAVING], stdout=subprocess.PIPE, check=True).stdout)
    assert taken < state["large"].nbytes / 2
    assert same(loaded("large.pth"), state)
    # Records begin where they can be mapped.
    mapped = torch.load("large.pth", mmap=True, weights_only=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values())


def test_shards_become_one_file_and_tied_tensors_stay_tied(checkpoints: Checkpoints, command: Command) -> None:
    for path in (checkpoints.base_path, *checkpoints.paths.values()):
        state = load_file(path)
        weight = state.pop("block.weight")
        torch.save({**state, "one": weight, "two": weight}, path.replace("safetensors", "pth"))
    arguments = [word.replace(".safetensors", ".pth") for word in checkpoints.arguments]
    assert command("merge", *arguments, "--out", "a", "--format", "pth", "--max-shard-size", "200").code == 0
    state = loaded("a/model.pth")
    assert state["one"].data_ptr() == state["two"].data_ptr()
    assert command("merge", *checkpoints.arguments, "--out", "b").code == 0
    assert torch.equal(state["one"], load_file("b/model.safetensors")["block.weight"])


def test_a_module_loads_strictly(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))

    torch.save(network().state_dict(), "base.pth")
    for name in ("a", "b"):
        torch.save(network().state_dict(), f"{name}.pth")
    assert (
        command(
            "merge", "--base", "base.pth", "--expert", "a.pth", "--expert", "b.pth", "--out", "m", "--format", "pth"
        ).code
        == 0
    )
    assert network().load_state_dict(loaded("m/model.pth"), strict=True).missing_keys == []


@pytest.mark.parametrize("when", ["tensors", "file"])
def test_a_kill_while_the_file_is_written_is_gone_on_from(
    when: str, checkpoints: Checkpoints, command: Command, start: Start
) -> None:
    assert command("merge", *checkpoints.arguments, "--out", "whole", "--format", "pth").code == 0
    script = """
import os, signal, sys
import r2m.checkpoints.torch_file as torch_file
save = torch_file.save_file
def dies(source, path, names):
    if sys.argv[1] == "file":
        save(source, path, names)
        with open(path, "r+b") as file:
            file.truncate(100)
    os.kill(os.getpid(), signal.SIGKILL)
torch_file.save_file = dies
from r2m.commands.main import main
main(sys.argv[2:])
"""
    arguments = ["merge", *checkpoints.arguments, "--out", "out", "--format", "pth"]
    killed = start(when, *arguments, script=script)
    _, err = killed.communicate(timeout=120)
    assert killed.returncode == -9, err
    assert not Path("out").exists()
    assert command(*arguments).code == 2  # its work is there, and is not thrown away unasked
    assert command(*arguments, "--resume").code == 0
    assert Path("out/model.pth").read_bytes() == Path("whole/model.pth").read_bytes()
    assert not Path("out.partial").exists()


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, start: Start) -> None:
    save_file({"a": torch.randn(200_000)}, tmp_path / "a.safetensors")
    paths = (f"{tmp_path}/a.safetensors", f"{tmp_path}/b.pth")
    with start("convert", *paths, limits={resource.RLIMIT_FSIZE: 10_000}) as process:
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, f"Error: {tmp_path}/b.pth: file too large\n")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_torchs_writer_says_what_the_file_said(tmp_path: Path) -> None:
    save_file({"a": torch.randn(200_000)}, tmp_path / "a.safetensors")
    source = open_checkpoint(tmp_path / "a.safetensors", "a")
    with pytest.raises(OSError, match="No space left") as error:
        torch_file.save_file(source, Path("/dev/full"), ["a"])
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/dev/full")


def test_convert_both_ways(checkpoints: Checkpoints, command: Command) -> None:
    result = command("convert", "fs.safetensors", "fs.pth")
    assert (result.code, result.out) == (0, "6 tensors from fs.safetensors to fs.pth\n")
    assert same(loaded("fs.pth"), checkpoints.experts["fs"])
    assert command("convert", "fs.pth", "again.safetensors", "--rename", "block.=layer.", "--drop", "conv").code == 0
    again = load_file("again.safetensors")
    assert again.keys() == {"layer.weight", "layer.bias", "position_ids", "scale", "empty"}
    assert command("convert", "fs.pth", "half.pth", "--dtype", "bfloat16").code == 0
    half = loaded("half.pth")
    assert half["block.weight"].dtype == torch.bfloat16
    assert torch.equal(half["block.weight"], checkpoints.experts["fs"]["block.weight"].bfloat16())
    assert half["position_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("fs.safetensors out.npz", "out (out.npz): expected a name that ends in .safetensors, .pth, .pt, .bin"),
        ("fs.safetensors fr.safetensors", "out (fr.safetensors): exists already; --overwrite replaces it"),
        ("fs.safetensors nowhere/a.pth", "out (nowhere/a.pth): there is no directory nowhere"),
        ("missing a.pth", "source (missing): no such file or directory"),
        ("big.safetensors a.pth --dtype float16", "source (big.safetensors): tensor 'a' exceeds the range of float16"),
        ("fs.safetensors a.pth --drop x --rename block.weight=block.bias", "source (fs.safetensors): renamed, "),
    ],
)
def test_what_convert_refuses(arguments: str, sentence: str, checkpoints: Checkpoints, command: Command) -> None:
    save_file({"a": torch.tensor([1e30])}, "big.safetensors")
    before = sorted(os.listdir())
    result = command("convert", *arguments.split())
    assert result.code == 2
    assert result.err.startswith(f"Error: {sentence}")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_quantised_weights_are_copied_and_never_cast_without_their_scales(
    ending: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {
        "q.weight": torch.randn(4, 4).to(torch.float8_e5m2),
        "plain.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    save_file(state, "plain.safetensors")
    assert command("convert", "plain.safetensors", f"wide.{ending}", "--dtype", "float32").code == 0
    assert command("convert", f"wide.{ending}", "again.safetensors").code == 0
    assert same(load_file("again.safetensors"), {name: tensor.float() for name, tensor in state.items()})
    save_file({**state, "q.weight_scale_inv": torch.ones(1, 1)}, "scaled.safetensors")
    assert command("convert", "scaled.safetensors", f"copy.{ending}").code == 0
    refused = command("convert", "scaled.safetensors", f"cast.{ending}", "--dtype", "float32")
    assert refused.code == 2
    assert refused.err.startswith(
        "Error: source (scaled.safetensors): 'q.weight' holds the floats of a byte of a quantised"
    )
    assert refused.err.endswith("; without --dtype it is written as it is\n")
    assert not Path(f"cast.{ending}").exists()


def test_overwriting_takes_the_place_of_a_file(checkpoints: Checkpoints, command: Command) -> None:
    assert command("convert", "fs.safetensors", "fr.safetensors", "--overwrite").code == 0
    assert same(load_file("fr.safetensors"), checkpoints.experts["fs"])


class Whole(nn.Module):
    """Pickled as an object, as repositories of task vectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)


def test_a_pickled_module_is_only_read_when_it_is_trusted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = Whole()
    torch.save(module, "whole.pt")
    result = command("convert", "whole.pt", "state.safetensors")
    assert result.code == 2
    assert "which could run code when it is loaded" in result.err
    assert "r2m convert --allow-pickle" in result.err
    assert command("convert", "whole.pt", "state.safetensors", "--allow-pickle").code == 0
    assert same(load_file("state.safetensors"), module.state_dict())
    torch.save({"model": module, "epoch": 1}, "wrapped.pt")
    assert command("convert", "wrapped.pt", "state.pth", "--allow-pickle").code == 0
    assert same(loaded("state.pth"), dict(module.state_dict()))


def test_torchscript_is_read_when_it_is_trusted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = nn.Linear(3, 2)
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.save(torch.jit.trace(module, torch.zeros(1, 3)), "program.pt")
    result = command("merge", "--base", "program.pt", "--expert", "program.pt", "--out", "x")
    assert "a TorchScript archive, which is a program" in result.err
    assert command("convert", "program.pt", "state.safetensors", "--allow-pickle").code == 0
    assert same(load_file("state.safetensors"), module.state_dict())


def test_classes_of_a_trusted_file_are_looked_for_in_the_current_directory(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("our_networks.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    # The installed command does not look there by itself.
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    with monkeypatch.context() as there:
        there.syspath_prepend(str(tmp_path))
        torch.save(importlib.import_module("our_networks").Net(3, 2), "net.pt")
    monkeypatch.delitem(sys.modules, "our_networks")
    assert command("convert", "net.pt", "state.pth", "--allow-pickle").code == 0
    assert loaded("state.pth").keys() == {"weight", "bias"}
    monkeypatch.delitem(sys.modules, "our_networks")


def test_a_class_that_is_not_there_is_named(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gone_module.py").write_text("from torch import nn\nclass Gone(nn.Linear): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import gone_module  # type: ignore[import-not-found]

    torch.save(gone_module.Gone(2, 2), "gone.pt")
    monkeypatch.delitem(__import__("sys").modules, "gone_module")
    Path("gone_module.py").unlink()
    result = command("convert", "gone.pt", "state.pth", "--allow-pickle")
    assert (result.code, result.err) == (
        2,
        "Error: source (gone.pt): needs the Python module 'gone_module' it was saved with\n",
    )
    Path("broken.pt").write_bytes(b"PK\x03\x04 nothing")
    result = command("convert", "broken.pt", "state.pth", "--allow-pickle")
    assert result.code == 2
    assert result.err.startswith("Error: source (broken.pt): could not be loaded: ")


def test_the_plan_counts_the_tensors_twice(checkpoints: Checkpoints, command: Command) -> None:
    lines = [
        next(
            line
            for line in command("plan", *checkpoints.arguments, "--out", "o", *more).out.splitlines()
            if "disk" in line
        )
        for more in ((), ("--format", "pth"))
    ]
    assert lines[0] != lines[1]
