"""Files as they are written and read: whole or not at all, within bounds, never through a stranger's link or pipe."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from r2m_kernels.descriptors import OPENS_DIRECTORIES, flags
from r2m_kernels.errors import BadFile, InvalidInput, printable, quoted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MOST_CONFIG = 2**22  # bytes of a small file that others wrote: a configuration, a card
_MOST_NESTED = 64  # mappings and lists within one another, in one
# Of a file system that does not have what it is asked for: network and container mounts.
UNKNOWN_THERE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
# Of what is not whole yet: a run that was killed leaves it.
PARTIAL = re.compile(r"\.r2m-[0-9a-f]{16}\.partial")
_PATIENCE = 10.0  # seconds that a small file waits for another process that writes the same
_MOUNTS = Path("/proc/self/mountinfo")  # of Linux
MOST_RECORD = 2**28  # of one that a merge wrote: a report with a row for every tensor, a state with its Gram matrices


class FileSystemWarning(UserWarning):
    """Something that cannot be had from a file system or a small file, and without which work goes on."""


@contextlib.contextmanager
def opened(path: Path, what: str, error: type[InvalidInput] = BadFile) -> Iterator[BinaryIO]:
    """A regular file, or what a link to one leads to, for reading. Arguments and errors are :func:`read_small`'s."""
    regular = stat.S_ISREG(os.stat(path).st_mode)  # some devices do something when they are opened
    descriptor = os.open(path, flags("O_RDONLY", "O_NONBLOCK")) if regular else -1
    if not regular:
        raise error(f"{what}: not a regular file")
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # what it was replaced with
            raise error(f"{what}: not a regular file")
        with naming(path), open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_small(
    path: Path, what: str, most: int = MOST_CONFIG, *, error: type[InvalidInput] = BadFile, named: bool = False
) -> bytes:
    """The content of a small file.

    Args:
        path: a regular file, or a link to one.
        what: how error messages name it.
        most: bytes that it may have.
        error: the kind that is raised.
        named: whether somebody here has named this very file, who may link it to where they like. Of others, which came
            with a directory, a link that leads out of it could show a stranger what is on this machine.

    Raises:
        InvalidInput: of that kind: it is no regular file (a pipe is not waited for), larger, or not in its directory.
        OSError: it cannot be read; ``filename`` is set.
    """
    if not named and not confined(path):
        raise error(f"{what}: is a link that leads out of its directory")
    with opened(path, what, error) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)
    if max(size, len(content)) > most:
        raise error(f"{what}: has {max(size, len(content))} bytes, expected at most {most} bytes")
    return content


def confined(path: Path) -> bool:
    """Whether a file lies in its directory, links resolved; or where the Hugging Face cache keeps its contents."""
    real, root = (Path(os.path.realpath(one)) for one in (path, path.parent))  # a link to itself is its own
    cached = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return real.is_relative_to(root) or cached


def read_mapping(path: Path, what: str, most: int = MOST_CONFIG) -> dict[str, Any]:
    """The content of a small JSON file with keys. Arguments and other errors are :func:`read_small`'s.

    Raises:
        BadFile: it is not that.
    """
    return mapping(read_small(path, what, most), what)


def read_beside(path: Path, most: int = MOST_CONFIG) -> dict[str, Any]:
    """The same of a file that came with a checkpoint: empty where there is none.

    One that cannot be read is told: what it would have said is not known.
    """
    try:
        return read_mapping(path, printable(str(path)), most) if os.path.lexists(path) else {}
    except (OSError, BadFile) as error:
        text = f"{printable(str(path))}: {error.strerror}" if isinstance(error, OSError) else str(error)
        warnings.warn(f"{text}; nothing is taken from it", FileSystemWarning, stacklevel=2)
        return {}


def mapping(text: bytes, what: str, error: type[InvalidInput] = BadFile) -> dict[str, Any]:
    """JSON with keys, none given twice, of finite numbers below 2⁶³ and bounded depth.

    Raises:
        InvalidInput: of the kind ``error``: it is not that.
    """

    def no_number(word: str) -> Any:
        raise ValueError(f"the number {word[:20]} is out of range")

    def whole(digits: str) -> int:
        return int(digits) if len(digits) < 20 and abs(int(digits)) < 2**63 else no_number(digits)

    def real(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else no_number(digits)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return unique(pairs, what, error)

    try:
        content = json.loads(text, parse_int=whole, parse_float=real, parse_constant=no_number, object_pairs_hook=once)
    except error:
        raise
    except (ValueError, RecursionError) as reason:
        raise error(f"{what}: not valid JSON ({printable(str(reason))})") from None
    if not isinstance(content, dict):
        raise error(f"{what}: expected a JSON object, got {type(content).__name__}")
    level: list[Any] = [content]
    depth = 0
    while level:
        if depth == _MOST_NESTED:
            raise error(f"{what}: not valid JSON (nested more than {_MOST_NESTED} deep)")
        inner = itertools.chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
        level, depth = [one for one in inner if isinstance(one, dict | list)], depth + 1
    return content


def unique(pairs: Sequence[tuple[str, Any]], what: str, error: type[InvalidInput]) -> dict[str, Any]:
    """Pairs as a mapping. A key given twice, of which readers would take one or the other, is refused."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise error(f"{what}: holds {quoted(twice)} twice")
    return values


def from_output(directory: str | Path, path: str) -> str:
    """A path as an output's files have it: they mean the same when the directory that holds both is moved.

    Relative to the output, where the path leads to something in the directory that the output is in; else absolute.
    """
    place, target = (
        os.path.join(os.path.realpath(os.path.dirname(one)), os.path.basename(one))
        for one in (os.path.abspath(directory), os.path.abspath(path))
    )
    project = os.path.dirname(place)
    inside = project != os.path.dirname(project) and os.path.commonpath([project, target]) == project
    return os.path.relpath(target, place) if inside else os.path.abspath(path)


def to_output(directory: str | Path, path: str) -> str:
    """A path that a file in a directory has, for who is elsewhere."""
    joined = os.path.join(directory, path)
    # ``..`` of a link is not the directory that the link is in.
    return joined if os.path.islink(directory) else os.path.normpath(joined)


@contextlib.contextmanager
def created(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, in a directory that nobody else uses yet; on the disk when the block ends.

    Raises:
        OSError: it cannot be written, or is a link; ``filename`` is set.
    """
    descriptor = os.open(path, flags("O_WRONLY", "O_CREAT", "O_TRUNC", "O_NOFOLLOW"), 0o666)
    with naming(path), open(descriptor, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, content: bytes) -> None:
    """Write a small file where :func:`created` may."""
    with created(path) as file:
        file.write(content)


def csv_table(rows: Sequence[Mapping[str, Any]], errors: str = "backslashreplace") -> bytes:
    """Rows with the same keys as CSV, under a header; ``errors`` as :meth:`str.encode` has it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors=errors)


@contextlib.contextmanager
def beside(target: Path, patience: float = 0.0) -> Iterator[Path]:
    """An empty directory on the file system of ``target`` for what is not whole yet. It and what is left in it go.

    Nobody else can put a link there. It is the same for all that write ``target``, so that one does at a time, and what
    a killed one has left goes; but where another user has it, or there are no locks, it has a name of its own.

    Args:
        target: what is written. An ``OSError`` about the directory is one about it, for who reads it.
        patience: seconds to wait for another process.

    Raises:
        BadFile: another process writes ``target``.
    """
    if not target.name:
        raise BadFile(f"{target}: expected a file's name, got a directory's")
    own = target.with_name(f".r2m-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.partial")  # as PARTIAL
    directory, lock = own, None
    try:
        lock = _locked(own, target, time.monotonic() + patience)
        if lock is None:
            directory = target.with_name(f".r2m-{secrets.token_hex(8)}.partial")
            directory.mkdir(mode=0o700)
        yield directory
    except OSError as error:
        if not str(error.filename).startswith(str(directory)):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        if lock is not None or directory != own:
            shutil.rmtree(directory, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(directory: Path, target: Path, deadline: float) -> int | None:
    """A descriptor that keeps others out of an empty directory; None where it is not ours or cannot be locked."""
    while True:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        try:
            lock = os.open(directory, flags("O_RDONLY", "O_DIRECTORY", "O_NOFOLLOW"))
        except FileNotFoundError:  # who had it has just removed it
            continue
        except OSError:
            return None
        try:
            exclude_others(lock)
            ours = os.fstat(lock).st_uid == os.geteuid()
            if ours and is_at(directory, lock):
                for entry in os.scandir(directory):
                    shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
                return lock
        except BlockingIOError:
            ours = True
            if time.monotonic() > deadline:
                os.close(lock)
                raise BadFile(f"{target}: another process is writing it") from None
            time.sleep(0.05)
        except OSError:
            ours = False
        os.close(lock)
        if not ours:
            return None


def exclude_others(descriptor: int) -> None:
    """Lock an open file or directory for this process, until it is closed.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be locked; with one of :data:`UNKNOWN_THERE` where there are no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def put(file: Path, path: Path, *, replace: bool) -> None:
    """Give a whole file its name; arguments and errors are :func:`new_file`'s."""
    if replace:
        os.replace(file, path)
        return
    try:
        os.link(file, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    except OSError:  # a file system without second names
        os.close(os.open(path, flags("O_WRONLY", "O_CREAT", "O_EXCL", "O_NOFOLLOW"), 0o666))
        os.replace(file, path)


def new_file(path: Path, content: bytes, *, replace: bool = True) -> None:
    """A small file that appears when it is whole and on the disk; until then a former one stays.

    Args:
        path: where; a link there is replaced, not followed.
        content: all of it.
        replace: whether something may be there.

    Raises:
        FileExistsError: something is.
        BadFile: another process writes it, and does not end.
        OSError: it cannot be written; ``filename`` is ``path``.
    """
    with beside(path, patience=_PATIENCE) as directory:
        partial = directory / "file"
        write_file(partial, content)
        put(partial, path, replace=replace)
    sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which becomes ``path`` when the block ends without an exception; its parents are made.

    Raises:
        OSError: it cannot be written, or something other than an empty directory is there by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as directory:
        partial = directory / "directory"
        partial.mkdir()
        try:
            yield partial
            sync(partial)
        except OSError as error:
            raise as_seen(error, partial, path) from error.__cause__
        os.rename(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk; an ``OSError`` has ``filename`` set.

    Some file systems do not know how for a directory: that is told, and no reason to throw work away.
    """
    if not OPENS_DIRECTORIES and path.is_dir():
        return
    descriptor = os.open(path, flags("O_RDONLY"))
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNKNOWN_THERE or not path.is_dir():
            raise
        text = f"{path}: its file system cannot sync directories; a power cut may lose what is new"
        warnings.warn(text, FileSystemWarning, stacklevel=2)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an ``OSError`` raised inside the file's name: calls on file descriptors do not know it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def as_seen(error: BaseException, inside: Path, shown: str | Path) -> BaseException:
    """An error about a file in a directory that goes, as one about where it would be seen; others as they are."""
    if not isinstance(error, OSError) or not str(error.filename).startswith(str(inside)):
        return error
    seen = OSError(error.errno, error.strerror, str(shown) + str(error.filename)[len(str(inside)) :])
    for note in getattr(error, "__notes__", ()):
        seen.add_note(note)
    return seen


def is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file or directory, and by no link."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def is_mounted(path: Path) -> bool:
    """Whether a directory is where a file system begins, or a part of one that is shown there, as in containers."""
    if os.path.ismount(path):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    return any(_unescaped(line.split(b" ")[4]) == os.fsencode(path) for line in lines)


def _unescaped(path: bytes) -> bytes:
    """As the kernel writes it: spaces and the like in octal."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path)
