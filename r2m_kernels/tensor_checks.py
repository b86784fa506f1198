"""Checks of the tensors that operators are given, and their sentences: what, expected, got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._stream.tensors import FLOATING, dtype_name
from .checks import did_you_mean
from .errors import BadOption


def floating(what: str, tensor: Tensor) -> None:
    """A tensor of a dtype that can be merged."""
    floating_dtype(what, tensor.dtype)


def same_shape(what: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """A tensor of this shape."""
    if tensor.shape != tuple(shape):
        raise BadOption(f"{what}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def same_device(what: str, tensor: Tensor, device: torch.device) -> None:
    """A tensor on the base's device."""
    if tensor.device != device:
        raise BadOption(f"{what}: expected device {device} as the base, got {tensor.device}")


def ndim(what: str, tensor: Tensor, expected: int) -> None:
    """A tensor of so many dimensions."""
    if tensor.ndim != expected:
        raise BadOption(f"{what}: expected {expected} dimensions, got shape {tuple(tensor.shape)}")


def matrix_like(what: str, tensor: Tensor) -> None:
    """A tensor with rows."""
    if tensor.ndim < 1:
        raise BadOption(f"{what}: expected at least 1 dimension, got a 0-d tensor")


def tall(what: str, tensor: Tensor) -> None:
    """Matrices with no more columns than rows."""
    if tensor.ndim < 2 or tensor.shape[-1] > tensor.shape[-2]:
        raise BadOption(f"{what}: expected shape (..., m, k) with k <= m, got {tuple(tensor.shape)}")


def floating_dtype(what: str, dtype: Any) -> None:
    """A dtype that can be merged."""
    if dtype not in FLOATING:
        names = ", ".join(str(known) for known in FLOATING)
        raise BadOption(f"{what}: expected one of {names}, got {dtype!r}")


def output_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that can be merged to, also by name (``"bfloat16"``); ``None``: each tensor's in the base."""
    names = {dtype_name(known): known for known in FLOATING}
    if isinstance(dtype, str):
        short = dtype.removeprefix("torch.")
        if short not in names:
            raise BadOption(f"dtype: expected one of {', '.join(names)}, got {dtype!r}{did_you_mean(short, names)}")
        return names[short]
    if dtype is not None:
        floating_dtype("dtype", dtype)
    return dtype
