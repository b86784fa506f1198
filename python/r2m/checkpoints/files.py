"""Tensors at fixed places in files, read with ordinary reads.

Mapping the files would be simpler, but mapped pages count as resident memory. Nothing here depends on a format.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2m.checkpoints.adapter_config import AdapterConfig
from r2m.places import naming
from r2m_kernels.descriptors import flags, read_at
from r2m_kernels.errors import BadCheckpoint, quoted
from r2m_kernels.streaming import TensorSpec

_RUN = 2**20  # elements


class Location(NamedTuple):
    """Where a tensor lies: the file and the position of its first byte.

    Attributes:
        strides: in elements, where they are not those of a tensor whose elements follow one another.
    """

    path: Path
    offset: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorFile:
    """A file that was found valid.

    Attributes:
        specs: its tensors in file order.
        locations: where they lie.
        identity: what tells whether it was changed since.
        header: SHA-256 of what describes the tensors.
        aliases: name → the earlier name that is the same stored tensor.
        key: what the tensors lay under; empty at the top.
        notes: what else is in the file and was left out, a clause for each.
        about: what else it says of the classifier's outputs, see :mod:`r2m.checkpoints.class_names`.
    """

    specs: dict[str, TensorSpec]
    locations: dict[str, Location]
    identity: tuple[int, ...]
    header: str
    aliases: dict[str, str] = field(default_factory=dict)
    key: str = ""
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


class Checkpoint:
    """A checkpoint on disk as a :class:`r2m_kernels.streaming.PartialSource`. Made by ``open_checkpoint``.

    Reading is safe from several threads: every read opens the file, so there is no shared position, no limit
    on the number of shards, and a file replaced meanwhile is noticed.

    Attributes:
        label: how error messages name the checkpoint.
        specs: name → shape and dtype; in data order for one file, in the index's order for shards.
        aliases: name → the earlier name of the same stored tensor.
        files: the files that are read.
        keys: what the tensors lay under, in those that hold more.
        notes: what else is in them and was left out, a clause for each.
        about: what the first that says something says of the classifier's outputs.
        adapter: whose factors its tensors are, under the names of the model; ``None``: they are weights.
    """

    def __init__(
        self,
        label: str,
        specs: Mapping[str, TensorSpec],
        locations: Mapping[str, Location],
        files: Mapping[Path, TensorFile],
        index: tuple[Path, str] | None = None,
        adapter: AdapterConfig | None = None,
    ) -> None:
        self.label = label
        self.specs = specs
        self.aliases: Mapping[str, str] = {k: v for file in files.values() for k, v in file.aliases.items()}
        self.files = tuple(files)
        self.keys = {file.key for file in files.values() if file.key}
        self.notes = tuple(dict.fromkeys(note for file in files.values() for note in file.notes))
        self.about = next((file.about for file in files.values() if file.about), {})
        self._locations = locations
        self._files = files
        self._index = index
        self.adapter = adapter

    @property
    def fingerprints(self) -> list[dict[str, str | int]]:
        """What tells each file from another or a changed one, without its gigabytes being read; files in order."""
        fingerprints: list[dict[str, str | int]] = []
        if self._index is not None:
            path, digest = self._index
            fingerprints.append({"file": os.path.abspath(path), "header": digest})
        for path, file in self._files.items():
            _, _, size, mtime_ns, ctime_ns = file.identity
            about: dict[str, str | int] = {"size": size, "mtime_ns": mtime_ns, "ctime_ns": ctime_ns}
            about["header"] = file.header
            fingerprints.append({"file": os.path.abspath(path), **about})
        return fingerprints

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own.

        Raises:
            BadCheckpoint: the file has changed since it was opened.
            OSError: it cannot be read; ``filename`` is set.
        """
        spec, strides = self.specs[name], self._locations[name].strides
        if strides is None or spec.numel == 0:
            return self._read(name, 0, spec.nbytes).view(spec.dtype).reshape(spec.shape)
        last = sum((size - 1) * stride for size, stride in zip(spec.shape, strides, strict=True))
        stored = self._read(name, 0, (last + 1) * spec.dtype.itemsize).view(spec.dtype)
        return stored.as_strided(spec.shape, strides).contiguous()

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """A run of its elements, in memory of its own. Errors are :meth:`read`'s.

        A tensor whose elements do not follow one another in the file is read whole for it.
        """
        dtype = self.specs[name].dtype
        if self._locations[name].strides is not None:
            return self.read(name).view(-1)[start:stop]
        return self._read(name, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """A run of its elements into flat memory. Errors are :meth:`read`'s."""
        if self._locations[name].strides is not None:
            out.copy_(self.read(name).view(-1)[start : start + out.numel()])
        else:
            self._fill(name, out.view(torch.uint8).unsqueeze(0), start * out.dtype.itemsize, 0)

    def runs(self, name: str) -> Iterator[Tensor]:
        """Its elements in order, a run at a time; errors are :meth:`read`'s. See :meth:`read_elements`."""
        spec = self.specs[name]
        if self._locations[name].strides is not None:
            yield self.read(name).view(-1)
            return
        for start in range(0, spec.numel, _RUN):
            yield self.read_elements(name, start, min(start + _RUN, spec.numel))

    def in_blocks(self, name: str) -> bool:
        """See :class:`r2m_kernels.streaming.BlockSource`."""
        return self._locations[name].strides is None

    def read_block(self, name: str, start: int, length: int, step: int, count: int) -> Tensor:
        """Runs of its elements, ``step`` apart, in memory of their own: (count, length). Errors are :meth:`read`'s."""
        dtype = self.specs[name].dtype
        size = dtype.itemsize
        return self._read_block(name, start * size, length * size, step * size, count).view(dtype)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes of the file from where a tensor begins."""
        return self._read_block(name, start, stop - start, 0, 1).view(-1)

    def _read_block(self, name: str, start: int, length: int, step: int, count: int) -> Tensor:
        """The same of several runs of bytes: (count, length)."""
        data = torch.empty(count, length, dtype=torch.uint8)
        self._fill(name, data, start, step)
        return data

    def _fill(self, name: str, data: Tensor, start: int, step: int) -> None:
        location = self._locations[name]
        descriptor = os.open(location.path, flags("O_RDONLY", "O_NONBLOCK"))
        try:
            with naming(location.path):
                whole = identity(descriptor) == self._files[location.path].identity
                for index, run in enumerate(data.numpy()):
                    whole = whole and _filled(descriptor, run.data, location.offset + start + index * step)
                whole = whole and identity(descriptor) == self._files[location.path].identity
        finally:
            os.close(descriptor)
        if not whole:
            file = quoted(location.path.name)
            raise BadCheckpoint(f"{self.label}: tensor {quoted(name)}: file {file} was changed while it was in use")


def _filled(descriptor: int, view: memoryview, offset: int) -> bool:
    """Read from a place in a file until ``view`` is full; whether there was enough."""
    done, size = 0, len(view)
    while done < size:
        # A call may return less than asked: Linux never gives more than 2 147 479 552 bytes.
        count = read_at(descriptor, view[done:], offset + done)
        if count == 0:
            return False
        done += count
    return True


def identity(descriptor: int) -> tuple[int, ...]:
    """Device, inode, size and times of change of an open file: the second one no program can put back."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
