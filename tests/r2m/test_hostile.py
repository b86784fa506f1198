"""Mutated files of strangers: each is read or refused by clean sentences; none runs code, hangs or takes the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Child
from heavy import Numbers

CHECKPOINTS, PROJECTS = (Path(__file__).with_name(f"fuzz_{name}.py") for name in ("inputs", "projects"))
Start = Callable[..., Child]
SHARES = {"safetensors": 0.3, "index": 0.15, "torch": 0.35, "projects": 0.2}


def fuzz(start: Start, kind: str, count: int, seed: int) -> None:
    words, program = ([], PROJECTS) if kind == "projects" else ([kind], CHECKPOINTS)
    with start(*words, str(count), str(seed), script=program.read_text()) as child:
        out, err = child.communicate(timeout=1500)
    assert child.returncode == 0, err[-3000:]
    assert int(out) >= count * 0.9  # hypothesis may find a space exhausted


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", SHARES)
def test_mutated_inputs(kind: str, here: Path, start: Start) -> None:
    fuzz(start, kind, int(150 * SHARES[kind]), 0)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", SHARES)
def test_many_mutated_inputs(kind: str, here: Path, start: Start, numbers: Numbers) -> None:
    fuzz(start, kind, int(numbers.inputs * SHARES[kind]), 1)
