"""Keeps what one step makes for another, factors and Gram matrices of rows: in memory up to a budget, then on disk."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..descriptors import REMOVES_OPEN_FILES, read_at, reserve, write_at
from .blocks import runs
from .factors import LENGTH_ROWS, PRODUCT_ROWS, Factors, inner_products, lengths_of_rows, product_of_sides, row_lengths
from .tensors import memory_of

NOTHING = torch.empty(0)  # where factors are kept elsewhere
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
        # Of tensors that are written in parts, some columns of right factors.
        self._at_hand: dict[str, tuple[slice, Tensor]] = {}
        self._held_bytes = self.spilled_bytes = 0
        self._descriptor: int | None = None
        self._path: str | None = None  # where it could not be removed at once
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
                reserve(descriptor, size)
            except OSError as error:
                raise self._about_directory(error) from error

    def put(self, name: str, factors: Factors) -> None:
        """Keep the factors of one tensor, in place of former ones."""
        self._keep(("factors", name), (factors.left, factors.right))
        self._factors[name] = replace(factors, left=NOTHING, right=NOTHING)

    def place(self, name: str, count: int, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
        """Make room for the factors of ``count`` residuals of one shape, which come one by one."""
        key, (m, n) = ("factors", name), shape
        size = count * rank * (m + n) * dtype.itemsize
        with self._lock:
            self._held_bytes -= sum(tensor.nbytes for tensor in self._held.pop(key, ()))
            if self._budget is None or self._held_bytes + size <= self._budget:
                # Components lie side by side, as in factors that come at once.
                left, right = (torch.empty(count, rank, length, dtype=dtype) for length in shape)
                self._held[key] = (left.mT, right)
                self._held_bytes += size
            elif key not in self._spilled:
                self._spilled[key] = (self._room((count, m, rank), dtype), self._room((count, rank, n), dtype))

    def put_expert(self, name: str, expert: int, left: Tensor, right: Tensor) -> None:
        """Keep one residual's factors, (m, r) and (r, n), where :meth:`place` made room."""
        key = ("factors", name)
        if key in self._held:
            for held, factor in zip(self._held[key], (left, right), strict=True):
                held[expert].copy_(factor)
            return
        for spilled, factor in zip(self._spilled[key], (left, right), strict=True):
            offset = spilled.offset + expert * factor.nbytes
            for start in range(0, len(factor), PRODUCT_ROWS):
                rows = factor[start : start + PRODUCT_ROWS]
                self._write(rows, offset)
                offset += rows.nbytes

    def complete(self, name: str, known: Factors) -> None:
        """All residuals' factors are there; ``known`` is what is known of them, without their tensors."""
        self._factors[name] = known

    def get(self, name: str) -> Factors:
        """The factors of a tensor, bit for bit; KeyError if there are none."""
        left, right = self._fetch(("factors", name))
        return replace(self._factors[name], left=left, right=right)

    def leading(self, name: str, rank: int) -> bool:
        """Whether the first components are the truncation to a rank: they come by size, or it has them all."""
        held = self._held.get(("factors", name))
        size = self._spilled[("factors", name)][1].shape[1] if held is None else held[1].shape[1]
        return self._factors[name].ordered or size <= rank

    def part(self, name: str, rows: slice, columns: slice) -> Factors:
        """The same with some rows of the left factors and some columns of the right ones alone.

        The latter stay at hand until others are asked for, or :meth:`let_go`.
        """
        key, known = ("factors", name), self._factors[name]
        if key in self._held:
            left, right = self._held[key]
            return replace(known, left=left[:, rows], right=right[:, :, columns])
        with self._lock:
            if name not in self._at_hand or self._at_hand[name][0] != columns:
                self._at_hand.pop(name, None)  # before others are read
                self._at_hand[name] = (columns, self._load(self._spilled[key][1], slice(None), columns))
            right = self._at_hand[name][1]
        return replace(known, left=self._load(self._spilled[key][0], rows), right=right)

    def let_go(self, name: str) -> None:
        """Forget what :meth:`part` has at hand of a tensor."""
        self._at_hand.pop(name, None)

    def row_lengths(self, name: str, rank: int) -> Tensor:
        """‖row of F_i‖ of a tensor by its first components: (N, m) float64, with little of them in memory."""
        key, orthogonal = ("factors", name), self._factors[name].orthogonal_rows
        if key in self._held:
            left, right = self._held[key]
            return row_lengths(left[:, :, :rank].unsqueeze(0), right[:, :rank].unsqueeze(0), orthogonal)[0]
        spilled_left, spilled_right = self._spilled[key]
        (count, m, _), n, leading = spilled_left.shape, spilled_right.shape[2], slice(0, rank)

        def of_one(expert: int) -> Tensor:
            lefts = (self._load(spilled_left, rows, leading, expert)[0] for rows in runs(m, LENGTH_ROWS))
            rights = (self._load(spilled_right, leading, columns, expert)[0] for columns in runs(n, PRODUCT_ROWS))
            return lengths_of_rows(lefts, rights, orthogonal)

        return torch.stack([of_one(expert) for expert in range(count)])

    def inner_products(self, name: str, orthogonal: bool) -> Tensor:
        """⟨F_i, F_j⟩ of a tensor, (N, N) float64, with little of the factors in memory; see :func:`inner_products`."""
        key = ("factors", name)
        if key in self._held:
            left, right = self._held[key]
            return inner_products(left.unsqueeze(0), right.unsqueeze(0), orthogonal)[0]

        def blocks(spilled: _Spilled, side: int) -> Iterator[Tensor]:
            """Components side by side, as in factors that come at once: a product may be rounded otherwise."""
            for some in runs(spilled.shape[side], PRODUCT_ROWS):
                if side == 1:
                    yield self._load(spilled, some).mT.contiguous().mT.unsqueeze(0)
                else:
                    yield self._load(spilled, slice(None), some).mT.unsqueeze(0)

        spilled_left, spilled_right = self._spilled[key]
        return product_of_sides(blocks(spilled_left, 1), blocks(spilled_right, 2), orthogonal)[0]

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
            if self._path is not None:
                os.unlink(self._path)

    def __del__(self) -> None:
        self.close()

    def _append(self, tensor: Tensor) -> _Spilled:
        spilled = self._room(tuple(tensor.shape), tensor.dtype)
        self._write(tensor, spilled.offset)
        return spilled

    def _room(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Spilled:
        spilled = _Spilled(self.spilled_bytes, shape, dtype)
        self.spilled_bytes += math.prod(shape) * dtype.itemsize
        return spilled

    def _write(self, tensor: Tensor, offset: int) -> None:
        descriptor = self._open()
        dense = tensor.cpu().contiguous()
        content = memory_of(dense)
        while content:  # one call moves at most 2 GiB on Linux
            try:
                written = write_at(descriptor, content, offset)
            except OSError as error:
                raise self._about_directory(error) from error
            content, offset = content[written:], offset + written

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor, path = tempfile.mkstemp(prefix=FACTORS_PREFIX, dir=self._directory)
            if REMOVES_OPEN_FILES:
                os.unlink(path)
            else:
                self._path = path
        return self._descriptor

    def _about_directory(self, error: OSError) -> OSError:
        # The file has no name any more; who reads the message needs to know which disk is full.
        return OSError(error.errno, error.strerror, str(self._directory or tempfile.gettempdir()))

    def _load(
        self,
        spilled: _Spilled,
        rows: slice = slice(None),
        columns: slice = slice(None),
        expert: int | None = None,
    ) -> Tensor:
        """All of it, or blocks of its matrices, or of one of them."""
        if (rows, columns) != (slice(None), slice(None)):
            count, height, width = spilled.shape
            (top, bottom, _), (left, right, _) = rows.indices(height), columns.indices(width)
            experts = range(count) if expert is None else [expert]
            block = torch.empty(len(experts), bottom - top, right - left, dtype=spilled.dtype)
            size = spilled.dtype.itemsize
            for index, matrix in zip(experts, block, strict=True):
                start = spilled.offset + (index * height + top) * width * size
                if right - left == width:
                    self._fill(matrix, start)
                else:
                    for number, row in enumerate(matrix):
                        self._fill(row, start + (number * width + left) * size)
            return block
        tensor = torch.empty(spilled.shape, dtype=spilled.dtype)
        self._fill(tensor, spilled.offset)
        return tensor

    def _fill(self, tensor: Tensor, offset: int) -> None:
        assert self._descriptor is not None
        content = memory_of(tensor)
        while content:
            count = read_at(self._descriptor, content, offset)
            if count == 0:
                raise OSError("the temporary file of low-rank factors ended early")
            content, offset = content[count:], offset + count
