"""Files of ``torch.save``: their structure is read by torch without running a stranger's code, their tensors in place.

``torch.load(weights_only=True, mmap=True)`` builds tensors over a mapping that nobody touches; where the mapping lies
says where each storage is in the file, and from there on ordinary reads do. Before that the archive is looked through:
what torch is given is a zip file whose entries are stored as they are, side by side and inside the file.
"""

from __future__ import annotations

import errno
import hashlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from r2m.checkpoints import layout
from r2m.checkpoints.files import Checkpoint, File, Place, identity
from r2m.checkpoints.layout import some
from r2m.places import created
from r2m_kernels.errors import InvalidInput, printable, quoted
from r2m_kernels.streaming import TensorSpec

ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80\x02"
# Under which keys training scripts put the weights, when they save more than those.
WRAPPERS = ("state_dict", "model", "model_state_dict")

_MOST_DIRECTORY = 2**26  # bytes of the archive's list of entries: half a million tensors
_MOST_PICKLE = 2**26  # of the pickle that describes the tensors: as many
_END, _END_BYTES, _COMMENT = b"PK\x05\x06", 22, 2**16
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
# This makes a large object out of a number, and no state dict needs it.
_GROWING = ("builtins bytearray", "__builtin__ bytearray")


def looks_like(path: Path, start: bytes) -> bool:
    """Whether a file that is no safetensors file is torch's: by its first bytes, or else by its name."""
    return start.startswith((ZIP_MAGIC, PICKLE_MAGIC)) or path.name.endswith(layout.TORCH_SUFFIXES)


def open_torch_file(path: Path, what: str) -> File:
    """The tensors of a state dict, which may lie under one of :data:`WRAPPERS`.

    Args:
        path: a regular file.
        what: how error messages name it.

    Raises:
        InvalidInput: not such an archive, damaged, of a kind that would need code to run, or no state dict.
        OSError: it cannot be read; ``filename`` is set.
    """
    with path.open("rb") as file:
        known = identity(file.fileno())
        start = file.read(4)
    if not start.startswith(ZIP_MAGIC):
        kind = "of torch.save before torch 1.6" if start.startswith(PICKLE_MAGIC) else "neither safetensors nor torch's"
        raise InvalidInput(
            f"{what}: a file {kind}; expected one that torch.save({{'name': tensor, …}}, PATH) of today writes"
        )
    records, digest = _records(path, what)
    loaded = _load(path, what)
    state = state_dict(loaded, what)
    specs: dict[str, TensorSpec] = {}
    places: dict[str, Place] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    mapped = _Mappings()
    for name, tensor in state.items():
        spec, place = _placed(f"{what}: tensor {quoted(name)}", tensor, path, records, mapped)
        specs[name], places[name] = spec, place
        key = (place.offset, place.strides, spec.shape, spec.dtype)
        if spec.numel and key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    return File(specs, places, known, digest, aliases)


def save_torch_file(source: Checkpoint, path: Path, names: Sequence[str]) -> None:
    """Write a checkpoint as ``torch.save({name: tensor, …}, path)``, tied tensors tied, and bring it to the disk.

    The tensors are taken from the checkpoint's pages as torch comes to them: memory does not hold them all.

    Args:
        source: the checkpoint.
        path: the file to write.
        names: all of its tensors, in the order of the file.

    Raises:
        OSError: it cannot be written; ``filename`` is set.
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


def _load(path: Path, what: str) -> Any:
    try:
        # By its descriptor: torch takes a file for another kind if its name ends in ".safetensors".
        with path.open("rb") as file:
            return torch.load(f"/proc/self/fd/{file.fileno()}", map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except (Exception, RecursionError) as error:
        _refuse(what, str(error))


def _refuse(what: str, reason: str) -> NoReturn:
    found = re.search(r"GLOBAL (\S+)", reason)
    if found is not None:
        name = found.group(1).removesuffix(".")
        raise InvalidInput(
            f"{what}: holds {quoted(name)}, which could run code when it is loaded, and only tensors are; save its "
            "state_dict() where it was made, or trust it with this machine: r2m convert --allow-pickle"
        ) from None
    line = next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given")
    raise InvalidInput(f"{what}: not a whole file of torch.save: {printable(line[:200])}") from None


def state_dict(loaded: Any, what: str) -> dict[str, Tensor]:
    """The mapping of names to tensors: the whole, or what is under one of the wrappers' keys.

    Raises:
        InvalidInput: there is none.
    """
    if isinstance(loaded, Mapping):
        for key in WRAPPERS:  # tensors beside them are the training's, such as the centre of SVDD
            inner = loaded.get(key)
            if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
                loaded = inner
                break
    if not isinstance(loaded, Mapping):
        raise InvalidInput(f"{what}: expected a state dict, got {type(loaded).__name__}")
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        keys = some([str(key) for key in loaded]) or "nothing"
        raise InvalidInput(
            f"{what}: holds no tensors by name, neither at the top nor under {', '.join(WRAPPERS)}; it has {keys}"
        )
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise InvalidInput(f"{what}: expected a state dict of tensors, got {kind} for {quoted(str(key))}")
    return dict(loaded)


def _placed(
    what: str, tensor: Tensor, path: Path, records: Mapping[int, int], mapped: _Mappings
) -> tuple[TensorSpec, Place]:
    """Shape, dtype and place of a tensor over the mapping of the file."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "without data" if tensor.is_meta else "quantized" if tensor.is_quantized else f"of {tensor.layout}"
        raise InvalidInput(f"{what}: expected a dense tensor, got one {kind}")
    if tensor.is_conj() or tensor.is_neg():
        raise InvalidInput(f"{what}: expected a tensor as it is stored, got a conjugate or negative view")
    spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
    if spec.numel == 0:
        return spec, Place(path, 0)
    storage = tensor.untyped_storage()
    start = mapped.position(storage.data_ptr())
    if start is None or records.get(start, -1) < storage.nbytes():
        raise InvalidInput(f"{what}: its storage is not one of the file's records")
    if spec.nbytes > storage.nbytes():
        raise InvalidInput(f"{what}: shape {spec.shape} repeats the {storage.nbytes()} bytes that are stored")
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return spec, Place(path, start + int(tensor.storage_offset()) * tensor.dtype.itemsize, strides)


class _Mappings:
    """Where files are mapped into this process."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, int]] = []
        with open("/proc/self/maps", "rb") as file:
            for line in file:
                addresses, _, offset, _, inode, *_ = line.split(maxsplit=5)
                if inode != b"0":
                    start, stop = (int(address, 16) for address in addresses.split(b"-"))
                    self._ranges.append((start, stop, int(offset, 16)))

    def position(self, address: int) -> int | None:
        """The place in its file of what is mapped at an address; None where no file is."""
        for start, stop, offset in self._ranges:
            if start <= address < stop:
                return address - start + offset
        return None


def _records(path: Path, what: str) -> tuple[dict[int, int], str]:
    """Position → size of every entry's content, and a hash of what describes the tensors.

    Raises:
        InvalidInput: entries that are compressed, overlap, leave the file or share a name; lists too long; TorchScript.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END_BYTES - _COMMENT))
        _bound_directory(file.read(), what)
        try:
            archive = zipfile.ZipFile(file)
            entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeError, struct.error, EOFError) as error:
            _refuse(what, f"{error} (cut off?)")
        names = [entry.filename for entry in entries]
        layout.unique(what, [(name, None) for name in names])
        last = {name.rpartition("/")[2]: name for name in names if name.count("/") == 1}
        if "data.pkl" not in last:
            raise InvalidInput(f"{what}: a zip file without the data.pkl of torch.save")
        if "constants.pkl" in last or any("/code/" in name for name in names):
            raise InvalidInput(
                f"{what}: a TorchScript archive, which is a program; save the state_dict() of what torch.jit.load "
                "gives, or trust it with this machine: r2m convert --allow-pickle"
            )
        records: dict[int, int] = {}
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            file.seek(max(0, entry.header_offset))  # negative where the archive's start is cut off
            header = file.read(_LOCAL.size)
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
            if not stored:
                raise InvalidInput(f"{what}: the entry {quoted(entry.filename)} is compressed, which torch never does")
            if len(header) < _LOCAL.size or not header.startswith(ZIP_MAGIC) or entry.header_offset < end:
                raise InvalidInput(f"{what}: the entry {quoted(entry.filename)} overlaps another or leaves the file")
            *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
            start = entry.header_offset + _LOCAL.size + name_bytes + extra_bytes
            end = start + entry.file_size
            if end > size:
                raise InvalidInput(f"{what}: the entry {quoted(entry.filename)} overlaps another or leaves the file")
            records[start] = entry.file_size
        pickle = archive.getinfo(last["data.pkl"])
        if pickle.file_size > _MOST_PICKLE:
            raise InvalidInput(f"{what}: its data.pkl has {pickle.file_size} bytes, expected at most {_MOST_PICKLE}")
        try:
            content = archive.read(pickle)
        except zipfile.BadZipFile as error:
            _refuse(what, str(error))
    _look_through(content, what)
    return records, hashlib.sha256(repr(sorted(records.items())).encode() + content).hexdigest()


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
        raise InvalidInput(f"{what}: its list of entries has {size} bytes, expected at most {_MOST_DIRECTORY}")


def _look_through(content: bytes, what: str) -> None:
    """Refuse a pickle that could grow beyond what it takes in the file. It is read, not run."""
    try:
        names = [argument for operation, argument, _ in pickletools.genops(content) if operation.name == "GLOBAL"]
    except (ValueError, IndexError, KeyError, UnicodeError, OverflowError, MemoryError, TypeError) as error:
        _refuse(what, f"its data.pkl is damaged: {error}")
    growing = next((str(name) for name in names if name in _GROWING), None)
    if growing is not None:
        _refuse(what, f"GLOBAL {growing.replace(' ', '.')}")
