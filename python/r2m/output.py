"""The output directory: there as a whole, or not at all, and never at the cost of someone's files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from r2m.checkpoints.layout import INDEX_FILE, SINGLE_FILE
from r2m.checkpoints.writer import sync
from r2m_kernels.errors import InvalidInput

RECIPE_FILE = "r2m_config.yaml"
REPORT_FILE = "r2m_report.json"
COPIED_FILES = ("config.json", "preprocessor_config.json")

_MARKS = {RECIPE_FILE, REPORT_FILE}
_WRITTEN = {SINGLE_FILE, INDEX_FILE, *COPIED_FILES, *_MARKS}
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def check_output(out: str | Path, *, overwrite: bool, inputs: Iterable[str | Path]) -> Path:
    """Refuse an output directory that could not be written later, before any work is done.

    Args:
        out: the directory to come.
        overwrite: whether an empty directory or a former output may be replaced.
        inputs: files and directories that are read. None may be ``out`` or lie inside it, links resolved.

    Returns:
        The nearest directory above ``out`` that exists: on the file system that ``out`` will be on.

    Raises:
        InvalidInput: ``out`` holds an input, or exists and may not be replaced, or lies below a file.
        PermissionError: no permission to create it.
    """
    target = _resolved(out)
    real_out = Path(os.path.realpath(target))  # `target` itself may be a link
    for path in inputs:
        real_path = Path(os.path.realpath(path))
        if real_path == real_out or real_out in real_path.parents:
            raise InvalidInput(f"out ({out}): is or holds the input {path}, and inputs are never written to")
    _refuse_existing(out, target, overwrite)
    ancestor = next(parent for parent in target.parents if os.path.lexists(parent))
    if not ancestor.is_dir():
        raise InvalidInput(f"out ({out}): {ancestor} is not a directory")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(ancestor))
    return ancestor


@contextlib.contextmanager
def new_directory(out: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside ``out`` that becomes ``out`` when the block ends without an exception.

    After any exception, Ctrl-C included, neither it nor a parent created for it is left, and an ``out`` that
    was there before is there again.

    Yields:
        The temporary directory, empty.

    Raises:
        InvalidInput: ``out`` exists by now and may not be replaced.
        OSError: it cannot be written; ``filename`` is the path under ``out`` that the user will look for.
    """
    target = _resolved(out)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    new_parents = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        sync(partial)
        _refuse_existing(out, target, overwrite)
        _replace(target, partial, overwrite)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and str(error.filename).startswith(str(partial)):
            filename = str(out) + str(error.filename)[len(str(partial)) :]
            raise OSError(error.errno, error.strerror, filename) from error
        raise


def _resolved(out: str | Path) -> Path:
    """The one path that is checked, written and renamed to: links above the last component resolved.

    Checking one spelling and renaming another is how directories get lost: ``missing/../x`` does not exist while
    ``x`` does, and ``link/../x`` is not the ``x`` beside the link.
    """
    parent, name = os.path.split(os.fspath(out).rstrip("/") or os.fspath(out)[:1])
    if not parent and not name:
        raise InvalidInput("out: expected a directory to create, got an empty path")
    if name in ("", ".", ".."):
        return Path(os.path.realpath(out))
    return Path(os.path.realpath(parent)) / name


def _refuse_existing(out: str | Path, target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise InvalidInput(f"out ({out}): exists already; --overwrite replaces the output of a former merge")
    if target.is_symlink() or not target.is_dir():
        raise InvalidInput(f"out ({out}): is not a directory, and --overwrite replaces directories only")
    entries = list(os.scandir(target))
    names = {entry.name for entry in entries}
    strange = sorted(
        entry.name
        for entry in entries
        if not entry.is_file(follow_symlinks=False) or (entry.name not in _WRITTEN and not _SHARD.fullmatch(entry.name))
    )
    if names and not (_MARKS & names):
        raise InvalidInput(f"out ({out}): is not the output of a merge, so --overwrite does not replace it")
    if strange:
        raise InvalidInput(
            f"out ({out}): holds '{strange[0]}', which no merge wrote, so --overwrite does not replace it"
        )


def _replace(target: Path, partial: Path, overwrite: bool) -> None:
    former = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    # Without `overwrite` nothing is moved aside: should `target` have appeared meanwhile, the rename fails.
    replaced = overwrite and os.path.lexists(target)
    if replaced:
        os.rename(target, former)
    try:
        os.rename(partial, target)
    except BaseException:
        if replaced:
            os.rename(former, target)
        raise
    # The new output is in place: what fails from here on must not call the merge failed.
    with contextlib.suppress(OSError):
        sync(target.parent)
    if replaced:
        shutil.rmtree(former, ignore_errors=True)
