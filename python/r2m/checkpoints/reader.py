"""Opens checkpoints: a safetensors file, a file of ``torch.save``, or a Hugging Face directory of either.

Headers are judged by the safetensors library, after a look of our own at what it lets pass. Nothing here runs code from
a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from pathlib import Path

from safetensors import SafetensorError, safe_open

from r2m import hub
from r2m.checkpoints import layout, torch_file
from r2m.checkpoints.files import Checkpoint, File, Place, identity
from r2m.checkpoints.layout import some
from r2m.places import read_small
from r2m_kernels.errors import BadCheckpoint, InvalidInput, printable, quoted
from r2m_kernels.streaming import TensorSpec

# What the library's reasons mean to someone who only knows the file; others are shown as they are.
_REASONS = {
    "header too small": "it is shorter than any safetensors file",
    "header too large": "its header would be larger than the format allows",
    "invalid header length": "its header would end after the file, which is cut off or no safetensors file",
    "file not fully covered": "it is cut off, or longer than its header says",
    "overflow": "its header announces a tensor too large for any file",
}


def open_checkpoint(path: str | Path, label: str) -> Checkpoint:
    """Open a safetensors file, a file of ``torch.save``, or a directory with one of them or with an index and shards.

    :func:`r2m.checkpoints.layout.chosen` says which files of a directory count.

    Args:
        path: file, directory or :mod:`r2m.hub` reference. A file is judged by its content, not by its name.
        label: how error messages name the checkpoint; should hold the path as the user gave it.

    Raises:
        InvalidInput: nothing there, no such file, damaged, or an index that does not fit its files.
        OSError: it cannot be read; ``filename`` is set.
    """
    if hub.is_reference(path):
        path = hub.fetch(str(path)).path
    given, path = str(path), Path(path)
    if given and path.is_dir():
        return _open_directory(path, label)
    if not given or not path.exists():
        raise InvalidInput(f"{label}: no such file or directory")
    return _open_single(path, label, label)


def _open_directory(directory: Path, label: str) -> Checkpoint:
    # Names with a leading dot are leftovers of other programs, such as macOS's "._" companions.
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file() and entry.name[0] != ".")
    name = layout.chosen(names, label)
    if name in (layout.INDEX_FILE, layout.TORCH_INDEX_FILE):
        return _open_shards(directory, label, name)
    return _open_single(directory / name, label, f"{label}: file {quoted(name)}")


def _open_single(path: Path, label: str, what: str) -> Checkpoint:
    file = _open_file(path, what)
    if not file.specs:
        raise InvalidInput(f"{what}: holds no tensors")
    return Checkpoint(label, file.specs, file.places, {path: file})


def _open_shards(directory: Path, label: str, index_name: str) -> Checkpoint:
    index, path = f"{label}: index '{index_name}'", directory / index_name
    text = read_small(path, index, layout.MOST_INDEX, error=BadCheckpoint)
    weight_map = layout.decode_index(index, text)
    if not weight_map:
        raise InvalidInput(f"{index}: holds no tensors")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise InvalidInput(f"{label}: {len(missing)} of {len(shards)} shards missing: {some(missing)}")
    outside = [shard for shard in shards if not _confined(directory, directory / shard)]
    if outside:
        raise InvalidInput(f"{index}: shard {quoted(outside[0])} is a link that leads out of its directory")
    files = {shard: _open_file(directory / shard, f"{label}: shard {quoted(shard)}") for shard in shards}
    absent = [name for name, shard in weight_map.items() if name not in files[shard].specs]
    if absent:
        shard = weight_map[absent[0]]
        raise InvalidInput(
            f"{label}: shard {quoted(shard)}: lacks tensor {quoted(absent[0])}, which the index says it holds"
            + (f" (and {len(absent) - 1} more tensors are not where the index says)" if absent[1:] else "")
        )
    # Names that are tied to another are in its shard's header, and no index lists them.
    for shard, file in files.items():
        for name, first in file.aliases.items():
            if weight_map.get(first) == shard:
                weight_map.setdefault(name, shard)
    return Checkpoint(
        label,
        {name: files[shard].specs[name] for name, shard in weight_map.items()},
        {name: files[shard].places[name] for name, shard in weight_map.items()},
        {directory / shard: files[shard] for shard in shards},
        (path, hashlib.sha256(text).hexdigest()),
    )


def _confined(directory: Path, path: Path) -> bool:
    """Whether a file lies in its directory, links resolved; or where the Hugging Face cache keeps its contents."""
    real, root = path.resolve(), directory.resolve()
    cached = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return real.is_relative_to(root) or cached


def _open_file(path: Path, what: str) -> File:
    # A named pipe would wait for a writer: looked at before it is opened.
    if not stat.S_ISREG(path.stat().st_mode):
        raise InvalidInput(f"{what}: not a regular file")
    with path.open("rb") as file:
        known = identity(file.fileno())
        length_field = file.read(layout.LENGTH_BYTES)
        if not length_field:
            raise InvalidInput(f"{what}: the file is empty")
        header = b""
        if len(length_field) == layout.LENGTH_BYTES:
            length = layout.data_start(length_field) - layout.LENGTH_BYTES
            if length <= min(layout.MOST_HEADER, os.fstat(file.fileno()).st_size):
                header = file.read(length)
    _refuse_doubtful_header(header, what)
    specs: dict[str, TensorSpec] = {}
    places: dict[str, Place] = {}
    try:
        # The library maps the file for the length of this block and touches its header alone. It has checked
        # that the tensors follow one another without gaps to the end of the file, so that sizes give
        # positions.
        with safe_open(path, framework="numpy") as opened:
            position = layout.data_start(length_field)
            for name in opened.offset_keys():
                entry = opened.get_slice(name)
                spec = layout.spec_of(f"{what}: tensor {quoted(name)}", entry.get_dtype(), entry.get_shape())
                specs[name], places[name] = spec, Place(path, position)
                position += spec.nbytes
            aliases = layout.tied_names(opened.metadata() or {}, specs)
    except SafetensorError as error:
        if torch_file.looks_like(path, length_field):
            return torch_file.open_torch_file(path, what)
        text = str(error).removeprefix("Error while deserializing header: ")
        reason = next((plain for known, plain in _REASONS.items() if known in text), text)
        raise InvalidInput(f"{what}: not a whole safetensors file: {printable(reason)}") from None
    for name, first in aliases.items():
        specs[name], places[name] = specs[first], places[first]
    return File(specs, places, known, hashlib.sha256(length_field + header).hexdigest(), aliases)


def _refuse_doubtful_header(header: bytes, what: str) -> None:
    """Refuse a name given twice, of which the library would take one. What it refuses itself is left to it."""
    try:
        json.loads(header, object_pairs_hook=functools.partial(layout.unique, f"{what}: header"))
    except InvalidInput:
        raise
    except (ValueError, RecursionError):
        return
