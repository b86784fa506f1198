"""Checkpoints of timm, open_clip, transformers and torchvision, made by them, merged, and loaded back by them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import r2m
from r2m.commands.main import main

import r2m_kernels

PYTHON = Path(__file__).resolve().parents[2] / ".venv-zoo" / "bin" / "python"
EXPERTS = ("fs", "fr", "efs")


def zoo(command: str, directory: Path) -> dict[str, Any]:
    assert PYTHON.exists(), "their environment is missing: make zoo"
    script = Path(__file__).with_name("zoo.py")
    sources = os.pathsep.join(str(Path(str(module.__file__)).parents[1]) for module in (r2m, r2m_kernels))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": sources}
    run = subprocess.run(
        [PYTHON, script, command, directory], capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_what_libraries_save_is_merged_and_loads_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = zoo("make", tmp_path)
    for name, (options, ending, clip_as_base) in kinds.items():
        place = tmp_path / name
        base = place / ("base" if clip_as_base else f"base{ending}")
        experts = [word for expert in EXPERTS for word in ("--expert", f"{expert}={place / expert}{ending}")]
        arguments = ["merge", "--base", str(base), *experts, "--out", str(place / "merged"), "--quiet"]
        code = main([*arguments, "--method", "weight_average", *options])
        assert code == 0, (name, capsys.readouterr().err)
        # R²M itself goes through as well, to the same names and shapes.
        assert main([*arguments[:-2], str(place / "r2m"), "--quiet", *options]) == 0, name
    for name, numbers in zoo("evaluate", tmp_path).items():
        assert numbers["code"] == 0, name
        assert numbers["difference"] <= 1e-6 < numbers["spread"], (name, numbers)
    found = zoo("check", tmp_path)
    assert found.keys() == kinds.keys()
    for name, numbers in found.items():
        assert numbers["difference"] <= 2e-5 * max(1.0, numbers["from the first expert"]), (name, numbers)
        assert numbers["from the first expert"] > 1e-3, (name, numbers)
