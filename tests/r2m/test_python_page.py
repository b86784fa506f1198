"""docs/python.md, run as a reader would: its blocks in order, in an empty directory; and what ``r2m`` exports."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import r2m
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # of the process, which is the tests'
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr()
    assert "<Analysis of 2 experts (fs, fr): " in said.out
    assert "Shared by all (the core): fs " in said.out
    assert "rank: expected a ratio in (0, 1] or a whole number of at least 1, got 2.5" in said.out
    assert "adding up: done in " in said.err
    weights = [torch.load(f"{out}/model.pth") for out in ("merged", "again")]
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


def test_what_the_package_exports() -> None:
    assert all(callable(getattr(r2m, name)) for name in r2m.__all__)
    assert {*r2m.__all__} <= {*dir(r2m)}
    with pytest.raises(AttributeError, match="module 'r2m' has no attribute 'merge_file'"):
        _ = r2m.merge_file
