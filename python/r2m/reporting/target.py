"""Where a page is written: a new directory, or one with a former page, of which nothing else is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2m.places import PARTIAL, confined, new_directory, new_file, write_file
from r2m.records import PAGE, as_written
from r2m_kernels.errors import BadFile, quoted


def check_target(target: Path, overwrite: bool) -> None:
    """Before anything is worked out.

    Raises:
        BadFile: something is there, and it is no former page that may be replaced.
    """
    if not _occupied(target):
        return
    if not target.is_dir() or not (target / PAGE.file).is_file():
        raise BadFile(f"to ({target}): exists already and is not an empty directory")
    if not overwrite:
        raise BadFile(f"to ({target}): holds a page already; --overwrite replaces it")
    known = _written(target)
    for entry in sorted(target.iterdir()):
        if entry.name == PAGE.file or PARTIAL.fullmatch(entry.name):
            continue
        # What was written is known by its content: a file that somebody has changed is theirs.
        ours = entry.name in known and entry.is_file() and confined(entry) and _digest(entry) in known[entry.name]
        if not ours:
            raise BadFile(
                f"to ({target}): holds {quoted(entry.name)}, which no r2m report wrote; move it away, or give another "
                "directory"
            )


def put_files(target: Path, files: Mapping[str, bytes], content: Mapping[str, Any]) -> None:
    """Write a page, all at once into a new directory, file by file where a former one is.

    Args:
        target: that :func:`check_target` let pass.
        files: name → content.
        content: of the page's record, with ``written``: name → digest.

    Raises:
        OSError: it cannot be written; ``filename`` is set.
    """
    if not _occupied(target):
        with new_directory(target) as partial:
            for name, text in {**files, PAGE.file: PAGE.text(_lists(content, {}))}.items():
                write_file(partial / name, text)
        return
    former = _written(target)
    # Whenever this is cut off, all that lies there is known as a page's.
    new_file(target / PAGE.file, PAGE.text(_lists(content, former)))
    for name, text in files.items():
        new_file(target / name, text)
    for entry in target.iterdir():
        if entry.name in former and entry.name not in files:
            entry.unlink()
    new_file(target / PAGE.file, PAGE.text(_lists(content, {})))


def _occupied(target: Path) -> bool:
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def _written(target: Path) -> dict[str, list[str]]:
    what = f"to ({target}): {PAGE.file}"
    with as_written(what):
        return {str(name): list(digests) for name, digests in PAGE.whole(target, what)["written"].items()}


def _lists(content: Mapping[str, Any], former: Mapping[str, list[str]]) -> dict[str, Any]:
    """The record's content with all that may lie under each name meanwhile."""
    new = {name: [digest] for name, digest in content["written"].items()}
    both = {name: [*new.get(name, ()), *former.get(name, ())] for name in sorted({*new, *former})}
    return {**content, "written": both}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
