"""Keeps what one step makes for another, factors and Gram matrices of rows: in memory up to a budget, then on disk."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .factors import Factors

FACTORS_PREFIX = ".r2m-factors-"  # of the temporary file's name, which it has for a moment


@dataclass(frozen=True)
class _Spilled:
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FactorStore:
    """Factors, and Gram matrices of rows, by tensor name; written and read from several threads.

    Args:
        budget: bytes of tensors held in memory; ``None``: all of them. What exceeds it goes to an unnamed temporary
            file in ``directory`` (default: the system's), which the operating system removes with the process.
        on_device: bytes of them that may stay on the device where they were made; ``None``: all.
    """

    def __init__(
        self, budget: int | None = None, directory: str | Path | None = None, on_device: int | None = None
    ) -> None:
        self._budget = budget
        self._on_device = on_device
        self._directory = directory
        self._held: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        self._spilled: dict[tuple[str, str], tuple[_Spilled, ...]] = {}
        self._factors: dict[str, Factors] = {}  # without their tensors
        self._held_bytes = self.spilled_bytes = 0
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self._factors

    def reserve(self, size: int) -> None:
        """Make the temporary file now with room for ``size`` bytes: a full disk is found before the work.

        Raises:
            OSError: no space; ``filename`` is the directory.
        """
        with self._lock:
            descriptor = self._open()
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                raise self._about_directory(error) from error

    def put(self, name: str, factors: Factors) -> None:
        """Keep the factors of one tensor, in place of former ones."""
        self._keep(("factors", name), (factors.left, factors.right))
        nothing = torch.empty(0)
        self._factors[name] = replace(factors, left=nothing, right=nothing)

    def get(self, name: str) -> Factors:
        """The factors of a tensor, bit for bit; KeyError if there are none."""
        left, right = self._fetch(("factors", name))
        return replace(self._factors[name], left=left, right=right)

    def put_rows(self, name: str, rows: Tensor) -> None:
        """Keep the (P, m) Gram matrices of one tensor's rows."""
        self._keep(("rows", name), (rows,))

    def rows(self, name: str) -> Tensor | None:
        """Those of a tensor, bit for bit; ``None`` if there are none."""
        key = ("rows", name)
        return self._fetch(key)[0] if key in self._held or key in self._spilled else None

    def _keep(self, key: tuple[str, str], tensors: tuple[Tensor, ...]) -> None:
        size = sum(tensor.nbytes for tensor in tensors)
        with self._lock:
            self._held_bytes -= sum(tensor.nbytes for tensor in self._held.pop(key, ()))
            if self._budget is None or self._held_bytes + size <= self._budget:
                if self._on_device is not None and self._held_bytes + size > self._on_device:
                    tensors = tuple(tensor.cpu() for tensor in tensors)
                self._held[key] = tensors
                self._held_bytes += size
            else:
                self._spilled[key] = tuple(self._append(tensor) for tensor in tensors)

    def _fetch(self, key: tuple[str, str]) -> tuple[Tensor, ...]:
        held = self._held.get(key)
        return tuple(self._load(one) for one in self._spilled[key]) if held is None else held

    def close(self) -> None:
        """Give the temporary file back now."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()

    def _append(self, tensor: Tensor) -> _Spilled:
        descriptor = self._open()
        content = memoryview(tensor.cpu().contiguous().numpy().data).cast("B")
        spilled = _Spilled(self.spilled_bytes, tuple(tensor.shape), tensor.dtype)
        while content:  # one call moves at most 2 GiB on Linux
            try:
                written = os.pwrite(descriptor, content, self.spilled_bytes)
            except OSError as error:
                raise self._about_directory(error) from error
            content, self.spilled_bytes = content[written:], self.spilled_bytes + written
        return spilled

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor, path = tempfile.mkstemp(prefix=FACTORS_PREFIX, dir=self._directory)
            os.unlink(path)
        return self._descriptor

    def _about_directory(self, error: OSError) -> OSError:
        # The file has no name any more; who reads the message needs to know which disk is full.
        return OSError(error.errno, error.strerror, str(self._directory or tempfile.gettempdir()))

    def _load(self, spilled: _Spilled) -> Tensor:
        assert self._descriptor is not None
        tensor = torch.empty(spilled.shape, dtype=spilled.dtype)
        content, offset = memoryview(tensor.numpy().data).cast("B"), spilled.offset
        while content:
            count = os.preadv(self._descriptor, [content], offset)
            if count == 0:
                raise OSError("the temporary file of low-rank factors ended early")
            content, offset = content[count:], offset + count
        return tensor
