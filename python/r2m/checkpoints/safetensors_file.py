"""safetensors files: where their tensors lie, and how they are laid out for writing.

8 bytes N (little-endian), N bytes of JSON header, then the tensors without gaps.

Reference: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from r2m.checkpoints.class_names import is_key
from r2m.checkpoints.files import Location, TensorFile, identity
from r2m.checkpoints.formats import SAFETENSORS
from r2m.places import mapping, opened, unique
from r2m_kernels.errors import BadCheckpoint, printable, quoted
from r2m_kernels.streaming import TensorSpec

_LARGE = 2**22  # bytes of a header, of some ten thousand tensors
_MOST_HEADER = 10**8  # bytes; the format's own bound
LENGTH_BYTES = 8
_ALIGNMENT = 8
_FORMAT = {"format": "pt"}  # ``transformers`` refuses files without it
_TIED = "r2m_tied"  # in the metadata: which of them are names of tensors

# What the library's reasons mean to someone who only knows the file; others are shown as they are.
_REASONS = {
    "header too small": "it is shorter than any safetensors file",
    "header too large": "its header would be larger than the format allows",
    "invalid header length": "its header would end after the file, which is cut off or no safetensors file",
    "file not fully covered": "it is cut off, or longer than its header says",
    "overflow": "its header announces a tensor too large for any file",
}

# In the order of the safetensors library, which sorts a file's tensors by descending position in this list.
# Wider types come later, so that order keeps every tensor aligned to its own element size.
_DTYPE_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _DTYPE_NAMES.items() if hasattr(torch, name)
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ORDER = {dtype: position for position, dtype in enumerate(_DTYPES.values())}


def _spec_of(code: str, shape: Sequence[int]) -> TensorSpec:
    """The tensor that a header entry describes, as torch sees it.

    Args:
        code: the header's ``dtype``, such as ``"BF16"``.
        shape: the header's ``shape``, in elements.

    Raises:
        ValueError: torch has no such dtype, or cannot hold such a shape.
    """
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise ValueError(f"torch {torch.__version__} has no type for the safetensors dtype {code}")
    sizes = tuple(shape)
    if code == "F4":
        # torch packs two 4-bit elements of a row into one.
        if not sizes or sizes[-1] % 2:
            raise ValueError(f"torch cannot hold 4-bit rows of odd length, shape {sizes}")
        sizes = (*sizes[:-1], sizes[-1] // 2)
    # The library checks sizes against the file, except where a 0 among them makes their product 0.
    if 0 in sizes and math.prod(max(size, 1) for size in sizes) >= 2**63:
        raise ValueError(f"shape {tuple(shape)} is too large")
    return TensorSpec(sizes, dtype)


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file to be written.

    Attributes:
        name: file name inside the checkpoint's directory.
        header: the length field and the JSON header, padded so that the data is aligned to 8 bytes.
        offsets: tensor name → position of its first byte in the file.
        size: bytes of the whole file.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def plan_files(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    max_shard_size: int,
    aliases: Mapping[str, str] | None = None,
    single: str = SAFETENSORS.single,
) -> list[PlannedFile]:
    """Where every tensor goes: a function of the arguments' contents, not of the order of ``specs``.

    Names are sorted and fill one shard after the other, each up to ``max_shard_size`` bytes of tensors; a
    larger tensor has a shard of its own. One shard is ``single``, more are
    ``model-00001-of-0000N.safetensors``.

    Args:
        specs: every tensor.
        metadata: of every file's header.
        max_shard_size: bytes of tensors per file.
        aliases: name → the name it is tied to. Such a name is not stored: the header's metadata say so, as those of
            ``safetensors.torch.save_model`` do.
        single: what the only file is called.

    Raises:
        BadCheckpoint: a dtype that safetensors cannot store.
    """
    aliases = aliases or {}
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(specs.keys() - aliases.keys()):
        nbytes = specs[name].nbytes
        if shards[-1] and filled + nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    files = []
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else single
        here = set(shard)
        tied = {name: first for name, first in aliases.items() if first in here}
        if tied:
            tied |= {_TIED: "\0".join(sorted(tied))}
        files.append(_plan_file(file_name, {name: specs[name] for name in shard}, {**metadata, **tied}))
    return files


def _plan_file(file_name: str, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> PlannedFile:
    for name, spec in specs.items():
        if spec.dtype not in _CODES:
            raise BadCheckpoint(f"tensor {quoted(name)}: safetensors cannot store {spec.dtype}")
    header: dict[str, object] = {"__metadata__": dict(sorted({**metadata, **_FORMAT}.items()))}
    starts: dict[str, int] = {}
    position = 0
    for name in sorted(specs, key=lambda name: (-_ORDER[specs[name].dtype], name)):
        spec = specs[name]
        code = _CODES[spec.dtype]
        shape = list(spec.shape)
        if code == "F4":
            shape[-1] *= 2
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [position, position + spec.nbytes]}
        starts[name] = position
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data = LENGTH_BYTES + len(text)
    offsets = {name: data + start for name, start in starts.items()}
    return PlannedFile(file_name, struct.pack("<Q", len(text)) + text, offsets, data + position)


def open_file(path: Path, what: str, key: str | None = None) -> TensorFile:
    """The tensors of a safetensors file; see :meth:`r2m.checkpoints.formats.Format.open`.

    The library judges the header, after a look of our own at what it lets pass; not one of a million tensors that is
    plainly in order.
    """
    with opened(path, what, BadCheckpoint) as file:
        known = identity(file.fileno())
        length_field = file.read(LENGTH_BYTES)
        length = int.from_bytes(length_field, "little")
        header = file.read(length) if length <= min(_MOST_HEADER, os.fstat(file.fileno()).st_size) else b""
        whole = os.fstat(file.fileno()).st_size
    found, metadata = (len(header) >= _LARGE and _in_order(header, whole)) or _judged(path, what, header)
    specs: dict[str, TensorSpec] = {}
    locations: dict[str, Location] = {}
    position = LENGTH_BYTES + length
    for name, spec, size in found:
        specs[name] = spec
        locations[name] = Location(path, position)
        position += size
    aliases = {name: first for name, first in _tied(metadata) if first in specs and name not in specs}
    for name, first in aliases.items():
        specs[name], locations[name] = specs[first], locations[first]
    digest = hashlib.sha256(length_field + header).hexdigest()
    return TensorFile(specs, locations, known, digest, aliases, about=_about(metadata))


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of the classifier's outputs, as JSON in its metadata."""
    found: dict[str, Any] = {}
    for name, text in metadata.items():
        if is_key(name):
            with contextlib.suppress(BadCheckpoint):  # another's meaning
                found |= {name: mapping(b'{"": %s}' % text.encode(), name, BadCheckpoint)[""]}
    return found


def _tied(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names in a file's metadata, and the stored tensors they are, if there are such.

    As ``safetensors.torch.save_model`` has it anything in there that equals a tensor's name would be one; so names end
    alike, as of layers that share a weight, or are listed.
    """
    listed = set(metadata.get(_TIED, "").split("\0"))
    for name, first in metadata.items():
        ending = "." + name.rpartition(".")[2]
        if name in listed or (name.endswith(ending) and first.endswith(ending)):
            yield name, first


# Name, what it is, bytes; in the order of the file, where they follow one another without gaps.
_Found = Iterable[tuple[str, TensorSpec, int]]


def _judged(path: Path, what: str, header: bytes) -> tuple[_Found, Mapping[str, str]]:
    """The tensors of a file and its metadata, by the library."""
    alike: dict[tuple[str, tuple[int, ...]], TensorSpec] = {}
    found = []
    try:
        # The library maps the file for the length of this block and touches its header alone. It has checked that the
        # tensors follow one another without gaps to the end of the file, and that they have the sizes of their shapes.
        with safe_open(path, framework="numpy") as library:
            names = library.offset_keys()
            if b"\\" in header or header.count(b'"data_offsets"') != len(names) or header.count(b'"__metadata__"') > 1:
                _refuse_repeated(header, what)
            for name in names:
                one = library.get_slice(name)
                kind = (one.get_dtype(), tuple(one.get_shape()))
                if kind not in alike:
                    try:
                        alike[kind] = _spec_of(*kind)
                    except ValueError as error:
                        raise BadCheckpoint(f"{what}: tensor {quoted(name)}: {error}") from None
                found.append((name, alike[kind], alike[kind].nbytes))
            return found, library.metadata() or {}
    except SafetensorError as error:
        _refuse_repeated(header, what)
        text = str(error).removeprefix("Error while deserializing header: ")
        reason = next((plain for known, plain in _REASONS.items() if known in text), text)
        raise BadCheckpoint(f"{what}: not a whole safetensors file: {printable(reason)}") from None


def _in_order(header: bytes, whole: int) -> tuple[_Found, Mapping[str, str]] | None:
    """The same of a header of which nothing can be doubted; ``None``: the library has to judge it.

    The library takes half of the time in which a million tensors are described. Every name and field stands there once,
    unescaped; tensors follow one another as they are listed, from the first byte to the last, in known types.

    Args:
        whole: bytes of the file.
    """
    try:
        entries = json.loads(header.decode())
    except (ValueError, RecursionError):
        return None
    metadata = entries.pop("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        return None
    fields = (b'"dtype"', b'"shape"', b'"data_offsets"')
    once = header[:1] == b"{" and b"\\" not in header and header.count(b'"__metadata__"') <= 1
    if not once or any(header.count(field) != len(entries) for field in fields):
        return None
    alike: dict[tuple[str, tuple[int, ...]], tuple[TensorSpec, int]] = {}
    found, position = [], 0
    for name, entry in entries.items():
        try:
            kind = (entry["dtype"], tuple(entry["shape"]))
            start, stop = entry["data_offsets"]
            if kind not in alike:
                spec = _spec_of(*kind) if all(type(size) is int and size >= 0 for size in kind[1]) else None
                if spec is None or kind[0] == "F4":
                    return None
                alike[kind] = spec, spec.nbytes
            spec, size = alike[kind]
        except (ValueError, TypeError, LookupError):
            return None
        if (
            len(entry) != 3
            or type(start) is not int
            or type(stop) is not int
            or (start, stop - start) != (position, size)
        ):
            return None
        found.append((name, spec, size))
        position = stop
    return (found, metadata) if LENGTH_BYTES + len(header) + position == whole else None


def _refuse_repeated(header: bytes, what: str) -> None:
    """Refuse a header with a name given twice, of which the library would take one.

    It takes as long as all else about a large header. What is no header at all the library says.
    """
    try:
        json.loads(header, object_pairs_hook=lambda pairs: unique(pairs, f"{what}: header", BadCheckpoint))
    except BadCheckpoint:
        raise
    except (ValueError, RecursionError):
        return
