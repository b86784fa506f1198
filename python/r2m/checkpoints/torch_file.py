"""Files of ``torch.save``: what they describe is read as data, their tensors are read in place, and nothing is run.

Since torch 1.6 a file is an archive, looked through here: entries stored as they are, side by side and inside the file.
A pickle among them describes the tensors, each record is a storage. Before, a file was pickles, one after another, and
then the storages.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from r2m.checkpoints import class_names, pickles, state_dict, strangers
from r2m.checkpoints.files import Location, TensorFile, identity
from r2m.checkpoints.torch_names import Described, TorchNames
from r2m.checkpoints.torch_writer import save_file as save_file
from r2m.places import opened, unique
from r2m_kernels.errors import BadCheckpoint, printable, quoted
from r2m_kernels.streaming import TensorSpec

_ZIP_MAGIC = b"PK\x03\x04"
_MOST_DIRECTORY = 2**26  # bytes of the archive's list of entries: half a million tensors
# What describes the tensors, and how many bytes it may have: as many tensors.
_DESCRIBING = {"data.pkl": 2**26, "version": 2**10, "byteorder": 2**10}
_END, _END_BYTES, _COMMENT = b"PK\x05\x06", 22, 2**16
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
# Of a file before torch 1.6: how it begins, and how much of it is read to find out where its storages do.
_MAGIC, _PROTOCOL, _READ = 0x1950A86A20F9469CFC6C, 1001, (2**20, 2**23, 2**26)


@dataclass(frozen=True)
class _Content:
    """What a file says.

    Attributes:
        loaded: its value, tensors as descriptions.
        records: key of a storage → where it begins in the file, and its bytes.
        digest: of all that describes the tensors.
    """

    loaded: Any
    records: dict[str, tuple[int, int]]
    digest: str


def open_file(path: Path, what: str, key: str | None = None) -> TensorFile:
    """The tensors of a state dict, wherever in the file it is; see :mod:`r2m.checkpoints.formats`."""
    with opened(path, what, BadCheckpoint) as file:
        known = identity(file.fileno())
        start = file.read(len(_ZIP_MAGIC))
        if not start.startswith((_ZIP_MAGIC, pickle.PROTO)):
            raise BadCheckpoint(
                f"{what}: a file neither safetensors nor torch's; expected one that "
                "torch.save({'name': tensor, …}, PATH) writes"
            )
        content = _looked_through(file, what) if start == _ZIP_MAGIC else _before_archives(file, what)
    chosen = state_dict.chosen(content.loaded, what, Described, key)
    specs: dict[str, TensorSpec] = {}
    locations: dict[str, Location] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in chosen.tensors.items():
        spec, location = _located(f"{what}: tensor {quoted(name)}", tensor, path, content.records)
        specs[name], locations[name] = spec, location
        place = (location.offset, location.strides, spec.shape, spec.dtype)
        if spec.numel and place in first:
            aliases[name] = first[place]
        first.setdefault(place, name)
    about = class_names.entries(content.loaded)
    return TensorFile(specs, locations, known, content.digest, aliases, chosen.key, chosen.notes, about)


def _loaded(content: bytes, what: str) -> Any:
    """The value of an archive's pickle."""
    try:
        return pickles.read(content, TorchNames(len(content)))[0]
    except pickles.Refused as error:
        _refuse_pickle(error, what)


def _refuse_pickle(error: pickles.Refused, what: str) -> NoReturn:
    if error.program:
        raise BadCheckpoint(
            f"{what}: holds {quoted(error.program[:200])}, which could run code when it is loaded, and only tensors "
            "are; save its state_dict() where it was made, or trust it with this machine: r2m convert --allow-pickle"
        ) from None
    _refuse(what, f"its pickle {error}")


def _refuse(what: str, reason: str) -> NoReturn:
    raise BadCheckpoint(f"{what}: not a whole file of torch.save: {printable(reason[:200])}") from None


def _located(
    what: str, tensor: Described, path: Path, records: Mapping[str, tuple[int, int]]
) -> tuple[TensorSpec, Location]:
    """Shape, dtype and place of a tensor."""
    if tensor.strange:
        raise BadCheckpoint(f"{what}: expected a dense tensor as it is stored, got {tensor.strange}")
    if tensor.dtype in _QUANTIZED:
        raise BadCheckpoint(f"{what}: expected a dense tensor as it is stored, got a quantized one")
    spec, strides = TensorSpec(tensor.shape, tensor.dtype), tensor.strides
    if spec.numel == 0:
        return spec, Location(path, 0)
    start, size = records.get(tensor.key, (0, -1))
    last = sum((count - 1) * stride for count, stride in zip(spec.shape, strides, strict=True))
    if tensor.offset + (last + 1) * spec.dtype.itemsize > size:
        raise BadCheckpoint(f"{what}: its storage is not one of the file's records")
    if spec.nbytes > size:
        raise BadCheckpoint(f"{what}: shape {spec.shape} repeats the {size} bytes that are stored")
    return spec, Location(path, start + tensor.offset, None if _in_order(spec.shape, strides) else strides)


def _in_order(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements follow one another."""
    expected = 1
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count != 1 and stride != expected:
            return False
        expected *= count
    return True


def _before_archives(file: BinaryIO, what: str) -> _Content:
    """What a file from before torch 1.6 says: five pickles, of which the fourth is the value, then its storages."""
    size = os.fstat(file.fileno()).st_size
    for most in _READ:
        file.seek(0)
        content = file.read(most)
        names = TorchNames(len(content))
        values: list[Any] = []
        at = 0
        try:
            while len(values) < 5:
                value, at = pickles.read(content, names, at)
                values.append(value)
                if values[:2] != [_MAGIC, _PROTOCOL][: len(values)]:
                    raise BadCheckpoint(f"{what}: a pickle of Python that torch.save did not write")
            break
        except pickles.Refused as error:
            if not error.damaged or most == _READ[-1] or len(content) == size:
                _refuse_pickle(error, what)
    _, _, system, loaded, keys = values
    if not isinstance(system, dict) or system.get("little_endian") != (sys.byteorder == "little"):
        raise BadCheckpoint(f"{what}: its numbers are not {sys.byteorder}-endian, and this machine's are")
    records, digest = {}, hashlib.sha256(content[:at])
    for key in keys if isinstance(keys, list) else ():
        file.seek(at)
        length = file.read(8)
        nbytes = int.from_bytes(length, "little") * names.storages[key].itemsize if key in names.storages else -1
        if len(length) < 8 or nbytes < 0 or at + 8 + nbytes > size:
            _refuse(what, "a storage leaves the file, which is cut off")
        records[key] = (at + 8, nbytes)
        at += 8 + nbytes
    digest.update(repr(list(records.values())).encode())
    return _Content(loaded, records, digest.hexdigest())


def _looked_through(file: BinaryIO, what: str) -> _Content:
    """What an archive says.

    Raises:
        BadCheckpoint: entries compressed, overlapping, out of the file or of one name; lists too long; TorchScript.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _END_BYTES - _COMMENT))
    _bound_directory(file.read(), what)
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeError, struct.error, EOFError) as error:
        _refuse(what, f"{error} (cut off?)")
    names = [entry.filename for entry in entries]
    unique([(name, None) for name in names], what, BadCheckpoint)
    top = names[0].partition("/")[0] if names else ""  # as torch has it
    if f"{top}/data.pkl" not in names:
        raise BadCheckpoint(f"{what}: {strangers.of_archive(names)}")
    outside = next((name for name in names if not name.startswith(f"{top}/")), None)
    if outside is not None:
        raise BadCheckpoint(f"{what}: the entry {quoted(outside)} lies beside {quoted(top)}, where the others do")
    if f"{top}/constants.pkl" in names or any("/code/" in name for name in names):
        raise BadCheckpoint(
            f"{what}: a TorchScript archive, which is a program; save the state_dict() of what torch.jit.load "
            "gives, or trust it with this machine: r2m convert --allow-pickle"
        )
    starts = _starts(file, entries, size, what)
    parts = {
        name: _content(archive, f"{top}/{name}", most, what)
        for name, most in _DESCRIBING.items()
        if f"{top}/{name}" in names
    }
    order = parts.get("byteorder", b"little").decode(errors="replace")
    if order != sys.byteorder:
        raise BadCheckpoint(f"{what}: its numbers are {quoted(order)}-endian, and this machine's are {sys.byteorder}")
    data = f"{top}/data/"
    records = {
        entry.filename.removeprefix(data): (starts[entry.filename], entry.file_size)
        for entry in entries
        if entry.filename.startswith(data)
    }
    described = sorted((starts[entry.filename], entry.file_size) for entry in entries)
    digest = hashlib.sha256(repr(described).encode() + parts["data.pkl"]).hexdigest()
    return _Content(_loaded(parts["data.pkl"], what), records, digest)


def _starts(file: BinaryIO, entries: Sequence[zipfile.ZipInfo], size: int, what: str) -> dict[str, int]:
    """Name → position of the first byte of its content."""
    starts: dict[str, int] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        file.seek(max(0, entry.header_offset))  # negative where the archive's start is cut off
        header = file.read(_LOCAL.size)
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
        if not stored:
            raise BadCheckpoint(f"{what}: the entry {quoted(entry.filename)} is compressed, which torch never does")
        whole = len(header) == _LOCAL.size and header.startswith(_ZIP_MAGIC) and entry.header_offset >= end
        if whole:
            *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
            starts[entry.filename] = entry.header_offset + _LOCAL.size + name_bytes + extra_bytes
            end = starts[entry.filename] + entry.file_size
        if not whole or end > size:
            raise BadCheckpoint(f"{what}: the entry {quoted(entry.filename)} overlaps another or leaves the file")
    return starts


def _content(archive: zipfile.ZipFile, name: str, most: int, what: str) -> bytes:
    entry = archive.getinfo(name)
    last = name.rpartition("/")[2]
    if entry.file_size > most:
        raise BadCheckpoint(f"{what}: its {last} has {entry.file_size} bytes, expected at most {most}")
    try:
        return archive.read(entry)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:  # also: encrypted
        _refuse(what, str(error))


def _bound_directory(tail: bytes, what: str) -> None:
    """Refuse an archive whose list of entries is too long to be read."""
    at = tail.rfind(_END)
    if at < 0 or at + _END_BYTES > len(tail):
        _refuse(what, "its end is missing (cut off?)")
    (size,) = struct.unpack_from("<I", tail, at + 12)
    locator = tail.rfind(b"PK\x06\x06", 0, at)
    if locator >= 0 and locator + 56 <= len(tail):  # zip64: the true numbers stand in a record of their own
        (size,) = struct.unpack_from("<Q", tail, locator + 40)
    elif size == 2**32 - 1:
        _refuse(what, "its list of entries is damaged")
    if size > _MOST_DIRECTORY:
        raise BadCheckpoint(
            f"{what}: its list of entries has {size} bytes, expected at most {_MOST_DIRECTORY}, or safetensors"
        )
