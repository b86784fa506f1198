"""The Hugging Face directory layout: which of a directory's files a checkpoint is in, and its index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from r2m.checkpoints import strangers
from r2m.checkpoints.adapter_config import CONFIG, WEIGHTS
from r2m.checkpoints.formats import FORMATS, SAFETENSORS
from r2m.places import mapping
from r2m_kernels import checks
from r2m_kernels.errors import BadCheckpoint, printable, quoted

MOST_INDEX = 2**27  # bytes
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")


def encode_index(file_of: Mapping[str, str], total_size: int) -> bytes:
    """The text of an index.

    Args:
        file_of: tensor → its file's name.
        total_size: bytes of all tensors.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(file_of.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def chosen(
    names: Sequence[str],
    label: str,
    beside: Sequence[str] = (),
    directory: str = "DIR",
    *,
    adapters: bool = False,
    inside: Sequence[str] = (),
) -> str:
    """The file that a directory's checkpoint is in, or its index.

    The formats count in the order of their table, which is that of ``transformers``; of each its single file comes
    first, then its index, then the only file with its suffix.

    Args:
        names: of its files.
        label: how error messages name it.
        beside: names of what else is in it.
        directory: what it is called.
        adapters: whether it may be one of :data:`r2m.checkpoints.adapter_config.WEIGHTS`.
        inside: directories in it that hold an adapter, as PEFT saves those that have names.

    Raises:
        BadCheckpoint: there is none, or there are several and no index; the directory is known as something else.
    """
    whole = any(name in names for one in FORMATS.values() for name in (one.single, one.index))
    if adapters and not whole and (CONFIG in names or any(name in names for name in WEIGHTS)):
        missing = next((one for one in ((CONFIG,), WEIGHTS) if not any(name in names for name in one)), None)
        if missing:
            raise BadCheckpoint(f"{label}: is an adapter of PEFT without its {' or '.join(missing)}")
        return next(name for name in WEIGHTS if name in names)
    parts = "" if whole else strangers.of_parts([*names, *beside], directory)
    if parts:
        raise BadCheckpoint(f"{label}: {parts}")
    for one in FORMATS.values():
        for name in (one.single, one.index):
            if name in names:
                return name
        of_format = [name for name in names if name.endswith(one.suffixes)]
        if len(of_format) == 1:
            return of_format[0]
        if of_format:
            raise BadCheckpoint(
                f"{label}: holds {len(of_format)} *{' *'.join(one.suffixes)} files ({some(of_format)}) and no "
                f"{one.index}; name the one that is meant"
            )
    other = strangers.of_others([*names, *beside], directory)
    if adapters and inside and not other:
        other = (
            f"holds adapters in directories of their own ({some(inside)}); name one, such as {directory}/{inside[0]}"
        )
    raise BadCheckpoint(f"{label}: {other or 'the directory holds no safetensors file and none of torch.save'}")


def passed_over(names: Sequence[str], name: str) -> str:
    """A clause on what else in a directory is a whole checkpoint, which may be another one; empty: nothing.

    Args:
        names: of its files.
        name: the one that is read, or its index.
    """
    whole = {one for each in FORMATS.values() for one in (each.single, each.index)}
    others = [
        one
        for one in names
        if one != name and (one in whole or (one.endswith(SAFETENSORS.suffixes) and not _SHARD.search(one)))
    ]
    return f"{some(others)} beside {name} {'are' if others[1:] else 'is'} not read" if others else ""


def some(names: Sequence[str], limit: int = 5) -> str:
    """A few of many names, for a message."""
    listed = ", ".join(printable(name) for name in names[:limit])
    return f"{listed} and {len(names) - limit} more" if len(names) > limit else listed


def decode_index(what: str, text: bytes) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name → name of a file in the same directory.

    Raises:
        BadCheckpoint: no valid JSON, no weight_map, or a file name that leads elsewhere.
    """
    weight_map = mapping(text, what, BadCheckpoint).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadCheckpoint(f"{what}: holds no 'weight_map' from tensor names to file names")
    for file in dict.fromkeys(weight_map.values()):
        if file in ("", ".", "..") or any(mark in file for mark in "/\\\0"):
            raise BadCheckpoint(f"{what}: shard {quoted(file)} is not the name of a file in the same directory")
    return weight_map


def parse_size(size: str | int) -> int:
    """Bytes of a shard: ``"5GB"`` (10⁹), ``"512MiB"`` (2²⁰), ``"12345"`` or ``12345``.

    Raises:
        BadOption: no such text, or less than one byte.
    """
    return checks.byte_size("max_shard_size", size)
