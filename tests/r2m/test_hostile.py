"""Mutated checkpoints: each is read or refused by one clean sentence, and none runs code, hangs or takes the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Child
from heavy import Numbers

PROGRAM = Path(__file__).with_name("fuzz_inputs.py")
Start = Callable[..., Child]
SHARES = {"safetensors": 0.4, "index": 0.2, "torch": 0.4}


def fuzz(start: Start, kind: str, count: int, seed: int) -> None:
    with start(kind, str(count), str(seed), script=PROGRAM.read_text()) as child:
        out, err = child.communicate(timeout=1500)
    assert child.returncode == 0, err[-3000:]
    assert int(out) >= count * 0.9  # hypothesis may find a space exhausted


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", SHARES)
def test_two_hundred_mutated_inputs(kind: str, here: Path, start: Start) -> None:
    fuzz(start, kind, int(200 * SHARES[kind]), 0)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", SHARES)
def test_many_mutated_inputs(kind: str, here: Path, start: Start, numbers: Numbers) -> None:
    fuzz(start, kind, int(numbers.inputs * SHARES[kind]), 1)
