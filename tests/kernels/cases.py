"""Checkpoints and matrices that the tests of the numerics share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from r2m_kernels import MergeConfig

StateDict = dict[str, Tensor]

# All rows of a residual alike, all matrices truncated, to a tenth: the former default, and what it is without rows.
ALIKE = {"rank": 0.1, "row_power": 0.0, "whole_up_to": 0}
# R²M with a relative eta, which goes through every step and needs all that they find.
TRUNCATED = MergeConfig.r2m(**ALIKE, eta_mode="relative", eta=0.6, core_mode="mean", head="merge")
# R²M with whole residuals weighted by row.
ROWS = MergeConfig.r2m(rank=1.0, row_power=3.0, head="merge")

# 1-D, 0-d, odd non-square, 3-D, 4-D convolution, a single row, statistics and an integer counter.
SHAPES: dict[str, tuple[int, ...]] = {
    "encoder.weight": (67, 131),
    "encoder.bias": (67,),
    "tall.weight": (150, 41),
    "conv.weight": (48, 5, 3, 3),
    "conv1d.weight": (33, 7, 3),
    "norm.weight": (67,),
    "norm.running_mean": (48,),
    "norm.running_var": (48,),
    "class_token": (1, 1, 53),
    "temperature": (),
}


def checkpoints(
    count: int,
    *,
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    shared: float = 1.0,
    seed: int = 0,
    scales: Sequence[float] | None = None,
) -> tuple[StateDict, list[StateDict]]:
    """A base and ``count`` experts whose task vectors have a common part of relative size ``shared``.

    Every matrix tensor's own part has a decaying spectrum, so that truncation is well posed.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES if shapes is None else shapes
    scales = [1.0] * count if scales is None else scales

    def noise(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    def decaying(shape: Sequence[int]) -> Tensor:
        if len(shape) < 2:
            return noise(shape)
        m, n = shape[0], math.prod(shape[1:])
        u, s, vh = torch.linalg.svd(noise((m, n)), full_matrices=False)
        return (u * (s * 0.7 ** torch.arange(len(s), dtype=torch.float64))) @ vh

    base: StateDict = {}
    experts: list[StateDict] = [{} for _ in range(count)]
    for name, shape in shapes.items():
        theta = 0.05 * noise(shape)
        if name.endswith("running_var"):
            theta = theta.abs() + 0.5
        base[name] = theta.to(dtype)
        common = 0.01 * shared * decaying(shape).reshape(shape)
        for expert, scale in zip(experts, scales, strict=True):
            own = 0.01 * decaying(shape).reshape(shape)
            expert[name] = (base[name].double() + scale * (common + own)).to(dtype)
    base["steps"] = torch.tensor(7)
    for expert in experts:
        expert["steps"] = torch.tensor(9)
    return base, experts


def floating(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if tensor.is_floating_point()}


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """‖first − second‖ over floating-point tensors, float64."""
    return math.sqrt(
        sum(float((first[name].double() - second[name].double()).square().sum()) for name in floating(second))
    )


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype
        and tensor.shape == second[name].shape
        and tensor.reshape(-1)
        .contiguous()
        .view(torch.uint8)
        .equal(second[name].reshape(-1).contiguous().view(torch.uint8))
        for name, tensor in first.items()
    )


def spectrum(kind: str, size: int) -> Tensor:
    """Singular values of the shapes that truncation meets (float64, descending)."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    linear = torch.linspace(1.0, 0.05, size, dtype=torch.float64)
    return {
        "linear": linear,
        "k^-1/2": index**-0.5,
        "k^-1": index**-1.0,
        "16 spikes": torch.where(index <= 16, 20.0 - index, linear),
        "k^-2": index**-2.0,
        "k^-3": index**-3.0,
        "19 spikes": torch.where(index <= 19, 140.0, 1.0) * linear,
        "geometric": 0.9**index,
        "rank 40": torch.where(index <= 40, 1.0, 0.0),
        "rank 8": torch.where(index <= 8, 1.0, 0.0),
        "zero": torch.zeros(size, dtype=torch.float64),
    }[kind]


def matrix_with(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """(m, n) float64 with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    size = min(m, n)
    u = torch.linalg.qr(torch.randn(m, size, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, size, generator=generator, dtype=torch.float64)).Q
    return (u * values) @ v.T


def padded(tensor: Tensor, margin: int = 3) -> Tensor:
    """The same values as a view into a larger buffer of NaN: reading outside the view shows."""
    if tensor.ndim == 0:
        buffer = tensor.new_full((3,), math.nan)
        buffer[1] = tensor
        return buffer[1]
    buffer = tensor.new_full([size + 2 * margin for size in tensor.shape], math.nan)
    view = buffer[tuple(slice(margin, margin + size) for size in tensor.shape)]
    view.copy_(tensor)
    return view
