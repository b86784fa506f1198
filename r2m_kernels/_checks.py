"""Every argument check and its sentence: what, where, expected, got."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from r2m_kernels.errors import InvalidInput, shown

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LARGEST = 1e30  # of an option: products with it still fit float32


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'rank'?"``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    expected = "a whole number" if minimum is None else f"a whole number of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidInput(f"{name}: expected {expected}, got {value!r}")
    if minimum is not None and value < minimum:
        raise InvalidInput(f"{name}: expected {expected}, got {value}")
    return int(value)


def number(name: str, value: Any, minimum: float | None = None) -> float:
    expected = "a finite number" if minimum is None else f"a finite number of at least {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidInput(f"{name}: expected {expected}, got {value!r}")
    try:
        result = float(value)
    except OverflowError:  # an integer of hundreds of digits
        result = math.copysign(LARGEST * 2, value)
    if LARGEST < abs(result) < math.inf:
        raise InvalidInput(f"{name}: expected {expected} up to {LARGEST:g}, got {value}")
    if not math.isfinite(result) or (minimum is not None and result < minimum):
        raise InvalidInput(f"{name}: expected {expected}, got {value}")
    return result


def share(name: str, value: Any) -> float:
    """A number in (0, 1]."""
    result = number(name, value)
    if not 0.0 < result <= 1.0:
        raise InvalidInput(f"{name}: expected a number in (0, 1], got {value}")
    return result


def weights(name: str, value: Any) -> tuple[float, ...]:
    """Positive numbers, one per expert; how many there are is checked where the experts are known."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InvalidInput(f"{name}: expected one positive number per expert, got {value!r}")
    found = tuple(number(f"{name}[{index}]", item) for index, item in enumerate(value))
    for index, item in enumerate(found):
        if item <= 0:
            raise InvalidInput(f"{name}[{index}]: expected a positive number, got {item:g}")
    return found


def rank(value: Any) -> float | int:
    """A truncation rank: an integer of at least 1, or a ratio in (0, 1]."""
    expected = "a ratio in (0, 1] or a whole number of at least 1"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidInput(f"rank: expected {expected}, got {value!r}")
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise InvalidInput(f"rank: expected {expected}, got {value}")
        return int(value)
    ratio = float(value)
    if not 0.0 < ratio <= 1.0:  # also refuses NaN
        raise InvalidInput(f"rank: expected {expected}, got {value}")
    return ratio


def ranks(name: str, value: Any) -> tuple[tuple[str, float | int], ...]:
    """Pairs of a glob and a rank."""
    expected = "pairs of a name pattern and a rank, such as [('*.attn.*', 0.2)]"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidInput(f"{name}: expected {expected}, got {value!r}")
    for pair in value:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], str):
            raise InvalidInput(f"{name}: expected {expected}, got {pair!r}")
    return tuple((pattern, rank(of_pattern)) for pattern, of_pattern in value)


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidInput(f"{name}: expected True or False, got {value!r}")


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        listed = ", ".join(f"'{item}'" for item in choices)
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise InvalidInput(f"{name}: expected one of {listed}, got {value!r}{hint}")


def globs(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(item, str) for item in patterns):
        raise InvalidInput(f"{name}: expected a sequence of name patterns, got {value!r}")
    return tuple(patterns)


def known_fields(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise InvalidInput(f"unknown option {shown(name)}{did_you_mean(name, known)}")


def floating(what: str, tensor: Tensor) -> None:
    floating_dtype(what, tensor.dtype)


def same_shape(what: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise InvalidInput(f"{what}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def same_device(what: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise InvalidInput(f"{what}: expected device {device} as the base, got {tensor.device}")


def not_empty(what: str, items: Sequence[Any]) -> None:
    if not items:
        raise InvalidInput(f"{what}: expected at least one, got none")


def same_length(what: str, items: Sequence[Any], length: int) -> None:
    if len(items) != length:
        raise InvalidInput(f"{what}: expected {length}, got {len(items)}")


def ndim(what: str, tensor: Tensor, expected: int) -> None:
    if tensor.ndim != expected:
        raise InvalidInput(f"{what}: expected {expected} dimensions, got shape {tuple(tensor.shape)}")


def matrix_like(what: str, tensor: Tensor) -> None:
    if tensor.ndim < 1:
        raise InvalidInput(f"{what}: expected at least 1 dimension, got a 0-d tensor")


def tall(what: str, tensor: Tensor) -> None:
    if tensor.ndim < 2 or tensor.shape[-1] > tensor.shape[-2]:
        raise InvalidInput(f"{what}: expected shape (..., m, k) with k <= m, got {tuple(tensor.shape)}")


def all_or_none(what: str, given: Sequence[bool]) -> None:
    if any(given) and not all(given):
        raise InvalidInput(f"{what}: expected all of them or none, got some")


def floating_dtype(what: str, dtype: Any) -> None:
    if dtype not in FLOATING:
        names = ", ".join(str(known) for known in FLOATING)
        raise InvalidInput(f"{what}: expected one of {names}, got {dtype!r}")


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def byte_size(what: str, value: int | str) -> int:
    """A positive number of bytes, from an integer or a text such as ``"4GiB"`` or ``"500 MB"``."""
    expected = "a positive size such as 4GiB or 500MB"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", value)
        if not match or match[2].upper() not in _UNITS:
            raise InvalidInput(f"{what}: expected {expected}, got {value!r}")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    else:
        size = integer(what, value)
    if size < 1:
        raise InvalidInput(f"{what}: expected {expected}, got {value!r}")
    return size
