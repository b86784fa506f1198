"""Writes checkpoints: ``model.safetensors``, or Hugging Face shards with an index.

The layout is known before the first tensor is: files get their full size at once, tensors go to fixed
positions from any thread in any order, and the header is written last, so that an unfinished file is no
safetensors file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from r2m.checkpoints import layout
from r2m_kernels.tensors import TensorSpec


class SafetensorsSink:
    """A directory being filled, as a :class:`r2m_kernels.tensors.TensorSink`.

    Equal tensors, metadata and ``max_shard_size`` give equal bytes, whatever the order of ``specs`` and of
    the writes. Call :meth:`finish` when the merge has returned; until then the files cannot be loaded.

    Args:
        directory: an existing directory.
        metadata: entries of the safetensors header besides ``{"format": "pt"}``, which is always there since
            ``transformers`` refuses files without it.
        max_shard_size: bytes of tensors per file, except for a single tensor larger than that.
    """

    def __init__(self, directory: str | Path, metadata: Mapping[str, str], max_shard_size: int) -> None:
        self._directory = Path(directory)
        self._metadata = {**metadata, "format": "pt"}
        self._max_shard_size = max_shard_size
        self._specs: dict[str, TensorSpec] = {}
        self._files: list[layout.PlannedFile] = []
        self._file_of: dict[str, layout.PlannedFile] = {}
        self._claimed: set[str] = set()
        self._written: set[str] = set()
        self._lock = threading.Lock()

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Lay the files out and reserve their space.

        Raises:
            InvalidInput: a dtype that safetensors cannot store.
            OSError: no space or no permission; ``filename`` is set.
        """
        self._specs = dict(specs)
        self._files = layout.plan_files(self._specs, self._metadata, self._max_shard_size)
        self._file_of = {name: file for file in self._files for name in file.offsets}
        for file in self._files:
            path = self._directory / file.name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                with layout.naming(path):
                    _reserve(descriptor, file.size)
            finally:
                os.close(descriptor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor at its position; from any thread.

        Raises:
            ValueError: not announced, written before, or of another shape or dtype than announced.
            OSError: it cannot be written; ``filename`` is set.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise ValueError(f"tensor '{name}' was not announced to begin()")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"tensor '{name}': announced as {spec.shape} {spec.dtype}, "
                f"written as {tuple(tensor.shape)} {tensor.dtype}"
            )
        with self._lock:
            if name in self._claimed:
                raise ValueError(f"tensor '{name}' was written twice")
            self._claimed.add(name)
        file = self._file_of[name]
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._write_at(self._directory / file.name, data.data, file.offsets[name])
        with self._lock:
            self._written.add(name)

    def finish(self) -> None:
        """Write headers and, for several shards, the index; bring everything to the disk.

        Raises:
            ValueError: a tensor is missing.
            OSError: it cannot be written; ``filename`` is set.
        """
        missing = [name for name in self._specs if name not in self._written]
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, such as '{missing[0]}'")
        for file in self._files:
            path = self._directory / file.name
            self._write_at(path, memoryview(file.header), 0)
            sync(path)
        if len(self._files) > 1:
            index = self._directory / layout.INDEX_FILE
            total_size = sum(spec.nbytes for spec in self._specs.values())
            write_file(index, layout.encode_index(self._files, total_size))

    @staticmethod
    def _write_at(path: Path, view: memoryview, offset: int) -> None:
        # One descriptor per write, as in the reader: no limit on the number of shards.
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            with layout.naming(path):
                done = 0
                while done < len(view):  # a call may take less than offered; Linux takes 2 147 479 552 bytes at most
                    done += os.pwrite(descriptor, view[done:], offset + done)
        finally:
            os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and bring it to the disk."""
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk; an ``OSError`` has ``filename`` set."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with layout.naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    # Reserving finds a full disk before the work rather than in the middle of it; macOS has no such call.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
