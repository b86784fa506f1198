"""Small checkpoints on disk, and the command run in this process or in one of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest
import r2m
import torch
from r2m.commands.main import main
from safetensors.torch import save_file
from torch import Tensor

import r2m_kernels

NAMES = ("fs", "fr", "efs")


def state_dict(seed: int) -> dict[str, Tensor]:
    """A matrix, a convolution, vectors, an integer buffer, a 0-d and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "block.weight": normal(24, 17),
        "block.bias": normal(24),
        "conv.weight": normal(6, 4, 3, 3),
        "position_ids": torch.arange(7),
        "scale": normal(),
        "empty": torch.zeros(0, 5),
    }


@dataclass(frozen=True)
class Checkpoints:
    """Files in the current directory, named relative to it."""

    base: dict[str, Tensor]
    experts: dict[str, dict[str, Tensor]]
    base_path: str
    paths: dict[str, str]

    @property
    def arguments(self) -> list[str]:
        """``--base … --expert …`` for all of them."""
        experts = [word for name, path in self.paths.items() for word in ("--expert", f"{name}={path}")]
        return ["--base", self.base_path, *experts]


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    monkeypatch.chdir(tmp_path)
    base = state_dict(0)
    experts: dict[str, dict[str, Tensor]] = {}
    save_file(base, "base.safetensors")
    for seed, name in enumerate(NAMES, start=1):
        noise = state_dict(seed)
        experts[name] = {
            key: value + 0.1 * noise[key] if value.is_floating_point() else value for key, value in base.items()
        }
        save_file(experts[name], f"{name}.safetensors")
    return Checkpoints(base, experts, "base.safetensors", {name: f"{name}.safetensors" for name in NAMES})


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``r2m`` with these arguments in this process: a traceback would be an exception of the test."""

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def start() -> Callable[..., forked.Child | subprocess.Popen[str]]:
    """A process with ``r2m`` and these arguments in the current directory: forked, or new with ``python OPTIONS…``.

    Instead of ``r2m`` a ``script`` may be run; ``environment`` is added to this process's; ``limits`` are of
    :mod:`resource`.
    """

    def run(
        *arguments: str,
        python: tuple[str, ...] | None = None,
        script: str | None = None,
        environment: dict[str, str] | None = None,
        limits: dict[int, int] | None = None,
    ) -> forked.Child | subprocess.Popen[str]:
        sources = {str(Path(str(module.__file__)).parents[1]) for module in (r2m, r2m_kernels)}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sorted(sources)), **(environment or {})}
        if python is None:
            return forked.start(arguments, script, environment, limits)
        assert not limits
        return subprocess.Popen(
            [sys.executable, *python, *(["-m", "r2m"] if script is None else ["-c", script]), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.fixture
def fingerprint() -> Callable[[Path], dict[str, tuple[str, int]]]:
    """Every file below a directory: its content's hash and its time of change."""

    def of(directory: Path) -> dict[str, tuple[str, int]]:
        return {
            str(path.relative_to(directory)): (
                hashlib.sha256(path.read_bytes()).hexdigest(),
                path.stat().st_mtime_ns,
            )
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }

    return of
