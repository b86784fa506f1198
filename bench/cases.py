"""What is measured on CPUs: matrices of known spectra, state dicts of ViT-L/14's shapes, and the same as files.

Nothing here runs by itself; ``python -m bench.run`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

StateDict = dict[str, Tensor]

WIDTH = 1024


def block_shapes(width: int) -> dict[str, tuple[int, int]]:
    """Of the matrices of one Transformer block, whose MLP is four times as wide."""
    squares = {f"attention.{name}": (width, width) for name in ("q", "k", "v", "out")}
    return {**squares, "mlp.up": (4 * width, width), "mlp.down": (width, 4 * width)}


BLOCK = block_shapes(WIDTH)


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


def optimum(x: Tensor, rank: int) -> float:
    """‖X − X_r‖ of the best X_r, from the eigenvalues of the short side's Gram.

    Its rounding in float64 is far below the tails that are asked for here.
    """
    x = x.double()
    if x.shape[0] > x.shape[1]:
        x = x.mT
    return float(torch.linalg.eigvalsh(x @ x.mT)[: len(x) - rank].clamp_min(0).sum().sqrt())


def decaying(m: int, n: int, source: torch.Generator) -> Tensor:
    """(m, n) float32 on the generator's device, with singular values falling about like k^-1/2."""
    size = min(m, n)
    weights = torch.arange(1, size + 1, device=source.device).rsqrt()
    left = torch.randn(m, size, generator=source, device=source.device)
    right = torch.randn(size, n, generator=source, device=source.device)
    return (left * weights) @ right / size


def checkpoints(
    blocks: int,
    experts: int,
    source: torch.Generator | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[StateDict, list[StateDict]]:
    """A base and experts whose task vectors have a common part and singular values falling like k^-1/2.

    Args:
        blocks, experts: how many.
        source: of random numbers, on the device of the tensors; by default the CPU's of seed 0.
        shapes: of one block's matrices; by default ViT-L/14's.
        dtype: of all tensors.
    """
    source = source or torch.Generator().manual_seed(0)
    base: StateDict = {}
    states: list[StateDict] = [{} for _ in range(experts)]
    for block in range(blocks):
        for name, shape in (shapes or BLOCK).items():
            key = f"blocks.{block}.{name}.weight"
            theta = 0.02 * torch.randn(*shape, generator=source, device=source.device)
            common = decaying(*shape, source)
            base[key] = theta.to(dtype)
            for state in states:
                state[key] = (theta + 0.02 * (0.6 * common + decaying(*shape, source))).to(dtype)
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
