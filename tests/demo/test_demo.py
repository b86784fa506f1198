"""The demo from photographs to table, with very little training."""

from __future__ import annotations

import csv
import importlib.util
import io
import json

import pytest
import r2m.demo
import safetensors.torch
import torch
from r2m.demo import run_demo
from r2m.demo.networks import load_detector, new_detector, save_detector
from r2m.demo.table import COLUMNS, METHODS
from r2m.demo.training import Recipe as Training
from r2m.demo.training import Setting
from r2m.merge import merge_files
from r2m.recipe import Expert, Recipe
from rich.console import Console

from r2m_kernels.errors import BadCheckpoint, BadOption, InvalidInput

CHECKPOINTS = [
    "base.safetensors",
    "specialists/fs.safetensors",
    "specialists/fr.safetensors",
    "specialists/efs.safetensors",
    "joint.safetensors",
]
MERGED = ["r2m", "weight_average", "task_arithmetic", "cart"]


# The same flow and files as the demo's, in seconds; what it measures means nothing.
SECONDS = Setting(
    Training(16, batch=32, learning_rate=2e-3),
    Training(12, batch=32),
    training_draws=2,
    validation_draws=1,
    test_draws=1,
)


# The slowest test of the demo: about 20 seconds on two idle cores.
def test_the_whole_demo(tmp_path):
    out = tmp_path / "out"
    foreign = out / "specialists" / "mine.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("keep me")
    (out / "base.safetensors").write_bytes(b"left by an interrupted run")
    console = Console(file=io.StringIO(), width=100)

    result = run_demo(out, quick=True, setting=SECONDS, console=console)

    printed = console.file.getvalue()
    assert foreign.read_text() == "keep me"
    assert tuple(row.method for row in result.rows) == METHODS
    for row in result.rows:
        assert tuple(row.auc) == COLUMNS
        assert all(0 <= value <= 1 for value in row.auc.values())
        assert row.method in printed

    states = [load_detector(out / name).state_dict() for name in CHECKPOINTS]
    assert len({state["head.weight"].numpy().tobytes() for state in states}) == len(states)  # all were trained
    tracked = "backbone.blocks.0.norm.num_batches_tracked"
    assert all(state[tracked] == states[0][tracked] > 0 for state in states)  # the base's statistics, kept

    base, experts = (
        out / "base.safetensors",
        dict(zip(("FS", "FR", "EFS"), (out / name for name in CHECKPOINTS[1:4]), strict=True)),
    )
    merge_files(Recipe(str(base), Expert.each(experts)), tmp_path / "again")
    assert result.merged == out / "merged" / "r2m" / "model.safetensors"
    assert result.merged.read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    average = load_detector(out / "merged" / "weight_average" / "model.safetensors").state_dict()
    name = "backbone.blocks.2.conv.weight"
    assert torch.allclose(average[name], sum(state[name] for state in states[1:4]) / 3, atol=1e-6)
    for method in MERGED:
        assert json.loads((out / "merged" / method / "r2m_report.json").read_text())["method"] == method

    content = json.loads((out / "table.json").read_text())
    lines = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [entry["method"] for entry in content["rows"]] == [line["method"] for line in lines] == list(METHODS)
    assert content["notes"] == list(result.notes)
    assert any("ORL faces, AT&T Laboratories Cambridge" in note for note in result.notes)
    assert any("task arithmetic scale" in note and "CART rank" in note for note in result.notes)
    for picture in ("auc", "roc", "forgeries"):
        assert (out / "pictures" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.rglob("*") if "partial" in path.name]


@pytest.fixture
def no_training(monkeypatch):
    def train(*args):
        raise AssertionError("training began")

    monkeypatch.setattr(r2m.demo, "train_detectors", train)


@pytest.mark.usefixtures("no_training")
def test_what_cannot_end_well_is_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(BadOption, match="threads must be at least 1, got 0"):
        run_demo(tmp_path, threads=0)
    with pytest.raises(BadOption, match="seed must be in 0"):
        run_demo(tmp_path, seed=-1)
    for module, package in (("matplotlib", "matplotlib"), ("scipy", "scipy"), ("sklearn", "scikit-learn")):
        with monkeypatch.context() as patched:
            patched.setattr(importlib.util, "find_spec", lambda name, missing=module: name != missing or None)
            with pytest.raises(BadOption, match=rf"needs the package {package}: pip install '{package}[><=]"):
                run_demo(tmp_path)
    foreign = tmp_path / "merged" / "cart" / "thesis.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("keep me")
    with pytest.raises(InvalidInput, match="merged/cart"):
        run_demo(tmp_path)
    assert foreign.read_text() == "keep me"
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="not a directory"):
        run_demo(tmp_path / "file")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_detector(new_detector(0), tmp_path / "whole.safetensors")
    state = safetensors.torch.load_file(tmp_path / "whole.safetensors")
    assert torch.equal(state["head.bias"], new_detector(0).head.bias)
    state.pop("head.bias")
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(BadCheckpoint, match=r"other\.safetensors: does not hold the demo's detector.*head\.bias"):
        load_detector(tmp_path / "other.safetensors")
