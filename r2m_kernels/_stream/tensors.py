"""What the merge reads and writes: checkpoints seen as named tensors.

A merge knows two protocols and no storage: a :class:`TensorSource` gives tensors one at a time, a :class:`TensorSink`
takes them one at a time. Dictionaries are served by :mod:`.state_dicts`, files by the application.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .stored import Matrix

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what can be merged


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and so on, as messages and reports say it."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(tensors: Iterable[Matrix]) -> torch.dtype:
    """What these are computed in: float64 where one of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a CPU tensor whose elements lie side by side, for as long as the tensor lives."""
    assert tensor.is_contiguous(), "its elements lie side by side"
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""
    return memoryview(memory).cast("B")  # ctypes calls them "<B", to which Python assigns nothing


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Numbers in float64 on the CPU: all that are on a device with one copy and one wait."""
    away: dict[torch.dtype, list[int]] = {}  # places: those of one dtype are widened by one launch
    for place, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            away.setdefault(tensor.dtype, []).append(place)
    found = [tensor.double() if tensor.device.type == "cpu" else tensor for tensor in tensors]
    places = [place for several in away.values() for place in several]
    if places:
        alike = [torch.cat([tensors[place].reshape(-1) for place in several]).double() for several in away.values()]
        together = (torch.cat(alike) if len(alike) > 1 else alike[0]).cpu()
        parts = torch.split(together, [tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


def tensor_key(seed: int, name: str, shape: Sequence[int]) -> int:
    """63 bits, a function of (seed, tensor name, shape) alone: all that is random about a tensor."""
    key = f"{seed}\0{name}\0{shape[0]}x{math.prod(shape[1:])}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as stored."""
        return self.numel * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint that is read tensor by tensor, from several threads at once.

    Attributes:
        label: how error messages name the checkpoint: a path as the user gave it, or ``base``, ``expert 'fs'``.
        specs: name → :class:`TensorSpec`, in the checkpoint's own order.
        aliases: name → the earlier name that is the same stored tensor (tied weights); empty where there are none.
    """

    @property
    def label(self) -> str:
        """See the class."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See the class."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """See the class."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, with the shape and dtype of ``specs[name]``. The caller does not modify it."""
        ...


@runtime_checkable
class PartialSource(TensorSource, Protocol):
    """A checkpoint that also gives parts of a tensor, so that one larger than memory can be merged."""

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor: (stop − start,), in its dtype."""
        ...


@runtime_checkable
class BlockSource(PartialSource, Protocol):
    """A checkpoint that gives a block of columns at once, and knows which tensors cost no more to read in pieces."""

    def in_blocks(self, name: str) -> bool:
        """Whether a run of a tensor is read without the rest of it."""
        ...

    def read_block(self, name: str, start: int, length: int, step: int, count: int) -> Tensor:
        """``count`` runs of the flattened tensor, ``step`` apart, the first from ``start`` on: (count, length)."""
        ...


@runtime_checkable
class DirectSource(BlockSource, Protocol):
    """A checkpoint that reads into memory of the reader's, such as a GPU copies from."""

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """As many elements of the flattened tensor as ``out`` holds, which is flat, from ``start`` on."""
        ...


@runtime_checkable
class LowRankSource(TensorSource, Protocol):
    """A checkpoint that knows of some tensors how they came from the merge's base: by a product of few columns."""

    def change_rank(self, name: str) -> int | None:
        """Columns r of the factors of θ − θ₀; 0: it is the base's. ``None``: it is not known."""
        ...

    def read_change(self, name: str) -> Tensor:
        """(m + n, r) float32 or float64: θ − θ₀, as (m, n), is the upper part by the lower one transposed."""
        ...


class TensorSink(Protocol):
    """Takes the merged tensors, in any order and from several threads at once."""

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Called once, before the first write, with every tensor to come in output order."""
        ...

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor; its shape and dtype are those announced."""
        ...


@runtime_checkable
class PartialSink(TensorSink, Protocol):
    """Also takes a tensor in parts, which together are the whole."""

    def write_elements(self, name: str, start: int, elements: Tensor) -> None:
        """Store a run of the flattened tensor, from element ``start`` on; its dtype is the one announced."""
        ...
