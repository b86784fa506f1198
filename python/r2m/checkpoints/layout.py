"""The safetensors format and the Hugging Face directory layout, as the reader and the writer share them.

A safetensors file is 8 bytes N (little-endian), N bytes of JSON header, then the tensors without gaps. A
sharded checkpoint adds an index file that says which tensor lies in which file.

Reference: https://huggingface.co/docs/safetensors (format), ``transformers`` (file names and index).
"""

from __future__ import annotations

import functools
import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from r2m_kernels import checks
from r2m_kernels.errors import InvalidInput, printable, quoted
from r2m_kernels.streaming import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_OUTPUT = "model.pth"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
MOST_HEADER = 10**8  # bytes; the format's own bound
MOST_INDEX = 2**27
LENGTH_BYTES = 8
_ALIGNMENT = 8
_FORMAT = {"format": "pt"}  # ``transformers`` refuses files without it

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


def spec_of(what: str, code: str, shape: Sequence[int]) -> TensorSpec:
    """The tensor that a header entry describes, as torch sees it.

    Args:
        what: the tensor, for the error message.
        code: the header's ``dtype``, such as ``"BF16"``.
        shape: the header's ``shape``, in elements.

    Raises:
        InvalidInput: torch has no such dtype, or cannot hold such a shape.
    """
    if code not in _DTYPES:
        raise InvalidInput(f"{what}: torch {torch.__version__} has no type for the safetensors dtype {code}")
    sizes = list(shape)
    if code == "F4":
        # torch packs two 4-bit elements of a row into one.
        if not sizes or sizes[-1] % 2:
            raise InvalidInput(f"{what}: torch cannot hold 4-bit rows of odd length, shape {tuple(shape)}")
        sizes[-1] //= 2
    extent = 1
    for size in sizes:
        extent *= max(size, 1)
    # The library checks sizes against the file, except where a 0 among them makes their product 0.
    if extent >= 2**63:
        raise InvalidInput(f"{what}: shape {tuple(shape)} is too large")
    return TensorSpec(tuple(sizes), _DTYPES[code])


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
) -> list[PlannedFile]:
    """Where every tensor goes: a function of the arguments' contents, not of the order of ``specs``.

    Names are sorted and fill one shard after the other, each up to ``max_shard_size`` bytes of tensors; a
    larger tensor has a shard of its own. One shard is ``model.safetensors``, more are
    ``model-00001-of-0000N.safetensors``.

    Args:
        specs: every tensor.
        metadata: of every file's header.
        max_shard_size: bytes of tensors per file.
        aliases: name → the name it is tied to. Such a name is not stored: the header's metadata say so, as those of
            ``safetensors.torch.save_model`` do.

    Raises:
        InvalidInput: a dtype that safetensors cannot store.
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
    count = len(shards)
    names = (
        [SINGLE_FILE]
        if count == 1
        else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )
    return [
        _plan_file(
            file_name,
            {name: specs[name] for name in shard},
            {**metadata, **{name: first for name, first in aliases.items() if first in shard}},
        )
        for file_name, shard in zip(names, shards, strict=True)
    ]


def _plan_file(file_name: str, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> PlannedFile:
    for name, spec in specs.items():
        if spec.dtype not in _CODES:
            raise InvalidInput(f"tensor {quoted(name)}: safetensors cannot store {spec.dtype}")
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
    return PlannedFile(
        name=file_name,
        header=struct.pack("<Q", len(text)) + text,
        offsets={name: data + start for name, start in starts.items()},
        size=data + position,
    )


def tied_names(metadata: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Name → the stored tensor it is tied to, as a header's metadata tell it."""
    return {
        name: first for name, first in metadata.items() if first in specs and name not in specs and name not in _FORMAT
    }


def data_start(length_field: bytes) -> int:
    """Position of the first tensor byte, from a file's first 8 bytes."""
    (length,) = struct.unpack("<Q", length_field)
    return LENGTH_BYTES + int(length)


def encode_index(files: Sequence[PlannedFile], total_size: int) -> bytes:
    """The text of ``model.safetensors.index.json``; ``total_size``: bytes of all tensors."""
    weight_map = {name: file.name for file in files for name in file.offsets}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def chosen(names: Sequence[str], label: str) -> str:
    """The file that a directory's checkpoint is in, or its index.

    ``model.safetensors`` comes first, as in ``transformers``; then ``model.safetensors.index.json``; then the only
    ``*.safetensors`` there is; then ``pytorch_model.bin`` and its index; then the only file of ``torch.save``.

    Args:
        names: of its files.
        label: how error messages name it.

    Raises:
        InvalidInput: there is none, or there are several and no index.
    """
    kinds = (
        (SINGLE_FILE, INDEX_FILE, (".safetensors",)),
        (TORCH_FILE, TORCH_INDEX_FILE, TORCH_SUFFIXES),
    )
    for single, index, suffixes in kinds:
        found = [name for name in names if name.endswith(suffixes)]
        for name in (single, index):
            if name in names:
                return name
        if len(found) == 1:
            return found[0]
        if found:
            raise InvalidInput(
                f"{label}: holds {len(found)} *{' *'.join(suffixes)} files ({some(found)}) and no {index}; "
                "name the one that is meant"
            )
    raise InvalidInput(f"{label}: the directory holds no safetensors file and none of torch.save")


def some(names: Sequence[str], limit: int = 5) -> str:
    """A few of many names, for a message."""
    listed = ", ".join(printable(name) for name in names[:limit])
    return f"{listed} and {len(names) - limit} more" if len(names) > limit else listed


def decode_index(what: str, text: bytes) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name → name of a file in the same directory.

    Raises:
        InvalidInput: no valid JSON, no weight_map, or a file name that leads elsewhere.
    """
    try:
        index = json.loads(text, object_pairs_hook=functools.partial(unique, what))
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise InvalidInput(f"{what}: not valid JSON ({printable(str(error))})") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InvalidInput(f"{what}: holds no 'weight_map' from tensor names to file names")
    for file in dict.fromkeys(weight_map.values()):
        if file in ("", ".", "..") or any(mark in file for mark in "/\\\0"):
            raise InvalidInput(f"{what}: shard {quoted(file)} is not the name of a file in the same directory")
    return weight_map


def unique(what: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For ``json``'s ``object_pairs_hook``: refuse a key given twice, of which readers would take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidInput(f"{what}: holds {quoted(twice)} twice")
    return found


def parse_size(size: str | int) -> int:
    """Bytes of a shard: ``"5GB"`` (10⁹), ``"512MiB"`` (2²⁰), ``"12345"`` or ``12345``.

    Raises:
        InvalidInput: no such text, or less than one byte.
    """
    return checks.byte_size("max_shard_size", size)
