"""Opens checkpoints: a file of one of the formats, or a Hugging Face directory of such. Nothing here runs code."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from r2m.checkpoints import formats, hub, layout, strangers
from r2m.checkpoints.adapter_config import CONFIG, WEIGHTS, read_config
from r2m.checkpoints.adapters import under_model_names
from r2m.checkpoints.files import Checkpoint, TensorFile
from r2m.checkpoints.layout import some
from r2m.places import confined, opened, read_small
from r2m_kernels.errors import BadCheckpoint, quoted


def open_checkpoint(path: str | Path, label: str, key: str | None = None, *, adapters: bool = False) -> Checkpoint:
    """Open a safetensors file, a file of ``torch.save``, or a directory with one of them or with an index and shards.

    :func:`r2m.checkpoints.layout.chosen` says which files of a directory count.

    Args:
        path: file, directory or :mod:`r2m.checkpoints.hub` reference. A file is judged by its content, not by its name.
        label: how error messages name the checkpoint; should hold the path as the user gave it.
        key: what the tensors lie under in a file of torch.save that holds more, with dots; in one without it, and by
            default, :func:`r2m.checkpoints.state_dict.chosen` finds them.
        adapters: whether it may be an adapter of PEFT, which :mod:`r2m.checkpoints.adapters` folds onto its base.

    Raises:
        BadCheckpoint: nothing there, no such file, damaged, or an index that does not fit its files.
        OSError: it cannot be read; ``filename`` is set.
    """
    given, path = str(path), hub.local(path)
    if given and path.is_dir():
        return _open_directory(path, label, key, adapters)
    if not given or not path.exists():
        name = "/".join(path.parts[-2:])
        of_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists() and not formats.of_suffix(path)
        hint = f"; from the Hub it is {hub.SCHEME}{name}" if of_the_hub else ""
        raise BadCheckpoint(f"{label}: no such file or directory{hint}")
    if adapters and path.name in WEIGHTS and (path.parent / CONFIG).is_file():
        return _open_adapter(path, label, label)
    return _open_single(path, label, label, key)


def _open_directory(directory: Path, label: str, key: str | None, adapters: bool) -> Checkpoint:
    # Names with a leading dot are leftovers of other programs, such as macOS's "._" companions.
    entries = {entry.name: entry.is_file() for entry in sorted(directory.iterdir())}
    files = [name for name, is_file in entries.items() if is_file and name[0] != "."]
    beside = [other for other in entries if other not in files]
    inside = [other for other in beside if (directory / other / CONFIG).is_file()]
    name = layout.chosen(files, label, beside, str(directory), adapters=adapters, inside=inside)
    if adapters and name in WEIGHTS and CONFIG in files:
        return _open_adapter(directory / name, label, f"{label}: file {quoted(name)}")
    if name in formats.INDEXES:
        found = _open_shards(directory, label, name, key)
    else:
        found = _open_single(directory / name, label, f"{label}: file {quoted(name)}", key)
    others = layout.passed_over([one for one in files if directory / one not in found.files], name)
    found.notes = (*found.notes, *([others] if others else []))
    return found


def _open_adapter(path: Path, label: str, what: str) -> Checkpoint:
    config = read_config(path.parent, label)
    file = under_model_names(_open_file(path, what, None), what)
    if not file.specs:
        raise BadCheckpoint(f"{what}: holds no tensors")
    return Checkpoint(label, file.specs, file.locations, {path: file}, (path.parent / CONFIG, config.digest), config)


def _open_single(path: Path, label: str, what: str, key: str | None) -> Checkpoint:
    file = _open_file(path, what, key)
    if not file.specs:
        raise BadCheckpoint(f"{what}: holds no tensors")
    strange = strangers.of_tensors(file.specs)
    if strange:
        raise BadCheckpoint(f"{what}: {strange}")
    return Checkpoint(label, file.specs, file.locations, {path: file})


def _open_shards(directory: Path, label: str, index_name: str, key: str | None) -> Checkpoint:
    index, path = f"{label}: index '{index_name}'", directory / index_name
    text = read_small(path, index, layout.MOST_INDEX, error=BadCheckpoint)
    weight_map = layout.decode_index(index, text)
    if not weight_map:
        raise BadCheckpoint(f"{index}: holds no tensors")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise BadCheckpoint(f"{label}: {len(missing)} of {len(shards)} shards missing: {some(missing)}")
    outside = [shard for shard in shards if not confined(directory / shard)]
    if outside:
        raise BadCheckpoint(f"{index}: shard {quoted(outside[0])} is a link that leads out of its directory")
    files = {shard: _open_file(directory / shard, f"{label}: shard {quoted(shard)}", key) for shard in shards}
    absent = [name for name, shard in weight_map.items() if name not in files[shard].specs]
    if absent:
        shard = weight_map[absent[0]]
        raise BadCheckpoint(
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
        {name: files[shard].locations[name] for name, shard in weight_map.items()},
        {directory / shard: files[shard] for shard in shards},
        (path, hashlib.sha256(text).hexdigest()),
    )


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Of a million new objects that all stay, Python's collector would look through all again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open_file(path: Path, what: str, key: str | None) -> TensorFile:
    with opened(path, what, BadCheckpoint) as file:
        head = file.read(strangers.HEAD_BYTES)
    if not head:
        raise BadCheckpoint(f"{what}: the file is empty")
    known = formats.recognised(head[: formats.HEAD_BYTES], path.name)
    strange = "" if known.is_mine(head[: formats.HEAD_BYTES]) else strangers.of_file(head)
    if strange:
        raise BadCheckpoint(f"{what}: {strange}")
    with _without_collections():
        return known.open(path, what, key)
