"""The output directory: there as a whole, or not at all, and never at the cost of someone's files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r2m.journal import PREFIX
from r2m.ownership import foreign, is_named, is_unfinished
from r2m.places import MOST_RECORD, as_seen, is_mounted, new_file, read_mapping, sync
from r2m.records import STATE
from r2m.workplace import FORMER, LOCK, OUTPUT, PARTIAL_SUFFIX, directory_of, holds, put_back, resolved, take
from r2m_kernels.descriptors import REMOVES_OPEN_FILES
from r2m_kernels.errors import BadFile, InvalidInput, quoted
from r2m_kernels.streaming import FACTORS_PREFIX

SOURCES = "sources"  # of a state: a digest of the code that makes the bits
INPUTS = "inputs"  # of a state: path → what tells whether it is the same file
STATISTICS = "statistics digest"  # of a state: of running statistics that are not the merge's
_STATE, _TENSORS = "state.json", "tensors"
_REPLACED = "replaced"  # a former content whose successor is in place
_DIRECTORIES = OUTPUT, FORMER, _TENSORS, _REPLACED
# Journals, and low-rank factors of a run that was killed in the moment in which their file had a name.
_WORKING = re.compile(rf"{PREFIX}\d+$|{re.escape(FACTORS_PREFIX)}")


def check_output(out: str | Path, *, overwrite: bool, inputs: Iterable[str | Path], resume: bool = False) -> Path:
    """Refuse an output directory that could not be written later, before any work is done.

    Args:
        out: the directory to come.
        overwrite: whether an empty directory or a former output may be replaced.
        inputs: files and directories that are read. None may be ``out`` or lie inside it or where work on it is done,
            links resolved.
        resume: whether an earlier run is to be gone on with, which may have been cut off with ``out`` in place.

    Returns:
        The nearest directory above ``out`` that exists: on the file system that ``out`` will be on.

    Raises:
        BadFile: ``out`` holds an input, or exists and may not be replaced, or lies below a file.
        PermissionError: no permission to create it.
    """
    target = resolved(out)
    shown = {
        Path(os.path.realpath(target)): "",
        Path(os.path.realpath(directory_of(target))): f"{PARTIAL_SUFFIX} beside it ",
    }
    for path in inputs:
        real_path = Path(os.path.realpath(path))  # `target` itself may be a link, too
        for place, which in shown.items():
            if real_path == place or place in real_path.parents:
                raise BadFile(f"out ({out}): {which}is or holds the input {path}, and inputs are never written to")
    if not (resume and _has_ended(target)):
        _refuse_existing(out, target, overwrite)
    ancestor = next(parent for parent in target.parents if os.path.lexists(parent))
    if not ancestor.is_dir():
        raise BadFile(f"out ({out}): {ancestor} is not a directory")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(ancestor))
    return ancestor


@dataclass(frozen=True)
class Workplace:
    """``OUT.partial``, taken: nobody else works on ``OUT``.

    Attributes:
        out: the output, as it was given.
        target: where it is.
        lock: the descriptor that keeps others out.
    """

    out: str | Path
    target: Path
    lock: int

    @property
    def directory(self) -> Path:
        """The whole."""
        return directory_of(self.target)

    @property
    def ended(self) -> bool:
        """Whether what an earlier run was to make is in place: it was cut off while it tidied up."""
        return _has_ended(self.target)

    @property
    def has_work(self) -> bool:
        """Whether there is something to go on from."""
        return not self.ended and (self.directory / _STATE).exists() and _has_records(self.directory)

    def check(self) -> None:
        """Refuse to go on in a workplace that is another process's by now.

        Raises:
            BadFile: it is.
        """
        if not holds(self.directory, self.lock):
            what = f"{self.directory.name} was removed or taken over while a merge worked there"
            raise BadFile(f"out ({self.out}): {what}")

    def refuse_strangers(self) -> None:
        """Refuse what no merge wrote here.

        Raises:
            BadFile: there is such.
        """
        strange = _strange(self.directory)
        if strange:
            what = f"{self.directory.name} beside it holds {quoted(strange)}, which no merge wrote"
            raise BadFile(f"out ({self.out}): {what}; move it away first")

    def make_empty(self) -> None:
        """Clear what a run left that had hardly begun, or has ended.

        Raises:
            BadFile: there is work that could be gone on with.
        """
        self.refuse_strangers()
        if self.has_work:
            what = f"{self.directory.name} beside it holds the work of a merge that was cut off"
            raise BadFile(f"out ({self.out}): {what}; --resume goes on from there, or remove it first")
        self.clear()

    def clear(self) -> None:
        """Remove what merges have left here; what they have not, the lock, and the only copy of an output stay."""
        directory = self.directory
        former, output = directory / FORMER, directory / OUTPUT
        if not holds(directory, self.lock) or (
            former.is_dir() and (output.exists() or not os.path.lexists(self.target))
        ):
            return
        with contextlib.suppress(OSError):
            # Where the output has become OUT the state goes last: it says so until then. Otherwise it goes before what
            # it speaks of, and journals before it.
            _remove(directory, lambda entry: _is_working_file(entry) and entry.name not in (LOCK, _STATE))
            if output.exists():
                (directory / _STATE).unlink(missing_ok=True)
            _remove_directory(directory / _REPLACED)
            if former.is_dir():  # no more the only copy of anything, and its name must not say so
                os.rename(former, directory / _REPLACED)
            for name in _DIRECTORIES:
                _remove_directory(directory / name)
            (directory / _STATE).unlink(missing_ok=True)

    def leave(self) -> None:
        """Give it back; it goes if nothing else is in it."""
        empty = False
        with contextlib.suppress(OSError):
            empty = holds(self.directory, self.lock) and not (self.directory / _STATE).exists()
        if not REMOVES_OPEN_FILES:
            os.close(self.lock)
        with contextlib.suppress(OSError):
            if empty:
                (self.directory / LOCK).unlink()
                self.directory.rmdir()
        if REMOVES_OPEN_FILES:  # until here nobody else has it
            os.close(self.lock)


@contextlib.contextmanager
def held(out: str | Path) -> Iterator[Workplace]:
    """An output that nobody else works on until the block ends, and whose former content is in its place.

    Parents that are made for it go again where nothing is in them at the end.

    Raises:
        BadFile: another process works on it, or something else lies in its place.
        OSError: it cannot be written beside; ``filename`` is the path under ``out`` that the user will look for.
    """
    target = resolved(out)
    directory = directory_of(target)
    new_parents = [parent for parent in target.parents if not parent.exists()]  # the deepest first
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            workplace = Workplace(out, target, take(out, directory))
        except OSError as error:
            raise as_seen(error, directory, out) from error.__cause__
        try:
            put_back(out, target)
        except BaseException:
            os.close(workplace.lock)
            raise
        try:
            yield workplace
        finally:
            workplace.leave()
    finally:
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


@dataclass(frozen=True)
class PartialOutput:
    """Where a merge works until it is done: ``OUT.partial``.

    It holds ``lock``, ``state.json`` (what merge it is), ``journal-*`` (how far it came) and ``output``; and
    ``tensors``, merged but not yet in the output's format.

    Attributes:
        directory: the whole.
        target: what ``OUT`` is.
        finished: an earlier run was cut off when ``OUT`` was in place already; there is nothing to do.
    """

    directory: Path
    target: Path
    finished: bool = False

    @property
    def output(self) -> Path:
        """What becomes ``OUT``."""
        return self.directory / OUTPUT

    @property
    def tensors(self) -> Path:
        """A directory beside the output, which may not be there yet."""
        return self.directory / _TENSORS


@contextlib.contextmanager
def partial_output(
    out: str | Path, *, overwrite: bool, resume: bool, state: Mapping[str, Any], workplace: Workplace | None = None
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
        workplace: of ``out``, where it is held already.

    Raises:
        BadFile: ``out`` exists by now; another process works on it, or has taken the workplace away; what is left of an
            earlier run is of another merge, is not asked for, or is not ours.
        OSError: it cannot be written; ``filename`` is the path under ``out`` that the user will look for.
    """
    with nullcontext(workplace) if workplace is not None else held(out) as place:
        try:
            partial = _prepared(place, overwrite=overwrite, resume=resume, state=state)
        except BaseException as error:
            raise as_seen(error, place.directory, out) from error.__cause__
        try:
            yield partial
            if not partial.finished:
                sync(partial.output)
                place.check()
                _refuse_existing(out, place.target, overwrite)
                _move_in(place.target, partial)
        except BaseException as error:
            if isinstance(error, InvalidInput) or not _has_records(place.directory):
                place.clear()
            else:
                error.add_note(f"The work so far is kept in {out}{PARTIAL_SUFFIX}; --resume goes on from there.")
            raise as_seen(error, partial.output, out) from error.__cause__
        place.clear()


def _prepared(place: Workplace, *, overwrite: bool, resume: bool, state: Mapping[str, Any]) -> PartialOutput:
    """What is there of an earlier run looked at, and everything made ready."""
    partial, kept = PartialOutput(place.directory, place.target), place.directory / _STATE
    place.refuse_strangers()
    if place.ended:
        if resume and not difference(read_mapping(kept, _STATE, MOST_RECORD), json.loads(json.dumps(state))):
            return replace(partial, finished=True)
        _refuse_existing(place.out, place.target, overwrite)
    elif resume and place.has_work:
        _refuse_other(place.out, kept, json.loads(json.dumps(state)))
        return partial
    place.make_empty()
    try:
        partial.output.mkdir()
        new_file(kept, json.dumps(state, indent=1).encode())
        sync(place.directory.parent)
    except BaseException:
        place.clear()
        raise
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
    former = partial.directory / FORMER
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


def _has_ended(target: Path) -> bool:
    """Whether a run was cut off when its output was in place: what it was to make is what is there."""
    directory = directory_of(target)
    if (directory / OUTPUT).exists() or not (directory / _STATE).exists():
        return False
    try:
        wanted = read_mapping(directory / _STATE, _STATE, MOST_RECORD)
        return wanted == STATE.read(target, STATE.file).get("state")
    except (OSError, BadFile):
        return False


def _has_records(directory: Path) -> bool:
    return any(path.stat().st_size > 0 for path in directory.glob(f"{PREFIX}*"))


def _strange(directory: Path) -> str:
    """A name in a partial output that no merge gave; empty where there is none."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name in _DIRECTORIES and entry.is_dir(follow_symlinks=False):
            inside = next((one.name for one in os.scandir(entry) if not is_named(one)), "")
            if inside:
                return f"{entry.name}/{inside}"
        elif not _is_working_file(entry):
            return entry.name
    return ""


def _is_working_file(entry: os.DirEntry[str]) -> bool:
    """Whether a merge keeps it beside its output while it works."""
    named = entry.name in (LOCK, _STATE) or bool(_WORKING.match(entry.name))
    return (entry.is_file(follow_symlinks=False) and named) or is_unfinished(entry)


def _remove(place: Path, ours: Callable[[os.DirEntry[str]], bool]) -> None:
    for entry in [entry for entry in os.scandir(place) if ours(entry)]:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        else:
            os.unlink(entry)


def _remove_directory(place: Path) -> None:
    """With what merges write; an ``OSError`` where there is more."""
    if place.is_dir():
        _remove(place, is_named)
        place.rmdir()


def _refuse_existing(out: str | Path, target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if is_mounted(target):
        raise BadFile(
            f"out ({out}): a file system is mounted there, and no directory can take its place; give one inside it, "
            f"such as {Path(out) / 'merged'}"
        )
    if not overwrite:
        raise BadFile(f"out ({out}): exists already; --overwrite replaces the output of a former merge")
    if target.is_symlink() or not target.is_dir():
        raise BadFile(f"out ({out}): is not a directory, and --overwrite replaces directories only")
    reason = foreign(target)
    if reason:
        raise BadFile(f"out ({out}): {reason}, so --overwrite does not replace it")
