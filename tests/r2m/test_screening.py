"""``--screen``: who is no specialist like the others is refused or left out, and report, card and recipe say it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.mark.slow
def test_processes_of_torchrun_see_the_same_and_merge_the_same(command: Command) -> None:
    given = ["merge", *GOOD, "--expert", "efs=efs.safetensors", *BAD, "--method", "star", "--keep-factors", "--quiet"]

    def together(*more: str) -> subprocess.CompletedProcess[str]:
        launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "r2m", *given, *more]
        environment = {**os.environ, "MASTER_PORT": "0"}
        return subprocess.run(launched, env=environment, capture_output=True, text=True, timeout=280, check=False)

    assert command(*given, "--screen", "leave-out", "--out", "one").code == 0
    done = together("--screen", "leave-out", "--out", "two")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(out, "r2m_report.json").read_text()) for out in ("one", "two"))
    assert list(one["screening"]["suspects"]) == ["bad"]
    assert (one["screening"], one["notes"]) == (two["screening"], two["notes"])
    assert Path("one", MODEL).read_bytes() == Path("two", MODEL).read_bytes()
    kept = [{path.name: path.read_bytes() for path in Path(f"{out}.factors").iterdir()} for out in ("one", "two")]
    assert kept[0] == kept[1] != {}
    alone = command(*given, "--screen", "refuse", "--out", "no")
    refused = together("--screen", "refuse", "--out", "no")
    assert alone.code == 2
    assert refused.returncode != 0
    assert [line for line in refused.stderr.splitlines() if line.startswith("Error: ")] == alone.err.splitlines()
    assert not {"no", "no.partial"} & set(os.listdir())
