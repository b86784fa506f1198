"""Inputs of the GPU tests: views into buffers of NaN, so that a read outside shows, and outputs among sentinels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SENTINEL = -77.0
MARGIN = 64  # elements: addresses stay aligned


def framed(tensor: Tensor, offset: int = 0, fill: float = math.nan) -> Tensor:
    """The same values, contiguous, with ``fill`` before and after; ``offset`` elements off a 16-byte boundary."""
    buffer = torch.full((tensor.numel() + 2 * MARGIN + offset,), fill, dtype=tensor.dtype, device=tensor.device)
    view = buffer[MARGIN + offset : MARGIN + offset + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def untouched(view: Tensor) -> bool:
    """Whether everything around a view framed in sentinels is still there."""
    buffer = view._base
    assert buffer is not None
    start = view.storage_offset()
    return bool((buffer[:start] == SENTINEL).all() and (buffer[start + view.numel() :] == SENTINEL).all())


def decaying(m: int, n: int, source: torch.Generator) -> Tensor:
    """(m, n) float32 with singular values falling about like k^-1/2."""
    size = min(m, n)
    weights = torch.arange(1, size + 1).rsqrt()
    return (torch.randn(m, size, generator=source) * weights) @ torch.randn(size, n, generator=source) / size


def tensors(
    shape: tuple[int, int], dtype: torch.dtype, count: int, device: torch.device, *, offset: int = 0, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and experts, framed in NaN. Made on the CPU: the same numbers everywhere."""
    source = torch.Generator().manual_seed(seed)
    base = torch.randn(*shape, generator=source)
    common = decaying(*shape, source)
    experts = [base + 0.6 * common + decaying(*shape, source) for _ in range(count)]
    return framed(base.to(device, dtype), offset), [framed(expert.to(device, dtype), offset) for expert in experts]


def mixing_of(count: int) -> Tensor:
    return torch.eye(count, dtype=torch.float64) - torch.linspace(0.5, 1.5, count, dtype=torch.float64)[:, None] / count


def checkpoints(
    shapes: list[tuple[int, int]], dtype: torch.dtype, count: int, device: torch.device, copies: int = 2
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """``copies`` matrices and a vector of each shape, and an integer."""
    base: dict[str, Tensor] = {"steps": torch.tensor(7, device=device)}
    experts: list[dict[str, Tensor]] = [{"steps": torch.tensor(9, device=device)} for _ in range(count)]
    for index, shape in enumerate(shapes):
        for copy in range(copies):
            theta, others = tensors(shape, dtype, count, device, seed=100 * index + copy)
            base[f"layer{index}.{copy}.weight"] = theta
            for expert, other in zip(experts, others, strict=True):
                expert[f"layer{index}.{copy}.weight"] = other
        base[f"layer{index}.bias"] = torch.zeros(shape[0], dtype=dtype, device=device)
        for j, expert in enumerate(experts):
            expert[f"layer{index}.bias"] = torch.full((shape[0],), 0.01 * (j + 1), dtype=dtype, device=device)
    return base, experts


def same_bits(first: Tensor, second: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    one, other = (tensor.cpu().contiguous().view(bits) for tensor in (first, second))
    return first.dtype == second.dtype and torch.equal(one, other)


def all_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(same_bits(first[name], second[name]) for name in first)


def residuals(base: Tensor, experts: list[Tensor], mixing: Tensor) -> Tensor:
    """(N, m, n) float64 on the CPU."""
    tau = torch.stack([expert.cpu().double() - base.cpu().double() for expert in experts])
    return torch.einsum("ji,jmn->imn", mixing, tau)


def worst_excess(left: Tensor, right: Tensor, x: Tensor) -> float:
    """‖X − F‖ / optimum, the worst of the experts."""
    rank, highest = left.shape[2], 0.0
    for residual, one, other in zip(x, left.cpu().double(), right.cpu().double(), strict=True):
        optimum = torch.linalg.svdvals(residual)[rank:].norm()
        highest = max(highest, float((residual - one @ other).norm() / optimum))
    return highest
