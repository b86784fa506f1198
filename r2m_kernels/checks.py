"""Checks of options and their sentences: what, where, expected, got. Without torch, for commands that only talk."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import BadOption, quoted

LARGEST = 1e30  # of an option: products with it still fit float32


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'rank'?"``, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """A whole number as int."""
    expected = "a whole number" if minimum is None else f"a whole number of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise BadOption(f"{name}: expected {expected}, got {value!r}")
    if minimum is not None and value < minimum:
        raise BadOption(f"{name}: expected {expected}, got {value}")
    return int(value)


def number(name: str, value: Any, minimum: float | None = None) -> float:
    """A finite number as float, at most :data:`LARGEST`."""
    if type(value) is float and -LARGEST <= value <= LARGEST and (minimum is None or value >= minimum):
        return value  # in every call of an operator
    expected = "a finite number" if minimum is None else f"a finite number of at least {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadOption(f"{name}: expected {expected}, got {value!r}")
    try:
        result = float(value)
    except OverflowError:  # an integer of hundreds of digits
        result = math.copysign(LARGEST * 2, value)
    if LARGEST < abs(result) < math.inf:
        raise BadOption(f"{name}: expected {expected} up to {LARGEST:g}, got {value}")
    if not math.isfinite(result) or (minimum is not None and result < minimum):
        raise BadOption(f"{name}: expected {expected}, got {value}")
    return result


def share(name: str, value: Any) -> float:
    """A number in (0, 1]."""
    result = number(name, value)
    if not 0.0 < result <= 1.0:
        raise BadOption(f"{name}: expected a number in (0, 1], got {value}")
    return result


def weights(name: str, value: Any) -> tuple[float, ...]:
    """Positive numbers, one per expert; how many there are is checked where the experts are known."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise BadOption(f"{name}: expected one positive number per expert, got {value!r}")
    values = tuple(number(f"{name}[{index}]", item) for index, item in enumerate(value))
    for index, item in enumerate(values):
        if item <= 0:
            raise BadOption(f"{name}[{index}]: expected a positive number, got {item:g}")
    return values


def rank(name: str, value: Any) -> float | int:
    """A truncation rank: an integer of at least 1, or a ratio in (0, 1]."""
    expected = "a ratio in (0, 1] or a whole number of at least 1"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadOption(f"{name}: expected {expected}, got {value!r}")
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise BadOption(f"{name}: expected {expected}, got {value}")
        return int(value)
    ratio = float(value)
    if not 0.0 < ratio <= 1.0:  # also refuses NaN
        raise BadOption(f"{name}: expected {expected}, got {value}")
    return ratio


def ranks(name: str, value: Any) -> tuple[tuple[str, float | int], ...]:
    """Pairs of a glob and a rank."""
    expected = "pairs of a name pattern and a rank, such as [('*.attn.*', 0.2)]"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise BadOption(f"{name}: expected {expected}, got {value!r}")
    for pair in value:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], str):
            raise BadOption(f"{name}: expected {expected}, got {pair!r}")
    return tuple((pattern, rank("rank", of_pattern)) for pattern, of_pattern in value)


def boolean(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise BadOption(f"{name}: expected True or False, got {value!r}")
    return value


def text(name: str, value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise BadOption(f"{name}: expected a text, got {value!r}")
    return value


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of ``choices``."""
    if value not in choices:
        listed = ", ".join(f"'{item}'" for item in choices)
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise BadOption(f"{name}: expected one of {listed}, got {value!r}{hint}")
    return str(value)


def globs(name: str, value: Any) -> tuple[str, ...]:
    """Name patterns as a tuple; a single one may come as it is."""
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(item, str) for item in patterns):
        raise BadOption(f"{name}: expected a sequence of name patterns, got {value!r}")
    return tuple(patterns)


def known_fields(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Names of options that exist."""
    for name in given:
        if name not in known:
            raise BadOption(f"unknown option {quoted(name)}{did_you_mean(name, known)}")


def not_empty(what: str, items: Sequence[Any]) -> None:
    """At least one."""
    if not items:
        raise BadOption(f"{what}: expected at least one, got none")


def same_length(what: str, items: Sequence[Any], length: int) -> None:
    """As many as expected."""
    if len(items) != length:
        raise BadOption(f"{what}: expected {length}, got {len(items)}")


def all_or_none(what: str, given: Sequence[bool]) -> None:
    """Arguments that come together."""
    if any(given) and not all(given):
        raise BadOption(f"{what}: expected all of them or none, got some")


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def byte_size(what: str, value: int | str) -> int:
    """A positive number of bytes, from an integer or a text such as ``"4GiB"`` or ``"500 MB"``."""
    expected = "a positive size such as 4GiB or 500MB"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", value)
        if not match or match[2].upper() not in _UNITS:
            raise BadOption(f"{what}: expected {expected}, got {value!r}")
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    else:
        size = integer(what, value)
    if size < 1:
        raise BadOption(f"{what}: expected {expected}, got {value!r}")
    return size
