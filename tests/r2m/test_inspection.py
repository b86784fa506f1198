"""What ``r2m inspect`` says of checkpoints, and of whether they fit."""

from __future__ import annotations

import cProfile
import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from heavy import NUMBERS, Numbers
from r2m.inspection import FAMILIES, family
from safetensors.torch import load_file, save_file

from r2m_kernels._stream.tensors import TensorSpec
from r2m_kernels.heads import classifier

if TYPE_CHECKING:
    from conftest import Checkpoints, Result

Command = Callable[..., "Result"]


def test_one_checkpoint(checkpoints: Checkpoints, command: Command) -> None:
    result = command("inspect", checkpoints.base_path)
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        "base.safetensors: 6 tensors, 649 parameters, 2.65 kB\n"
        "  family  unknown\n"
        "  types   5 float32, 1 int64\n"
        "  begin   block 2, position_ids 1, conv 1, empty 1, scale 1\n"
    )


def many(path: str, tensors: int) -> None:
    """Weights and biases of many small layers."""
    layers = range(tensors // 2)
    weights = {f"model.layers.{i // 100}.blocks.{i % 100}.weight": torch.full((2, 3), float(i)) for i in layers}
    save_file(weights | {name[:-6] + "bias": torch.zeros(2) for name in weights}, path)


@pytest.mark.parametrize(
    # Of three checkpoints each tensor is looked at more than once; a plan counts bytes for every step, too.
    ("command_line", "most"),
    [("inspect a", 40), ("inspect base a b", 330), ("plan --base base --expert a --expert b --out out", 540)],
)
def test_what_a_tensor_more_costs(
    command_line: str, most: int, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in calls of functions, which no machine's load touches; nothing looks at all others for each."""
    monkeypatch.chdir(tmp_path)
    first, *others = command_line.split()
    counts = []
    for tensors in (400, 800):
        for name in ("base", "a", "b"):
            many(f"{name}{tensors}", tensors)
        words = [word + str(tensors) if word in ("base", "a", "b") else word for word in others]
        command(first, *words)  # imports
        with cProfile.Profile() as profile:
            assert command(first, *words).code == 0
        counts.append(sum(entry.callcount for entry in profile.getstats()))
    assert counts[1] - counts[0] <= 400 * most


@pytest.mark.heavy
def test_a_million_tensors_are_described_within_ten_seconds(tmp_path: Path, numbers: Numbers) -> None:
    if numbers != NUMBERS["notes"]:
        pytest.skip("timed, and so for a machine with nothing else to do: --heavy notes")
    header, position = {}, 0
    for i in range(500_000):
        for ending, shape, size in (("weight", [2, 3], 24), ("bias", [2], 8)):
            place = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
            header[f"layers.{i // 100}.{i % 100}.{ending}"] = place
            position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    file = tmp_path / "large.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(position))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "r2m", "inspect", str(file)], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ": 1000000 tensors, 4 M parameters" in done.stdout
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime <= 10  # what others do here is not ours


def test_a_set_that_fits(checkpoints: Checkpoints, command: Command) -> None:
    paths = [checkpoints.base_path, *checkpoints.paths.values()]
    result = command("inspect", *paths)
    assert result.code == 0
    verdict, following = result.out.splitlines()[-2:]
    assert following == f"Next: r2m init {' '.join(paths)}"
    assert verdict.startswith("can be merged into base.safetensors: ")
    counts = {"2 matrices merged", "2 vectors merged", "2 kept as the base's"}
    assert set(verdict.partition(": ")[2].split(", ")) == counts
    rows = [line for line in command("inspect", "--norms", *paths).out.splitlines() if "task vector" in line]
    assert [row.split()[-1] for row in rows] == ["fs.safetensors", "fr.safetensors", "efs.safetensors"]
    matrices = ("block.weight", "conv.weight")
    moved = [
        torch.cat([(checkpoints.experts[name][key] - checkpoints.base[key]).flatten() for key in matrices])
        for name in checkpoints.experts
    ]
    for row, change in zip(rows, moved, strict=True):
        words = row.split()
        assert float(words[2]) == pytest.approx(float(change.norm()), rel=1e-3)
        wanted = [float(torch.cosine_similarity(change, other, dim=0)) for other in moved]
        assert [float(word) for word in words[5:-1]] == pytest.approx(wanted, abs=0.006)


def test_a_set_that_does_not_fit(checkpoints: Checkpoints, command: Command) -> None:
    tensors = load_file(checkpoints.paths["fs"])
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, "wrapped.pth")
    result = command("inspect", checkpoints.base_path, "wrapped.pth")
    assert result.code == 1
    assert "begin   module 6" in result.out
    assert "cannot be merged: wrapped.pth does not fit base.safetensors" in result.out
    assert "its names carry the prefix 'module.' that the base's lack" in result.out
    assert command("inspect", checkpoints.base_path, "wrapped.pth", "--rename", "module.=").code == 0


def test_heads_and_ties_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.chdir(tmp_path)
    weight = torch.zeros(5, 4)
    torch.save(
        {"embed.weight": weight, "tied.weight": weight, "head.bias": torch.zeros(2), "head.weight": torch.zeros(2, 4)},
        "m.pth",
    )
    result = command("inspect", "m.pth")
    assert "4 tensors, 30 parameters, 120 B" in result.out
    assert "  heads   head.weight [2, 4], head.bias [2]\n" in result.out
    assert "  tied    tied.weight = embed.weight\n" in result.out


def test_a_quantised_weight_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"q.weight": torch.ones(4, 3, dtype=torch.int8), "q.SCB": torch.ones(4)}, "m.pth")
    assert "  stored  'q.weight' holds the integers of a quantised weight" in command("inspect", "m.pth").out
    result = command("merge", "--base", "m.pth", "--expert", "m.pth", "--out", "out")
    assert result.code == 2
    assert "dequantise it" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", FAMILIES)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_families_are_known_by_a_name_and_its_shape(ending: str, prefix: str) -> None:
    specs = {f"{prefix}{ending}": TensorSpec((64, 3, 14, 14), torch.float32)}
    found = family({name: spec.shape for name, spec in specs.items()})
    assert found is not None
    assert found.startswith(FAMILIES[ending])
    assert "64 wide" in found
    assert family({"something.else": (1,)}) is None
    assert classifier(specs) == []


def test_what_cannot_be_read_is_refused(checkpoints: Checkpoints, command: Command) -> None:
    result = command("inspect", checkpoints.base_path, "nowhere")
    assert (result.code, result.err) == (2, "Error: nowhere: no such file or directory\n")
    save_file({"a\x1b[31m": torch.ones(2, 2)}, "odd.safetensors")
    assert "\x1b" not in command("inspect", "odd.safetensors").out
