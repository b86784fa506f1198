"""``--screen``: who is no specialist like the others is refused or left out, and report, card and recipe say it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from conftest import Result

    Command = Callable[..., Result]

MODEL = "model.safetensors"
GOOD = ("--base", "base.safetensors", "--expert", "fs=fs.safetensors", "--expert", "fr=fr.safetensors")
BAD = ("--expert", "bad=bad.safetensors")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three specialists of one base, and one of another."""
    monkeypatch.chdir(tmp_path)
    dice = torch.Generator().manual_seed(0)
    base = {"body.weight": torch.randn(20, 30, generator=dice), "head.weight": torch.randn(2, 20, generator=dice)}
    shared = {name: 0.1 * torch.randn(one.shape, generator=dice) for name, one in base.items()}
    save_file(base, "base.safetensors")
    for name in ("fs", "fr", "efs"):
        state = {
            key: base[key] + shared[key] + 0.1 * torch.randn(one.shape, generator=dice) for key, one in base.items()
        }
        save_file(state, f"{name}.safetensors")
    save_file({key: torch.randn(one.shape, generator=dice) for key, one in base.items()}, "bad.safetensors")


def test_left_out_it_is_told_everywhere_and_the_merge_is_that_of_the_others(command: Command) -> None:
    result = command("merge", *GOOD, *BAD, "--out", "out", "--screen", "leave-out")
    assert result.code == 0, result.err
    assert "left out by --screen: expert 'bad': its task vector has" in result.err
    assert command("merge", *GOOD, "--out", "others", "--quiet").code == 0
    assert Path("out", MODEL).read_bytes() == Path("others", MODEL).read_bytes()
    report = json.loads(Path("out/r2m_report.json").read_text())
    assert report["experts"] == ["fs", "fr"]
    screening = report["screening"]
    assert screening["asked"] == "leave-out"
    assert list(screening["suspects"]) == ["bad"]
    assert screening["numbers"]["bad"]["moved"] > 1.15 > screening["numbers"]["fs"]["moved"]
    assert "* Left out, as no specialist like the others: bad, since its task vector has" in (
        Path("out/README.md").read_text()
    )
    assert "bad" not in Path("out/r2m_config.yaml").read_text()
    assert "screening" not in json.loads(Path("others/r2m_report.json").read_text())


def test_refused_nothing_is_written(command: Command) -> None:
    result = command("merge", *GOOD, *BAD, "--out", "out", "--screen", "refuse")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("Error: screen: expert 'bad': its task vector has 1")
    assert not [path for path in Path().iterdir() if path.name.startswith("out")]


def test_a_new_specialist_is_looked_at_before_it_is_added(command: Command) -> None:
    assert command("merge", *GOOD, "--out", "out", "--quiet").code == 0
    before = load_file(f"out/{MODEL}")
    assert command("add", "out", *BAD, "--screen", "refuse").code == 2
    assert all(torch.equal(one, before[name]) for name, one in load_file(f"out/{MODEL}").items())
    assert command("add", "out", "--expert", "efs=efs.safetensors", "--screen", "refuse", "--quiet").code == 0
    report = json.loads(Path("out/r2m_report.json").read_text())
    assert (report["experts"], report["screening"]["suspects"]) == (["fs", "fr", "efs"], {})
