"""mergekit and fusion_bench, by their own commands, make with our methods what ``r2m merge`` makes of the files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from libraries import ROOT, environment
from safetensors.torch import load_file

if TYPE_CHECKING:
    from conftest import Result

    Command = Callable[..., Result]

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
EXPERTS = ("fs", "fr", "efs")
# What each of plugin_merges.py's configurations is on our command line.
OURS = {
    "mergekit r2m": ("--rank", "0.3", "--core-mode", "mean"),
    "mergekit tsv_m": ("--method", "tsv_m", "--scale", "0.7"),
    "mergekit weighted": (),
    "mergekit bfloat16": ("--dtype", "bfloat16"),
    "fusion_bench": ("--rank", "0.3", "--core-mode", "mean"),
}
REFUSED = {
    "gradient": "expected the same for all, since core and norms are of all tensors",
    "unknown option": "core_mode: expected one of",
    "layers moved": "expected whole models, without slices of other layers or a new vocabulary",
    "names in memory": "leaves out 32 of 40 tensors",
}


@pytest.mark.slow  # 25 s
def test_their_commands_write_our_bits(tmp_path: Path, command: Command) -> None:
    assert PYTHON.exists(), "fusion-bench and mergekit are not installed: make bench-peers"
    script = [PYTHON, ROOT / "tests" / "r2m" / "plugin_merges.py", tmp_path]
    theirs = subprocess.run(script, capture_output=True, text=True, check=False, env=environment(), cwd=tmp_path)
    assert theirs.returncode == 0, theirs.stderr
    said = json.loads(theirs.stdout.splitlines()[-1])
    for name, words in REFUSED.items():
        assert words in said.pop(name)
        assert not list((tmp_path / f"mergekit {name}").glob("*.safetensors"))
    assert {key for key, words in said.items() if words} == set(), said
    for name, options in OURS.items():
        out = tmp_path / f"ours {name}"
        if name == "mergekit weighted":
            recipe = tmp_path / "weighted-ours.json"
            models = [{"name": one, "model": str(tmp_path / one), "weight": i + 1} for i, one in enumerate(EXPERTS)]
            recipe.write_text(json.dumps({"base_model": str(tmp_path / "base"), "models": models}))
            done = command("merge", str(recipe), "--out", str(out))
        else:
            experts = [word for one in EXPERTS for word in ("--expert", f"{one}={tmp_path / one}")]
            done = command("merge", "--base", str(tmp_path / "base"), *experts, *options, "--out", str(out))
        assert done.code == 0, done.err
        ours = load_file(out / "model.safetensors")
        path = tmp_path / name / "model.safetensors"
        made = load_file(path) if path.exists() else torch.load(tmp_path / f"{name}.pth")
        assert ours.keys() == made.keys()
        for tensor, value in ours.items():
            assert value.dtype == made[tensor].dtype, (name, tensor)
            assert torch.equal(value, made[tensor]), (name, tensor)
