"""Files of ``torch.save``: their structure is read by torch without running a stranger's code, their tensors in place.

The archive is looked through here: entries stored as they are, side by side and inside the file. What torch is given is
a skeleton of it, with the pickle and records of no bytes: ``torch.load(weights_only=True, map_location="meta")`` builds
tensors without data, whose storages say at which record of the skeleton they are. From there on ordinary reads do.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from r2m.checkpoints.files import Checkpoint, Location, TensorFile, identity
from r2m.checkpoints.layout import some
from r2m.places import created, opened, unique
from r2m_kernels.errors import BadCheckpoint, printable, quoted
from r2m_kernels.streaming import TensorSpec

_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\x03\x04", b"\x80\x02"
# Under which keys training scripts put the weights, when they save more than those.
WRAPPERS = ("state_dict", "model", "model_state_dict")

_MOST_DIRECTORY = 2**26  # bytes of the archive's list of entries: half a million tensors
# What describes the tensors, and how many bytes it may have: as many tensors.
_DESCRIBING = {"data.pkl": 2**26, "version": 2**10, "byteorder": 2**10}
_END, _END_BYTES, _COMMENT = b"PK\x05\x06", 22, 2**16
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
# This makes a large object out of a number, and no state dict needs it.
_GROWING = ("builtins bytearray", "__builtin__ bytearray")
_QUANTIZED = "torch._utils _rebuild_qtensor"


@dataclass(frozen=True)
class _Archive:
    """An archive that was looked through.

    Attributes:
        skeleton: the same without what the tensors hold: every record is empty.
        records: where a record lies in the skeleton → where it begins in the file, and its bytes.
        digest: of all that describes the tensors.
    """

    skeleton: BinaryIO
    records: dict[int, tuple[int, int]]
    digest: str


def open_file(path: Path, what: str) -> TensorFile:
    """The tensors of a state dict, which may lie under one of :data:`WRAPPERS`; see :mod:`r2m.checkpoints.formats`."""
    with opened(path, what, BadCheckpoint) as file:
        known = identity(file.fileno())
        start = file.read(4)
        if not start.startswith(_ZIP_MAGIC):
            old = start.startswith(_PICKLE_MAGIC)
            kind = "of torch.save before torch 1.6" if old else "neither safetensors nor torch's"
            raise BadCheckpoint(
                f"{what}: a file {kind}; expected one that torch.save({{'name': tensor, …}}, PATH) of today writes"
            )
        archive = _looked_through(file, what)
    specs: dict[str, TensorSpec] = {}
    locations: dict[str, Location] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state_dict(_load(archive.skeleton, what), what).items():
        spec, location = _located(f"{what}: tensor {quoted(name)}", tensor, path, archive.records)
        specs[name], locations[name] = spec, location
        key = (location.offset, location.strides, spec.shape, spec.dtype)
        if spec.numel and key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    return TensorFile(specs, locations, known, archive.digest, aliases)


def save_file(source: Checkpoint, path: Path, names: Sequence[str]) -> None:
    """Write ``torch.save({name: tensor, …}, path)``, tied tensors tied; see :mod:`r2m.checkpoints.formats`.

    The tensors are taken from the checkpoint's pages as torch comes to them: memory does not hold them all.
    """
    tensors: dict[str, Tensor] = {}
    for name in names:
        first = source.aliases.get(name, name)
        tensors[name] = tensors[first] if first in tensors else source.mapped(name)
    with created(path) as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:  # torch's writer, when the file has already told what is wrong
            cause = error.__context__ if isinstance(error.__context__, OSError) else None
            raise cause or OSError(errno.EIO, f"torch could not write it: {error}") from None


def _load(skeleton: BinaryIO, what: str) -> Any:
    """What the pickle describes, its tensors without data."""
    # torch 2.10 reads the data of what goes nowhere, unless its tensors are fake.
    without_data: AbstractContextManager[object] = nullcontext()
    if torch.__version__ < "2.11":
        from torch._subclasses.fake_tensor import FakeTensorMode

        without_data = FakeTensorMode()
    try:
        with without_data:
            return torch.load(skeleton, map_location="meta", weights_only=True)
    except (Exception, RecursionError) as error:
        _refuse(what, str(error))


def _refuse(what: str, reason: str) -> NoReturn:
    program = re.search(r"GLOBAL (\S+)", reason)
    if program is not None:
        name = program.group(1).removesuffix(".")
        raise BadCheckpoint(
            f"{what}: holds {quoted(name)}, which could run code when it is loaded, and only tensors are; save its "
            "state_dict() where it was made, or trust it with this machine: r2m convert --allow-pickle"
        ) from None
    line = next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given")
    raise BadCheckpoint(f"{what}: not a whole file of torch.save: {printable(line[:200])}") from None


def state_dict(loaded: Any, what: str) -> dict[str, Tensor]:
    """The mapping of names to tensors: the whole, or what is under one of the wrappers' keys.

    Raises:
        BadCheckpoint: there is none.
    """
    if isinstance(loaded, Mapping):
        for key in WRAPPERS:  # tensors beside them are the training's, such as the centre of SVDD
            inner = loaded.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
                loaded = inner
                break
    if not isinstance(loaded, Mapping):
        raise BadCheckpoint(f"{what}: expected a state dict, got {type(loaded).__name__}")
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        keys = some([str(key) for key in loaded]) or "nothing"
        raise BadCheckpoint(
            f"{what}: holds no tensors by name, neither at the top nor under {', '.join(WRAPPERS)}; it has {keys}"
        )
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise BadCheckpoint(f"{what}: expected a state dict of tensors, got {kind} for {quoted(str(key))}")
    return dict(loaded)


def _located(
    what: str, tensor: Tensor, path: Path, records: Mapping[int, tuple[int, int]]
) -> tuple[TensorSpec, Location]:
    """Shape, dtype and place of a tensor that was loaded from the skeleton."""
    if tensor.layout is not torch.strided:
        raise BadCheckpoint(f"{what}: expected a dense tensor, got one of {tensor.layout}")
    position = tensor.untyped_storage()._checkpoint_offset
    if tensor.is_meta and position is None:
        raise BadCheckpoint(f"{what}: expected a dense tensor, got one without data")
    if tensor.is_conj() or tensor.is_neg():
        raise BadCheckpoint(f"{what}: expected a tensor as it is stored, got a conjugate or negative view")
    spec, strides, first = TensorSpec(tuple(tensor.shape), tensor.dtype), tensor.stride(), int(tensor.storage_offset())
    if spec.numel == 0:
        return spec, Location(path, 0)
    start, size = records.get(-1 if position is None else position, (0, -1))
    last = first + sum((count - 1) * stride for count, stride in zip(spec.shape, strides, strict=True))
    if min(first, *strides, 0) < 0 or (last + 1) * spec.dtype.itemsize > size:
        raise BadCheckpoint(f"{what}: its storage is not one of the file's records")
    if spec.nbytes > size:
        raise BadCheckpoint(f"{what}: shape {spec.shape} repeats the {size} bytes that are stored")
    return spec, Location(path, start + first * spec.dtype.itemsize, None if tensor.is_contiguous() else tuple(strides))


def _looked_through(file: BinaryIO, what: str) -> _Archive:
    """What torch may be given of an archive.

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
        raise BadCheckpoint(f"{what}: a zip file without the data.pkl of torch.save")
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
    _judge_pickle(parts["data.pkl"], what)
    skeleton, records = io.BytesIO(), {}
    with zipfile.ZipFile(skeleton, "w") as new:
        for name, content in parts.items():
            new.writestr(f"archive/{name}", content)
        for entry in entries:
            if entry.filename.startswith(f"{top}/data/"):
                new.writestr(f"archive/{entry.filename.removeprefix(f'{top}/')}", b"")
                records[skeleton.tell()] = (starts[entry.filename], entry.file_size)
    skeleton.seek(0)
    described = sorted((starts[entry.filename], entry.file_size) for entry in entries)
    digest = hashlib.sha256(repr(described).encode() + parts["data.pkl"]).hexdigest()
    return _Archive(skeleton, records, digest)


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
        raise BadCheckpoint(f"{what}: its list of entries has {size} bytes, expected at most {_MOST_DIRECTORY}")


def _judge_pickle(content: bytes, what: str) -> None:
    """Refuse a pickle that could grow beyond what it takes in the file, or has no places. It is read, not run."""
    try:
        names = [argument for operation, argument, _ in pickletools.genops(content) if operation.name == "GLOBAL"]
    except (ValueError, IndexError, KeyError, UnicodeError, OverflowError, MemoryError, TypeError) as error:
        _refuse(what, f"its data.pkl is damaged: {error}")
    growing = next((str(name) for name in names if name in _GROWING), None)
    if growing is not None:
        _refuse(what, f"GLOBAL {growing.replace(' ', '.')}")
    if _QUANTIZED in names:
        raise BadCheckpoint(f"{what}: expected dense tensors, got quantized ones")
