"""What a merge wrote, known by its content: nothing else in an output is ever replaced or removed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2m.checkpoints.formats import OUTPUTS, SAFETENSORS
from r2m.places import MOST_RECORD, PARTIAL, opened, read_mapping
from r2m_kernels.errors import BadFile, quoted

RECIPE_FILE = "r2m_config.yaml"
REPORT_FILE = "r2m_report.json"
STATE_FILE = "r2m_state.json"
CARD_FILE = "README.md"
COPIED_FILES = ("config.json", "preprocessor_config.json")
WRITTEN = "written"  # of a report: name → digests of what a merge wrote under it

_MARKS = {RECIPE_FILE, REPORT_FILE}
_NAMES = {STATE_FILE, CARD_FILE, SAFETENSORS.index, *OUTPUTS, *COPIED_FILES, *_MARKS}
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_SEAL = "digest"  # of a record: SHA-256 of all else in it
# Files of up to so many bytes are hashed whole, others by as many bytes in blocks all over them: whoever trained a
# model further has changed every block, and no gigabytes are read to see it.
_WHOLE, _BLOCKS = 2**26, 2**10


def sealed(content: Mapping[str, Any], **layout: Any) -> bytes:
    """A record as JSON that tells whether it was changed since; ``layout`` are arguments of :func:`json.dumps`."""
    content = {key: value for key, value in content.items() if key != _SEAL}
    return json.dumps({**content, _SEAL: _seal(content)}, **layout).encode(errors="backslashreplace")


def unsealed(path: Path, what: str) -> dict[str, Any]:
    """What :func:`sealed` was given. Arguments and other errors are :func:`r2m.places.read_mapping`'s.

    Raises:
        BadFile: it was changed since.
    """
    content = read_mapping(path, what, MOST_RECORD)
    try:
        whole = content.pop(_SEAL, None) == _seal(content)
    except RecursionError:
        whole = False
    if not whole:
        raise BadFile(f"{what}: was changed since a merge wrote it")
    return content


def encode_report(report: Mapping[str, Any]) -> bytes:
    """The content of an ``r2m_report.json``."""
    return sealed(report, allow_nan=False, indent=2, ensure_ascii=False) + b"\n"


def digest(path: Path) -> str:
    """What tells a file's content from another, with at most :data:`_WHOLE` bytes read."""
    with opened(path, path.name) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE:
            return hashlib.sha256(file.read()).hexdigest()
        block, found = _WHOLE // _BLOCKS, hashlib.sha256(str(size).encode())
        for index in range(_BLOCKS):
            file.seek((size - block) * index // (_BLOCKS - 1))
            found.update(file.read(block))
        return found.hexdigest()


def written(directory: Path) -> dict[str, list[str]]:
    """Name → digests, for :data:`WRITTEN`, of all that lies in a directory but what says of itself what it is."""
    names = sorted(set(os.listdir(directory)) - {REPORT_FILE, STATE_FILE})
    return {name: [digest(directory / name)] for name in names}


def is_named(entry: os.DirEntry[str]) -> bool:
    """Whether something in an output has one of the names that a merge gives."""
    named = entry.name in _NAMES or bool(_SHARD.fullmatch(entry.name))
    return (entry.is_file(follow_symlinks=False) and named) or is_unfinished(entry)


def is_unfinished(entry: os.DirEntry[str]) -> bool:
    """What :func:`r2m.places.beside` leaves when it is killed."""
    return entry.is_dir(follow_symlinks=False) and bool(PARTIAL.fullmatch(entry.name))


def foreign(directory: Path) -> str:
    """A clause about the first thing in a directory that no merge wrote; empty where there is none.

    Raises:
        OSError: it cannot be read.
    """
    entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    if entries and not _MARKS & {entry.name for entry in entries}:
        return "is not the output of a merge"
    strange = next((entry.name for entry in entries if not is_named(entry)), None)
    if strange is not None:
        return f"holds {quoted(strange)}, which no merge wrote"
    try:
        known = dict(unsealed(directory / REPORT_FILE, REPORT_FILE)[WRITTEN])
    except FileNotFoundError:
        known = {}
    except (BadFile, KeyError, ValueError, TypeError):
        return f"holds '{REPORT_FILE}', which was changed since a merge wrote it"
    for name in (entry.name for entry in entries if entry.is_file() and entry.name not in (REPORT_FILE, STATE_FILE)):
        if not isinstance(known.get(name), list):
            return f"holds {quoted(name)}, and nothing says that a merge wrote it"
        if digest(directory / name) not in known[name]:
            return f"holds {quoted(name)}, which was changed since a merge wrote it"
    return ""


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
