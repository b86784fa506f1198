"""The output directory: there as a whole, or not at all, and never at the cost of someone's files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r2m.checkpoints.formats import OUTPUTS, SAFETENSORS
from r2m.journal import PREFIX
from r2m.places import MOST_RECORD, PARTIAL, UNKNOWN_THERE, FileSystemWarning, as_seen, new_file, read_mapping, sync
from r2m_kernels.errors import BadFile, InvalidInput
from r2m_kernels.streaming import FACTORS_PREFIX

RECIPE_FILE = "r2m_config.yaml"
REPORT_FILE = "r2m_report.json"
STATE_FILE = "r2m_state.json"
CARD_FILE = "README.md"
COPIED_FILES = ("config.json", "preprocessor_config.json")

_MARKS = {RECIPE_FILE, REPORT_FILE}
_WRITTEN = {STATE_FILE, CARD_FILE, SAFETENSORS.index, *OUTPUTS, *COPIED_FILES, *_MARKS}
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")

PARTIAL_SUFFIX = ".partial"
SOURCES = "sources"  # of a state: a digest of the code that makes the bits
INPUTS = "inputs"  # of a state: path → what tells whether it is the same file
_LOCK, _STATE = "lock", "state.json"
_DIRECTORIES = _OUTPUT, _FORMER, _TENSORS = "output", "former", "tensors"
# Journals, and low-rank factors of a run that was killed in the moment in which their file had a name.
_WORKING = re.compile(rf"{PREFIX}\d+$|{re.escape(FACTORS_PREFIX)}")


def check_output(out: str | Path, *, overwrite: bool, inputs: Iterable[str | Path], resume: bool = False) -> Path:
    """Refuse an output directory that could not be written later, before any work is done.

    Args:
        out: the directory to come.
        overwrite: whether an empty directory or a former output may be replaced.
        inputs: files and directories that are read. None may be ``out`` or lie inside it, links resolved.
        resume: whether an earlier run is to be gone on with, which may have been cut off with ``out`` in place.

    Returns:
        The nearest directory above ``out`` that exists: on the file system that ``out`` will be on.

    Raises:
        BadFile: ``out`` holds an input, or exists and may not be replaced, or lies below a file.
        PermissionError: no permission to create it.
    """
    target = _resolved(out)
    real_out = Path(os.path.realpath(target))  # `target` itself may be a link
    for path in inputs:
        real_path = Path(os.path.realpath(path))
        if real_path == real_out or real_out in real_path.parents:
            raise BadFile(f"out ({out}): is or holds the input {path}, and inputs are never written to")
    if not (resume and _has_ended(target)):
        _refuse_existing(out, target, overwrite)
    ancestor = next(parent for parent in target.parents if os.path.lexists(parent))
    if not ancestor.is_dir():
        raise BadFile(f"out ({out}): {ancestor} is not a directory")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(ancestor))
    return ancestor


@dataclass(frozen=True)
class PartialOutput:
    """Where a merge works until it is done: ``OUT.partial``.

    It holds ``lock``, ``state.json`` (what merge it is), ``journal-*`` (how far it came) and ``output``; and
    ``tensors``, merged but not yet in the output's format.

    Attributes:
        directory: the whole.
        finished: an earlier run was cut off when ``OUT`` was in place already; there is nothing to do.
    """

    directory: Path
    finished: bool = False

    @property
    def output(self) -> Path:
        """What becomes ``OUT``."""
        return self.directory / _OUTPUT

    @property
    def tensors(self) -> Path:
        """A directory beside the output, which may not be there yet."""
        return self.directory / _TENSORS


@contextlib.contextmanager
def partial_output(
    out: str | Path, *, overwrite: bool, resume: bool, state: Mapping[str, Any]
) -> Iterator[PartialOutput]:
    """A directory beside ``out`` whose ``output`` becomes ``out`` when the block ends without an exception.

    After an exception nothing of it is left, nor a parent created for it, unless a journal has records and the input
    is not to blame: then it stays, and the exception has a note that says so. A process that is killed leaves it, too.
    ``out`` is at any time absent or whole; a former output that is being replaced is moved aside for the moment in
    which it is.

    Args:
        out: the directory to come.
        overwrite: whether a former output may be replaced.
        resume: go on from what an earlier run left.
        state: what decides every byte of the output, as plain JSON values. Only the same is resumed.

    Raises:
        BadFile: ``out`` exists by now; another process works on it; what is left of an earlier run is of another
            merge, is not asked for, or is not ours.
        OSError: it cannot be written; ``filename`` is the path under ``out`` that the user will look for.
    """
    target = _resolved(out)
    directory = _partial_of(target)
    new_parents = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    with contextlib.ExitStack() as stack:
        locked = False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, _lock(out, directory))
            locked = True
            partial = _prepared(out, target, overwrite=overwrite, resume=resume, state=state)
        except BaseException as error:
            if locked and not (directory / _STATE).exists():
                _clear(directory)
            _remove_empty(new_parents)
            raise as_seen(error, directory, out) from error.__cause__
        try:
            yield partial
            if not partial.finished:
                sync(partial.output)
                _refuse_existing(out, target, overwrite)
                _move_in(target, partial)
        except BaseException as error:
            if isinstance(error, InvalidInput) or not _has_records(directory):
                _clear(directory)
                _remove_empty(new_parents)
            else:
                error.add_note(f"The work so far is kept in {out}{PARTIAL_SUFFIX}; --resume goes on from there.")
            raise as_seen(error, partial.output, out) from error.__cause__
        _clear(directory)


def _lock(out: str | Path, directory: Path) -> int:
    """A descriptor that keeps others out while it is open; the directory is made if it is not there."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise BadFile(f"out ({out}): {directory.name} beside it is not a directory, and the merge works there")
    while True:
        directory.mkdir(exist_ok=True)
        path = directory / _LOCK
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # who had it is just removing the directory
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
            os.close(lock)
            raise BadFile(f"out ({out}): another merge is writing it, process {holder}") from None
        except OSError as error:
            if error.errno not in UNKNOWN_THERE:
                os.close(lock)
                raise OSError(error.errno, error.strerror, str(path)) from error
            text = f"{path}: its file system has no locks; no other merge may write to {out} now"
            warnings.warn(text, FileSystemWarning, stacklevel=2)
        # Who had it may have removed the file between our opening and our locking it.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            return lock
        os.close(lock)


def _prepared(
    out: str | Path, target: Path, *, overwrite: bool, resume: bool, state: Mapping[str, Any]
) -> PartialOutput:
    """What is there of an earlier run looked at, and everything made ready."""
    partial = PartialOutput(_partial_of(target))
    directory, former = partial.directory, partial.directory / _FORMER
    strange = _strange(directory)
    if strange:
        raise BadFile(
            f"out ({out}): {directory.name} beside it holds '{strange}', which no merge wrote; move it away first"
        )
    if former.is_dir() and not os.path.lexists(target):
        if not partial.output.is_dir():
            raise BadFile(f"out ({out}): {directory.name}/{_FORMER} is its former content; move it back or away first")
        os.rename(former, target)  # cut off between the two renames
        _refuse_existing(out, target, overwrite)
    if (directory / _STATE).exists():
        finished = _has_ended(target)
        if resume:
            _refuse_other(out, directory / _STATE, json.loads(json.dumps(state)))
            return replace(partial, finished=finished)
        if not finished and _has_records(directory):
            raise BadFile(
                f"out ({out}): {directory.name} beside it holds the work of a merge that was cut off; --resume goes on "
                "from there, or remove it first"
            )
    # Nothing that could be resumed: an earlier run that had hardly begun, or has ended.
    _clear(directory, keep_lock=True)
    partial.output.mkdir()
    new_file(directory / _STATE, json.dumps(state, indent=1).encode())
    sync(directory.parent)
    return partial


def _refuse_other(out: str | Path, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse to resume another merge than ``state``."""
    try:
        before = read_mapping(path, path.name, MOST_RECORD)
    except BadFile:
        raise BadFile(f"out ({out}): {path.parent.name}/{path.name} cannot be read; remove it") from None
    change = difference(before, state)
    if change:
        raise BadFile(
            f"out ({out}): --resume goes on with the same merge only, and {change}; start anew without "
            f"{path.parent.name}"
        )


def difference(before: Any, now: Any, what: str = "") -> str:
    """The first thing in which two states differ, as a clause; empty where none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            change = difference(before.get(key), now.get(key), f"{what} {key}".strip())
            if change:
                return change
        return ""
    if before == now:
        return ""
    if what.startswith(INPUTS):
        return f"the input {what.removeprefix(INPUTS).strip().rpartition(' ')[0]} is another one or was changed"
    if what == SOURCES:
        return f"the code that makes its bits has changed: the digest of its sources was '{before}' and is '{now}'"
    return f"{what} was {json.dumps(before)} and is {json.dumps(now)}"


def _move_in(target: Path, partial: PartialOutput) -> None:
    former = partial.directory / _FORMER
    replaced = os.path.lexists(target)
    if replaced:
        os.rename(target, former)
    try:
        # Should `target` have appeared meanwhile, the rename fails: directories replace empty ones only.
        os.rename(partial.output, target)
    except BaseException:
        if replaced:
            os.rename(former, target)
        raise
    # The new output is in place: what fails from here on must not call the merge failed.
    for directory in (target.parent, partial.directory):
        with contextlib.suppress(OSError):
            sync(directory)


def _partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}{PARTIAL_SUFFIX}")


def _has_ended(target: Path) -> bool:
    """Whether a run was cut off between its last rename and its cleaning up."""
    directory = _partial_of(target)
    # `output` is there before `state.json`, and has become `target` at the end.
    return (directory / _STATE).is_file() and os.path.lexists(target) and not (directory / _OUTPUT).exists()


def _has_records(directory: Path) -> bool:
    return any(path.stat().st_size > 0 for path in directory.glob(f"{PREFIX}*"))


def _strange(directory: Path) -> str:
    """A name in a partial output that no merge gave; empty where there is none."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name in _DIRECTORIES and entry.is_dir(follow_symlinks=False):
            inside = next((one.name for one in os.scandir(entry) if not _is_ours(one)), "")
            if inside:
                return f"{entry.name}/{inside}"
        elif not _is_working_file(entry):
            return entry.name
    return ""


def _is_working_file(entry: os.DirEntry[str]) -> bool:
    """Whether a merge keeps it beside its output while it works."""
    named = entry.name in (_LOCK, _STATE) or bool(_WORKING.match(entry.name))
    return (entry.is_file(follow_symlinks=False) and named) or _is_unfinished(entry)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Whether a file in an output has one of the names that a merge gives."""
    named = entry.name in _WRITTEN or bool(_SHARD.fullmatch(entry.name))
    return (entry.is_file(follow_symlinks=False) and named) or _is_unfinished(entry)


def _is_unfinished(entry: os.DirEntry[str]) -> bool:
    """What :func:`r2m.places.beside` leaves when it is killed."""
    return entry.is_dir(follow_symlinks=False) and bool(PARTIAL.fullmatch(entry.name))


def _clear(directory: Path, *, keep_lock: bool = False) -> None:
    """Remove what merges have left in a partial output, and it; what they have not stays. The lock goes last."""

    def remove(place: Path, ours: Callable[[os.DirEntry[str]], bool]) -> None:
        for entry in [entry for entry in os.scandir(place) if ours(entry)]:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                os.unlink(entry)

    with contextlib.suppress(OSError):
        for inside in (directory / name for name in _DIRECTORIES):
            if inside.is_dir():
                remove(inside, _is_ours)
                inside.rmdir()
        remove(directory, _is_working_file)
        if not keep_lock:
            (directory / _LOCK).unlink(missing_ok=True)
            directory.rmdir()


def _remove_empty(directories: Iterable[Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            directory.rmdir()


def _resolved(out: str | Path) -> Path:
    """The one path that is checked, written and renamed to: links above the last component resolved.

    Checking one spelling and renaming another is how directories get lost: ``missing/../x`` does not exist while
    ``x`` does, and ``link/../x`` is not the ``x`` beside the link.
    """
    parent, name = os.path.split(os.fspath(out).rstrip("/") or os.fspath(out)[:1])
    if not parent and not name:
        raise BadFile("out: expected a directory to create, got an empty path")
    if name in ("", ".", ".."):
        return Path(os.path.realpath(out))
    return Path(os.path.realpath(parent)) / name


def _refuse_existing(out: str | Path, target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise BadFile(f"out ({out}): exists already; --overwrite replaces the output of a former merge")
    if target.is_symlink() or not target.is_dir():
        raise BadFile(f"out ({out}): is not a directory, and --overwrite replaces directories only")
    entries = list(os.scandir(target))
    names = {entry.name for entry in entries}
    strange = sorted(entry.name for entry in entries if not _is_ours(entry))
    if names and not (_MARKS & names):
        raise BadFile(f"out ({out}): is not the output of a merge, so --overwrite does not replace it")
    if strange:
        raise BadFile(f"out ({out}): holds '{strange[0]}', which no merge wrote, so --overwrite does not replace it")
