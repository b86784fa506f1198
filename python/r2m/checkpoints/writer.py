"""Writes checkpoints: ``model.safetensors``, or Hugging Face shards with an index.

The layout is known before the first tensor is: files get their full size at once, tensors go to fixed
positions from any thread and any process in any order, and the header is written when all of that is on the disk, so
that an unfinished file is no safetensors file.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from r2m.checkpoints.formats import SAFETENSORS
from r2m.checkpoints.layout import encode_index
from r2m.checkpoints.safetensors_file import PlannedFile, plan_files
from r2m.places import naming, write_file
from r2m_kernels.descriptors import OPENS_DIRECTORIES, begin_writing, flags, reserve, write_at
from r2m_kernels.errors import BadCheckpoint, quoted
from r2m_kernels.streaming import TensorSpec


class SafetensorsSink:
    """A directory being filled, as a :class:`r2m_kernels.streaming.PartialSink`.

    Equal tensors, metadata and ``max_shard_size`` give equal bytes, whatever the order of ``specs`` and of
    the writes. Call :meth:`finish` when the merge has returned; until then the files cannot be loaded.

    Args:
        directory: an existing directory.
        metadata: entries of the safetensors header besides ``{"format": "pt"}``, which is always there.
        max_shard_size: bytes of tensors per file, except for a single tensor larger than that.
        create: whether :meth:`begin` makes the files; otherwise another process has.
        single: what a file is called that is the only one.
    """

    def __init__(
        self,
        directory: str | Path,
        metadata: Mapping[str, str],
        max_shard_size: int,
        *,
        create: bool = True,
        single: str = SAFETENSORS.single,
    ) -> None:
        self._create, self._single = create, single
        self._directory = Path(directory)
        # Should the directory be replaced under its path, nothing is written to its successor.
        self._opened: int | None = None
        if OPENS_DIRECTORIES:
            self._opened = os.open(directory, flags("O_RDONLY", "O_DIRECTORY"))
            weakref.finalize(self, os.close, self._opened)
        self._metadata = metadata
        self._max_shard_size = max_shard_size
        self.names: list[str] = []  # announced, in that order
        self._specs: dict[str, TensorSpec] = {}
        self._files: list[PlannedFile] = []
        self._file_of: dict[str, PlannedFile] = {}
        self._aliases: Mapping[str, str] = {}
        self._there: set[str] = set()
        self._others: set[str] = set()
        self._missing: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._lock = threading.Lock()

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Lay the files out and reserve their space. Files of a run that was cut off keep what they hold.

        Raises:
            BadCheckpoint: a dtype that safetensors cannot store, or a file that should be there is not.
            OSError: no space or no permission; ``filename`` is set.
        """
        self.names = list(specs)
        self._specs = {name: spec for name, spec in specs.items() if name not in self._aliases}
        self._files = plan_files(specs, self._metadata, self._max_shard_size, self._aliases, self._single)
        self._file_of = {name: file for file in self._files for name in file.offsets}
        done = self._there | self._others
        self._missing = {name: 0 if name in done else spec.numel for name, spec in self._specs.items()}
        for file in self._files if self._create else ():
            path = self._directory / file.name
            descriptor = self._open(file.name, "O_WRONLY", "O_CREAT", "O_NOFOLLOW")
            try:
                with naming(path):
                    size = os.fstat(descriptor).st_size
                    if size != file.size:
                        ends = {name: start + self._specs[name].nbytes for name, start in file.offsets.items()}
                        lost = next((name for name, end in ends.items() if name in self._there and end > size), None)
                        if lost is not None:
                            raise BadCheckpoint(
                                f"{path}: expected tensor {quoted(lost)} in it, as the journal beside it says; the "
                                "file is gone or was cut; start anew"
                            )
                        reserve(descriptor, file.size)
            finally:
                os.close(descriptor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor at its position; from any thread. One that is tied to another is there already.

        Raises:
            ValueError: not announced, written before, or of another shape or dtype than announced.
            OSError: it cannot be written; ``filename`` is set.
        """
        self._store(name, tensor, None)

    def write_elements(self, name: str, start: int, elements: Tensor) -> None:
        """Store a run of a tensor's elements at its position; from any thread. Errors are :meth:`write`'s."""
        self._store(name, elements, start)

    def tie(self, aliases: Mapping[str, str]) -> None:
        """Names that are stored as the tensor they are tied to; before :meth:`begin`."""
        self._aliases = aliases

    def mark_written(self, names: Iterable[str]) -> None:
        """Tensors that a run wrote that was cut off; before :meth:`begin`."""
        self._there.update(names)

    def leave(self, names: Iterable[str]) -> None:
        """Tensors that other processes write; before :meth:`begin`."""
        self._others.update(names)

    def sync(self) -> None:
        """Bring to the disk what was written so far."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        for name in sorted(dirty):
            self._sync(name)

    def finish(self) -> None:
        """Write headers and, for several shards, the index; bring everything to the disk.

        Raises:
            ValueError: a tensor is missing.
            OSError: it cannot be written; ``filename`` is set.
        """
        missing = [name for name, count in self._missing.items() if count > 0]
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written as a whole, such as '{missing[0]}'")
        # Bodies before headers, so that no power cut leaves a header over a body that is not there.
        for file in self._files:
            self._sync(file.name)
        for file in self._files:
            self._write_at(file.name, memoryview(file.header), 0)
            self._sync(file.name)
        if len(self._files) > 1:
            total_size = sum(spec.nbytes for spec in self._specs.values())
            file_of = {name: file.name for name, file in self._file_of.items()}
            write_file(self._directory / SAFETENSORS.index, encode_index(file_of, total_size))

    def _store(self, name: str, tensor: Tensor, start: int | None) -> None:
        """A run of elements, or all of them in their shape where no start is given."""
        if name in self._aliases:
            return
        spec, count = self._specs.get(name), tensor.numel()
        if spec is None:
            raise ValueError(f"tensor '{name}' was not announced to begin()")
        whole = start is None and tuple(tensor.shape) == spec.shape
        run = start is not None and tensor.ndim == 1 and 0 <= start <= spec.numel - count
        if not (whole or run) or tensor.dtype != spec.dtype:
            where = "" if start is None else f" at {start}"
            written = f"{tuple(tensor.shape)} {tensor.dtype}{where}"
            raise ValueError(f"tensor '{name}': announced as {spec.shape} {spec.dtype}, written as {written}")
        with self._lock:
            if self._missing[name] < count:
                raise ValueError(f"tensor '{name}' was written twice")
            self._missing[name] -= count
        file = self._file_of[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        position = file.offsets[name] + (start or 0) * spec.dtype.itemsize
        self._write_at(file.name, data.data, position)
        with self._lock:
            self._dirty.add(file.name)

    def _write_at(self, name: str, view: memoryview, offset: int) -> None:
        # One descriptor per write, as in the reader: no limit on the number of shards.
        descriptor = self._open(name, "O_WRONLY")
        try:
            with naming(self._directory / name):
                done = 0
                while done < len(view):  # a call may take less than offered; Linux takes 2 147 479 552 bytes at most
                    done += write_at(descriptor, view[done:], offset + done)
                begin_writing(descriptor, offset, done)
        finally:
            os.close(descriptor)

    def _sync(self, name: str) -> None:
        descriptor = self._open(name, "O_RDONLY")
        try:
            with naming(self._directory / name):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _open(self, name: str, *how: str) -> int:
        path = name if self._opened is not None else self._directory / name
        try:
            return os.open(path, flags(*how), 0o666, dir_fd=self._opened)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._directory / name)) from error
