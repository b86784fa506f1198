"""What a merge wrote, known by its content: nothing else in an output is ever replaced or removed."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r2m.checkpoints.adapter_config import CONFIG, WEIGHTS
from r2m.checkpoints.formats import ADAPTERS, OUTPUTS, SAFETENSORS
from r2m.places import PARTIAL, new_file, opened
from r2m.records import REPORT, STATE, WRITTEN
from r2m_kernels.errors import BadFile, quoted

RECIPE_FILE = "r2m_config.yaml"
CARD_FILE = "README.md"
RESULTS_FILE = ".eval_results/r2m.yaml"  # the Hub's place and form
COPIED_FILES = ("config.json", "preprocessor_config.json", "open_clip_config.json")

_MARKS = {RECIPE_FILE, REPORT.file}
_NAMES = {STATE.file, CARD_FILE, SAFETENSORS.index, *OUTPUTS, *COPIED_FILES, *_MARKS}
_OF_ADAPTER = {CONFIG, WEIGHTS[0], CARD_FILE}
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
# Files of up to so many bytes are hashed whole, others by as many bytes in blocks all over them: whoever trained a
# model further has changed every block, and no gigabytes are read to see it.
_WHOLE, _BLOCKS = 2**26, 2**10


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
    names = sorted({*files(directory)} - {REPORT.file, STATE.file})
    return {name: [digest(directory / name)] for name in names}


def files(directory: Path) -> list[str]:
    """Names of all files of an output, those in its directories from there."""
    inside = itertools.chain((directory / ADAPTERS.beside).glob("*/*"), directory.glob(RESULTS_FILE))
    names = [path.name for path in directory.iterdir() if path.is_file()]
    return names + [path.relative_to(directory).as_posix() for path in inside]


def rewrite(directory: Path, report: Mapping[str, Any], name: str, before: Sequence[str], content: bytes) -> None:
    """Replace one file of an output.

    Args:
        directory: the output.
        report: its report.
        name: the file's.
        before: digests of what it may be until then.
        content: what it becomes. Both are known as ours before one takes the other's place.

    Raises:
        OSError: it cannot be written; ``filename`` is set.
    """
    known = {**report[WRITTEN], name: [*before, hashlib.sha256(content).hexdigest()]}
    new_file(directory / REPORT.file, REPORT.text({**report, WRITTEN: known}))
    (directory / name).parent.mkdir(exist_ok=True)
    new_file(directory / name, content)


def is_named(entry: os.DirEntry[str]) -> bool:
    """Whether something in an output has one of the names that a merge gives."""
    named = entry.name in _NAMES or bool(_SHARD.fullmatch(entry.name))
    if entry.is_file(follow_symlinks=False):
        return named
    return _holds_adapters(entry) or _holds_results(entry) or is_unfinished(entry)


def _holds_results(entry: os.DirEntry[str]) -> bool:
    """Whether something is the directory of results, with nothing else in it."""
    place, name = RESULTS_FILE.split("/")
    if entry.name != place or not entry.is_dir(follow_symlinks=False):
        return False
    return all(one.is_file(follow_symlinks=False) and one.name == name for one in list(os.scandir(entry)))


def _holds_adapters(entry: os.DirEntry[str]) -> bool:
    """Whether something is the directory of adapters, with nothing else in it."""
    if entry.name != ADAPTERS.beside or not entry.is_dir(follow_symlinks=False):
        return False
    places = list(os.scandir(entry))
    inside = [one for place in places if place.is_dir(follow_symlinks=False) for one in os.scandir(place)]
    ours = all(one.is_file(follow_symlinks=False) and one.name in _OF_ADAPTER for one in inside)
    return ours and all(place.is_dir(follow_symlinks=False) for place in places)


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
        known = dict(REPORT.whole(directory, REPORT.file)[WRITTEN])
    except FileNotFoundError:
        known = {}
    except (BadFile, KeyError, ValueError, TypeError):
        return f"holds '{REPORT.file}', which was changed since a merge wrote it"
    for name in sorted({*files(directory)} - {REPORT.file, STATE.file}):
        if not isinstance(known.get(name), list):
            return f"holds {quoted(name)}, and nothing says that a merge wrote it"
        if digest(directory / name) not in known[name]:
            return f"holds {quoted(name)}, which was changed since a merge wrote it"
    return ""
