"""The output directory: there as a whole, or not at all, and never at the cost of someone's files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r2m.checkpoints.formats import OUTPUTS, SAFETENSORS
from r2m.journal import PREFIX
from r2m.places import MOST_RECORD, PARTIAL, as_seen, new_file, read_mapping, sync
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
_OUTPUT, _FORMER, _TENSORS = "output", "former", "tensors"
# Journals, and low-rank factors of a run that was killed in the moment in which their file had a name.
_OURS = re.compile(rf"{PREFIX}\d+$|{re.escape(FACTORS_PREFIX)}")


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
        InvalidInput: ``out`` holds an input, or exists and may not be replaced, or lies below a file.
        PermissionError: no permission to create it.
    """
    target = _resolved(out)
    real_out = Path(os.path.realpath(target))  # `target` itself may be a link
    for path in inputs:
        real_path = Path(os.path.realpath(path))
        if real_path == real_out or real_out in real_path.parents:
            raise InvalidInput(f"out ({out}): is or holds the input {path}, and inputs are never written to")
    if not (resume and _has_ended(target, target.with_name(f"{target.name}{PARTIAL_SUFFIX}"))):
        _refuse_existing(out, target, overwrite)
    ancestor = next(parent for parent in target.parents if os.path.lexists(parent))
    if not ancestor.is_dir():
        raise InvalidInput(f"out ({out}): {ancestor} is not a directory")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(ancestor))
    return ancestor


@dataclass(frozen=True)
class Workplace:
    """Where a merge works until it is done: ``OUT.partial``.

    It holds ``lock``, ``state.json`` (what merge it is), ``journal-*`` (how far it came) and ``output``; and
    ``tensors``, merged but not yet in the output's format.

    Attributes:
        directory: the whole.
        output: what becomes ``OUT``.
        resumed: whether an earlier run's work is there.
        finished: the earlier run was cut off when ``OUT`` was in place already; there is nothing to do.
    """

    directory: Path
    output: Path
    resumed: bool = False
    finished: bool = False

    @property
    def tensors(self) -> Path:
        """A directory beside the output, which may not be there yet."""
        return self.directory / _TENSORS


@contextlib.contextmanager
def workplace(out: str | Path, *, overwrite: bool, resume: bool, state: Mapping[str, Any]) -> Iterator[Workplace]:
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
        InvalidInput: ``out`` exists by now; another process works on it; what is left of an earlier run is of another
            merge, is not asked for, or is not ours.
        OSError: it cannot be written; ``filename`` is the path under ``out`` that the user will look for.
    """
    target = _resolved(out)
    partial = target.with_name(f"{target.name}{PARTIAL_SUFFIX}")
    new_parents = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    with contextlib.ExitStack() as stack:
        locked = False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(os.close, _lock(out, partial))
            locked = True
            place = _prepare(out, target, partial, overwrite=overwrite, resume=resume, state=state)
        except BaseException as error:
            if locked and not (partial / _STATE).exists():
                _clear(partial)
            _forget_parents(new_parents)
            raise as_seen(error, partial, out) from error.__cause__
        try:
            yield place
            if not place.finished:
                sync(place.output)
                _refuse_existing(out, target, overwrite)
                _move_in(target, place)
        except BaseException as error:
            if isinstance(error, InvalidInput) or not _has_records(partial):
                _clear(partial)
                _forget_parents(new_parents)
            else:
                error.add_note(f"The work so far is kept in {out}{PARTIAL_SUFFIX}; --resume goes on from there.")
            raise as_seen(error, place.output, out) from error.__cause__
        _clear(partial)


def _lock(out: str | Path, partial: Path) -> int:
    """The workplace, made if it is not there, and a descriptor that keeps others out while it is open."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise InvalidInput(f"out ({out}): {partial.name} beside it is not a directory, and the merge works there")
    while True:
        partial.mkdir(exist_ok=True)
        path = partial / _LOCK
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # who had it is just removing the directory
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
            os.close(lock)
            raise InvalidInput(f"out ({out}): another merge is writing it, process {holder}") from None
        except OSError:
            os.close(lock)
            raise
        # Who had it may have removed the file between our opening and our locking it.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            return lock
        os.close(lock)


def _prepare(
    out: str | Path, target: Path, partial: Path, *, overwrite: bool, resume: bool, state: Mapping[str, Any]
) -> Workplace:
    """What is there of an earlier run looked at, and the workplace made ready."""
    strange = _strange(partial)
    if strange:
        raise InvalidInput(
            f"out ({out}): {partial.name} beside it holds '{strange}', which no merge wrote; move it away first"
        )
    place = Workplace(partial, partial / _OUTPUT)
    if not os.path.lexists(target) and (partial / _FORMER).is_dir() and not place.output.is_dir():
        raise InvalidInput(f"out ({out}): {partial.name}/{_FORMER} is its former content; move it back or away first")
    if (partial / _FORMER).is_dir() and not os.path.lexists(target):
        os.rename(partial / _FORMER, target)  # cut off between the two renames
        _refuse_existing(out, target, overwrite)
    path = partial / _STATE
    if path.exists():
        finished = _has_ended(target, partial)
        if resume:
            _refuse_other(out, path, json.loads(json.dumps(state)))
            return replace(place, resumed=True, finished=finished)
        if not finished and _has_records(partial):
            raise InvalidInput(
                f"out ({out}): {partial.name} beside it holds the work of a merge that was cut off; --resume goes on "
                "from there, or remove it first"
            )
    # Nothing that could be resumed: an earlier run that had hardly begun, or has ended.
    _clear(partial, but=_LOCK)
    place.output.mkdir()
    new_file(path, json.dumps(state, indent=1).encode())
    sync(partial.parent)
    return place


def _refuse_other(out: str | Path, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse to resume another merge than ``state``."""
    try:
        before = read_mapping(path, path.name, MOST_RECORD)
    except BadFile:
        raise BadFile(f"out ({out}): {path.parent.name}/{path.name} cannot be read; remove it") from None
    found = difference(before, state)
    if found:
        raise InvalidInput(
            f"out ({out}): --resume goes on with the same merge only, and {found}; start anew without "
            f"{path.parent.name}"
        )


def difference(before: Any, now: Any, what: str = "") -> str:
    """The first thing in which two states differ, as a clause; empty where none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            found = difference(before.get(key), now.get(key), f"{what} {key}".strip())
            if found:
                return found
        return ""
    if before == now:
        return ""
    if what.startswith(INPUTS):
        return f"the input {what.removeprefix(INPUTS).strip().rpartition(' ')[0]} is another one or was changed"
    if what == SOURCES:
        return f"the code that makes its bits has changed: the digest of its sources was '{before}' and is '{now}'"
    return f"{what} was {json.dumps(before)} and is {json.dumps(now)}"


def _move_in(target: Path, place: Workplace) -> None:
    former = place.directory / _FORMER
    replaced = os.path.lexists(target)
    if replaced:
        os.rename(target, former)
    try:
        # Should `target` have appeared meanwhile, the rename fails: directories replace empty ones only.
        os.rename(place.output, target)
    except BaseException:
        if replaced:
            os.rename(former, target)
        raise
    # The new output is in place: what fails from here on must not call the merge failed.
    for directory in (target.parent, place.directory):
        with contextlib.suppress(OSError):
            sync(directory)


def _has_ended(target: Path, partial: Path) -> bool:
    """Whether a run was cut off between its last rename and its cleaning up."""
    # `output` is there before `state.json`, and is gone when it has become `target`.
    return (partial / _STATE).is_file() and os.path.lexists(target) and not (partial / _OUTPUT).exists()


def _has_records(partial: Path) -> bool:
    return any(path.stat().st_size > 0 for path in partial.glob(f"{PREFIX}*"))


def _strange(partial: Path) -> str:
    """A name in a workplace that no merge gave; empty where there is none."""
    for entry in sorted(os.scandir(partial), key=lambda entry: entry.name):
        if entry.name in (_OUTPUT, _FORMER, _TENSORS):
            if not entry.is_dir(follow_symlinks=False):
                return entry.name
            inside = next((one.name for one in os.scandir(entry) if not _is_ours(one)), "")
            if inside:
                return f"{entry.name}/{inside}"
        elif not _is_partial(entry) and not (
            entry.is_file(follow_symlinks=False) and (entry.name in (_LOCK, _STATE) or _OURS.match(entry.name))
        ):
            return entry.name
    return ""


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Whether a file in an output has one of the names that a merge gives."""
    named = entry.name in _WRITTEN or bool(_SHARD.fullmatch(entry.name))
    return (entry.is_file(follow_symlinks=False) and named) or _is_partial(entry)


def _is_partial(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and bool(PARTIAL.fullmatch(entry.name))


def _clear(partial: Path, but: str = "") -> None:
    """Remove what merges have left in a workplace, and it; what they have not stays. The lock goes last."""
    with contextlib.suppress(OSError):
        for directory in (partial / _OUTPUT, partial / _FORMER, partial / _TENSORS):
            if directory.is_dir():
                for entry in list(os.scandir(directory)):
                    if _is_partial(entry):
                        shutil.rmtree(entry)
                    elif _is_ours(entry):
                        os.unlink(entry)
                directory.rmdir()
        for entry in list(os.scandir(partial)):
            if _is_partial(entry):
                shutil.rmtree(entry)
        names = [path.name for path in partial.iterdir() if _OURS.match(path.name)]
        for name in (*names, _STATE, _LOCK):
            if name != but:
                (partial / name).unlink(missing_ok=True)
        if not but:
            partial.rmdir()


def _forget_parents(new_parents: Iterable[Path]) -> None:
    for parent in new_parents:
        with contextlib.suppress(OSError):
            parent.rmdir()


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
    strange = sorted(entry.name for entry in entries if not _is_ours(entry))
    if names and not (_MARKS & names):
        raise InvalidInput(f"out ({out}): is not the output of a merge, so --overwrite does not replace it")
    if strange:
        raise InvalidInput(
            f"out ({out}): holds '{strange[0]}', which no merge wrote, so --overwrite does not replace it"
        )
