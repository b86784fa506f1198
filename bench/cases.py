"""What is measured on CPUs: matrices of known spectra, state dicts of ViT-L/14's shapes, and the same as files.

Nothing here runs by itself; ``python -m bench.run`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

StateDict = dict[str, Tensor]

WIDTH = 1024
BLOCK = {
    "attention.q": (WIDTH, WIDTH),
    "attention.k": (WIDTH, WIDTH),
    "attention.v": (WIDTH, WIDTH),
    "attention.out": (WIDTH, WIDTH),
    "mlp.up": (4 * WIDTH, WIDTH),
    "mlp.down": (WIDTH, 4 * WIDTH),
}


def _spikes(count: int, bulk: float) -> Callable[[Tensor], Tensor]:
    return lambda k: torch.where(k <= count, 1.0, bulk * torch.linspace(1, 0.05, len(k), dtype=k.dtype))


# Singular values s_k, k = 1 … size. The first five are what the promise of 1.02 x the optimum is about; the others are
# where a method that squares or shifts in float32 can fail.
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda k: torch.linspace(1, 0.05, len(k), dtype=k.dtype),
    "k^-1/2": lambda k: k**-0.5,
    "k^-1": lambda k: 1 / k,
    "16 spikes": _spikes(16, 0.1),
    "noise": lambda k: torch.full_like(k, float("nan")),  # no orthogonal factors: see matrix()
    "k^-2": lambda k: k**-2,
    "19 spikes": _spikes(19, 1 / 140),
}
PROMISED = ("linear", "k^-1/2", "k^-1", "16 spikes", "noise")


def matrix(spectrum: str, m: int, n: int, seed: int = 0) -> Tensor:
    """(m, n) float32 with the named singular values and random singular vectors; ``noise`` is Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    if spectrum == "noise":
        return torch.randn(m, n, generator=generator)
    size = min(m, n)
    values = SPECTRA[spectrum](torch.arange(1, size + 1, dtype=torch.float64))
    left = torch.linalg.qr(torch.randn(m, size, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64)).Q
    return ((left * values) @ right.T).float()


def checkpoints(blocks: int, experts: int, seed: int = 0) -> tuple[StateDict, list[StateDict]]:
    """A base and experts whose task vectors have a common part and singular values falling like k^-1/2."""
    generator = torch.Generator().manual_seed(seed)

    def decaying(m: int, n: int) -> Tensor:
        size = min(m, n)
        weights = torch.arange(1, size + 1).rsqrt()
        left, right = torch.randn(m, size, generator=generator), torch.randn(size, n, generator=generator)
        return (left * weights) @ right / size

    base: StateDict = {}
    states: list[StateDict] = [{} for _ in range(experts)]
    for block in range(blocks):
        for name, (m, n) in BLOCK.items():
            key = f"blocks.{block}.{name}.weight"
            base[key] = 0.02 * torch.randn(m, n, generator=generator)
            common = decaying(m, n)
            for state in states:
                state[key] = base[key] + 0.02 * (0.6 * common + decaying(m, n))
    return base, states


def first_blocks(state: StateDict, blocks: int) -> StateDict:
    """The tensors of the first ``blocks`` blocks, not copied."""
    return {name: tensor for name, tensor in state.items() if int(name.split(".")[1]) < blocks}


def write_checkpoints(directory: Path, blocks: int, experts: int) -> tuple[Path, list[Path]]:
    """The same as safetensors files: the base's path and the experts'."""
    base, states = checkpoints(blocks, experts)
    paths = [directory / "base.safetensors", *(directory / f"expert{i}.safetensors" for i in range(experts))]
    for path, state in zip(paths, (base, *states), strict=True):
        save_file(state, path)
    return paths[0], paths[1:]
