"""Checkpoints of timm, open_clip, transformers and torchvision, made by them, merged, and loaded back by them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from libraries import with_libraries
from r2m.commands.main import main

EXPERTS = ("fs", "fr", "efs")
zoo = partial(with_libraries, "zoo.py")


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
        assert numbers["detected"] <= 1e-6, (name, numbers)
    found = zoo("check", tmp_path)
    assert found.keys() == kinds.keys()
    for name, numbers in found.items():
        assert numbers["difference"] <= 2e-5 * max(1.0, numbers["from the first expert"]), (name, numbers)
        assert numbers["from the first expert"] > 1e-3, (name, numbers)
