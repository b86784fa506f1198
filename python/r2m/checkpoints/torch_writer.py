"""Files of ``torch.save`` that are larger than memory: described by torch, filled a part at a time."""

from __future__ import annotations

import bisect
import io
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from r2m.checkpoints.files import Checkpoint
from r2m.places import created

_ALIGNMENT = 64  # of records, so that they can be mapped
_HEADER, _HEADER_OF_SIZES = 30, 20  # bytes before a record's name, and of the field for the sizes of a large one
_LARGE = 2**30  # bytes from which on a record's header has room for any number of them
_FIELD = struct.Struct("<2sH")  # of a header's extra fields: a name, and how many bytes follow


def save_file(source: Checkpoint, path: Path, names: Sequence[str]) -> None:
    """Write ``torch.save({name: tensor, …}, path)``, tied tensors tied; see :mod:`r2m.checkpoints.formats`.

    torch describes the tensors in an archive whose records it leaves out; that is copied, and the records are filled
    from the checkpoint a run at a time.
    """
    tensors: dict[str, Tensor] = {}
    stored: list[str] = []  # torch numbers the records as it comes to them
    for name in names:
        first, spec = source.aliases.get(name, name), source.specs[name]
        if first not in tensors:
            stored.append(name)
        # Memory that is never touched is never there.
        tensors[name] = tensors[first] if first in tensors else torch.empty(spec.shape, dtype=spec.dtype)
    described = _Sparse()
    with torch.serialization.skip_data():
        torch.save(tensors, cast(BinaryIO, described))
    content = {f"data/{number}": _bytes(source.runs(name)) for number, name in enumerate(stored)}
    with zipfile.ZipFile(described) as old, created(path) as file, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            record, large = zipfile.ZipInfo(entry.filename), entry.file_size > _LARGE
            record.file_size = entry.file_size
            record.extra = _padding(file.tell() + _HEADER + len(entry.filename.encode()) + large * _HEADER_OF_SIZES)
            of_tensor = content.get(entry.filename.partition("/")[2])
            with new.open(record, "w", force_zip64=large) as written:
                for run in [old.read(entry)] if of_tensor is None else of_tensor:
                    written.write(run)


def _bytes(runs: Iterable[Tensor]) -> Iterator[memoryview]:
    return (run.view(torch.uint8).numpy().data for run in runs)


class _Sparse(io.RawIOBase):
    """A file in memory of which only what is written takes any: not what is skipped."""

    def __init__(self) -> None:
        self._starts, self._runs, self._at = [0], [bytearray()], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = self._starts[-1] + len(self._runs[-1])
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: end}[whence]
        return self._at

    def write(self, data: Any) -> int:  # at the end, or beyond it
        if self._at > self._starts[-1] + len(self._runs[-1]):
            self._starts.append(self._at)
            self._runs.append(bytearray())
        content = memoryview(data)
        self._runs[-1] += content
        self._at += len(content)
        return len(content)

    def readinto(self, buffer: Any) -> int:
        index = bisect.bisect_right(self._starts, self._at) - 1
        start = self._at - self._starts[index]
        found = self._runs[index][start : start + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def _padding(end: int) -> bytes:
    """A field of a record's header, which ends here without it: what follows is to begin where torch's records do."""
    missing = -(end + _FIELD.size) % _ALIGNMENT
    return _FIELD.pack(b"FB", missing) + bytes(missing)
