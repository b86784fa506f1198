"""Reads checkpoints: one safetensors file, or a Hugging Face directory.

Headers are judged by the safetensors library; tensors are then read with ordinary reads at fixed offsets.
Mapping the files would be simpler, but mapped pages count as resident memory. Nothing here runs code from a
file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r2m.checkpoints import layout
from r2m_kernels.errors import InvalidInput
from r2m_kernels.tensors import TensorSpec

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_TORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02")  # the zip container and the older pickle stream of torch.save

# What the library's reasons mean to someone who only knows the file; others are shown as they are.
_REASONS = {
    "header too small": "it is shorter than any safetensors file",
    "header too large": "its header would be larger than the format allows",
    "invalid header length": "its header would end after the file, which is cut off or no safetensors file",
    "file not fully covered": "it is cut off, or longer than its header says",
    "overflow": "its header announces a tensor too large for any file",
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: the file and the position of its first byte."""

    path: Path
    offset: int


@dataclass(frozen=True)
class _File:
    """A validated file: its tensors in file order, and what tells whether it was changed since."""

    specs: dict[str, TensorSpec]
    places: dict[str, _Place]
    identity: tuple[int, ...]


class SafetensorsSource:
    """A checkpoint on disk as a :class:`r2m_kernels.tensors.TensorSource`. Made by :func:`open_checkpoint`.

    Reading is safe from several threads: every read opens the file, so there is no shared position, no limit
    on the number of shards, and a file replaced meanwhile is noticed.

    Attributes:
        label: how error messages name the checkpoint.
        specs: name → shape and dtype; in data order for one file, in the index's order for shards.
        aliases: always empty, as a safetensors file stores no tensor twice.
        files: the files that are read.
    """

    def __init__(
        self,
        label: str,
        specs: Mapping[str, TensorSpec],
        places: Mapping[str, _Place],
        identities: Mapping[Path, tuple[int, ...]],
    ) -> None:
        self.label = label
        self.specs = specs
        self.aliases: Mapping[str, str] = {}
        self.files = tuple(identities)
        self._places = places
        self._identities = identities

    @property
    def fingerprints(self) -> list[dict[str, str | int]]:
        """What tells each file from another or a changed one, without its gigabytes being read; files in order."""
        found: list[dict[str, str | int]] = []
        for path, (_, _, size, mtime_ns) in self._identities.items():
            with path.open("rb") as file:
                field = file.read(layout.LENGTH_BYTES)
                header = hashlib.sha256(field + file.read(layout.data_start(field) - layout.LENGTH_BYTES))
            found.append(
                {"file": os.path.abspath(path), "size": size, "mtime_ns": mtime_ns, "header": header.hexdigest()}
            )
        return found

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own.

        Raises:
            InvalidInput: the file has changed since it was opened.
            OSError: it cannot be read; ``filename`` is set.
        """
        spec = self.specs[name]
        return self._read(name, 0, spec.nbytes).view(spec.dtype).reshape(spec.shape)

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """A run of its elements, in memory of its own. Errors are :meth:`read`'s."""
        dtype = self.specs[name].dtype
        return self._read(name, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes of a tensor."""
        place, size = self._places[name], stop - start
        data = torch.empty(size, dtype=torch.uint8)
        view = data.numpy().data
        descriptor = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with layout.naming(place.path):
                whole = _identity(descriptor) == self._identities[place.path]
                done = 0
                while whole and done < size:
                    # A call may return less than asked: Linux never gives more than 2 147 479 552 bytes.
                    count = os.preadv(descriptor, [view[done:]], place.offset + start + done)
                    done += count
                    whole = count > 0
        finally:
            os.close(descriptor)
        if not whole:
            raise InvalidInput(
                f"{self.label}: tensor '{name}': file '{place.path.name}' was changed while it was in use"
            )
        return data


Checkpoint = SafetensorsSource


def open_checkpoint(path: str | Path, label: str) -> SafetensorsSource:
    """Open a safetensors file, or a directory with one or with an index and shards.

    In a directory ``model.safetensors`` comes first, as in ``transformers``; then
    ``model.safetensors.index.json``; then the only ``*.safetensors`` there is.

    Args:
        path: file or directory. A file is judged by its content, not by its name.
        label: how error messages name the checkpoint; should hold the path as the user gave it.

    Raises:
        InvalidInput: nothing there, not safetensors, damaged, or an index that does not fit its files.
        OSError: it cannot be read; ``filename`` is set.
    """
    given, path = str(path), Path(path)
    if given and path.is_dir():
        return _open_directory(path, label)
    if not given or not path.exists():
        raise InvalidInput(f"{label}: no such file or directory")
    return _open_single(path, label, label)


def _open_directory(directory: Path, label: str) -> SafetensorsSource:
    if (directory / layout.SINGLE_FILE).is_file():
        return _open_single(directory / layout.SINGLE_FILE, label, f"{label}: file '{layout.SINGLE_FILE}'")
    if (directory / layout.INDEX_FILE).is_file():
        return _open_shards(directory, label)
    # Names with a leading dot are leftovers of other programs, such as macOS's "._" companions.
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file() and entry.name[0] != ".")
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return _open_single(directory / found[0], label, f"{label}: file '{found[0]}'")
    if found:
        raise InvalidInput(
            f"{label}: holds {len(found)} safetensors files ({_some(found)}) and no {layout.INDEX_FILE}; "
            f"name the one that is meant"
        )
    pickled = [name for name in names if name.endswith(_TORCH_SUFFIXES)]
    if pickled:
        _refuse_torch_file(f"{label}: file '{pickled[0]}'")
    raise InvalidInput(f"{label}: the directory holds no safetensors file")


def _open_single(path: Path, label: str, what: str) -> SafetensorsSource:
    file = _open_file(path, what)
    if not file.specs:
        raise InvalidInput(f"{what}: holds no tensors")
    return SafetensorsSource(label, file.specs, file.places, {path: file.identity})


def _open_shards(directory: Path, label: str) -> SafetensorsSource:
    index = f"{label}: index '{layout.INDEX_FILE}'"
    weight_map = layout.decode_index(index, (directory / layout.INDEX_FILE).read_bytes())
    if not weight_map:
        raise InvalidInput(f"{index}: holds no tensors")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise InvalidInput(f"{label}: {len(missing)} of {len(shards)} shards missing: {_some(missing)}")
    files = {shard: _open_file(directory / shard, f"{label}: shard '{shard}'") for shard in shards}
    absent = [name for name, shard in weight_map.items() if name not in files[shard].specs]
    if absent:
        shard = weight_map[absent[0]]
        raise InvalidInput(
            f"{label}: shard '{shard}': lacks tensor '{absent[0]}', which the index says it holds"
            + (f" (and {len(absent) - 1} more tensors are not where the index says)" if absent[1:] else "")
        )
    return SafetensorsSource(
        label,
        {name: files[shard].specs[name] for name, shard in weight_map.items()},
        {name: files[shard].places[name] for name, shard in weight_map.items()},
        {directory / shard: files[shard].identity for shard in shards},
    )


def _open_file(path: Path, what: str) -> _File:
    if not path.is_file():
        raise InvalidInput(f"{what}: not a regular file")
    with path.open("rb") as file:
        identity = _identity(file.fileno())
        length_field = file.read(layout.LENGTH_BYTES)
    if not length_field:
        raise InvalidInput(f"{what}: the file is empty")
    specs: dict[str, TensorSpec] = {}
    places: dict[str, _Place] = {}
    try:
        # The library maps the file for the length of this block and touches its header alone. It has checked
        # that the tensors follow one another without gaps to the end of the file, so that sizes give
        # positions.
        with safe_open(path, framework="numpy") as header:
            position = layout.data_start(length_field)
            for name in header.offset_keys():
                entry = header.get_slice(name)
                spec = layout.spec_of(f"{what}: tensor '{name}'", entry.get_dtype(), entry.get_shape())
                specs[name], places[name] = spec, _Place(path, position)
                position += spec.nbytes
    except SafetensorError as error:
        if path.name.endswith(_TORCH_SUFFIXES) or length_field.startswith(_TORCH_MAGIC):
            _refuse_torch_file(what)
        text = str(error).removeprefix("Error while deserializing header: ")
        reason = next((plain for known, plain in _REASONS.items() if known in text), text)
        raise InvalidInput(f"{what}: not a whole safetensors file: {reason}") from None
    return _File(specs, places, identity)


def _refuse_torch_file(what: str) -> NoReturn:
    raise InvalidInput(
        f"{what}: a file of torch.save, and this version reads safetensors only; convert its state dict once "
        f"with safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'model.safetensors')"
    )


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _some(names: list[str], limit: int = 5) -> str:
    listed = ", ".join(names[:limit])
    return f"{listed} and {len(names) - limit} more" if len(names) > limit else listed
