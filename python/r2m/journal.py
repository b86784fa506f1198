"""What a merge has found and written so far, on the disk: what ``--resume`` goes on from."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from r2m.places import naming
from r2m_kernels.descriptors import flags

PREFIX = "journal-"


class FileJournal:
    """A :class:`r2m_kernels.streaming.Journal` of JSON lines, each behind its CRC-32: ``journal-INDEX``.

    Every process appends to a file of its own and reads those of all processes of former runs, however many there were.
    A line that was cut off, and whatever follows it, does not count.

    Args:
        directory: an existing one.
        index: of this process.
        before: brings to the disk what records speak of; called before they are written.
        seconds: records are written together, at most so often. What is lost with a batch is done again.

    Raises:
        OSError: the file cannot be opened; ``filename`` is set.
    """

    def __init__(
        self, directory: Path, index: int = 0, before: Callable[[], None] | None = None, seconds: float = 2.0
    ) -> None:
        self._before, self._seconds = before, seconds
        self._known: dict[str, dict[str, Any]] = {}
        for path in sorted(directory.glob(f"{PREFIX}*")):
            for step, name, value in _records(path.read_bytes())[0]:
                self._known.setdefault(step, {})[name] = value
        self._path = directory / f"{PREFIX}{index}"
        self._batch: list[bytes] = []
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        # Disks take their time, and who records has other work to do.
        self._flusher = ThreadPoolExecutor(1, "r2m-journal")
        self._flushes: Future[None] | None = None
        self._last = time.monotonic()
        with naming(self._path):
            self._descriptor = os.open(self._path, flags("O_RDWR", "O_CREAT", "O_NOFOLLOW"), 0o666)
            whole = _records(self._path.read_bytes())[1]
            os.ftruncate(self._descriptor, whole)
            os.lseek(self._descriptor, whole, os.SEEK_SET)

    def known(self, step: str) -> dict[str, Any]:
        """See the protocol."""
        return self._known.get(step, {})

    def recall(self, step: str, values: Mapping[str, Any]) -> None:
        """Values that are known from elsewhere, and not written down."""
        self._known[step] = {**values, **self._known.get(step, {})}

    def record(self, step: str, name: str, value: Any) -> None:
        """See the protocol.

        Raises:
            OSError: the disk is full or broken; ``filename`` is set.
        """
        text = json.dumps([step, name, value], ensure_ascii=True).encode()
        with self._lock:
            self._batch.append(b"%08x %s\n" % (zlib.crc32(text), text))
            due = time.monotonic() - self._last >= self._seconds
            ended = self._flushes if self._flushes is None or self._flushes.done() else None
            if due and (ended is not None or self._flushes is None):
                self._last = time.monotonic()
                self._flushes = self._flusher.submit(self.flush)
        if ended is not None:
            ended.result()  # raises what the last one met

    def flush(self) -> None:
        """Bring everything recorded to the disk, after what it speaks of."""
        with self._flushing:
            with self._lock:
                batch, self._batch = self._batch, []
                self._last = time.monotonic()
            if not batch:
                return
            if self._before is not None:
                self._before()
            content = memoryview(b"".join(batch))
            with naming(self._path):
                while content:
                    content = content[os.write(self._descriptor, content) :]
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Flush, if the disk takes it, and give the file back."""
        self._flusher.shutdown(wait=True)
        with contextlib.suppress(OSError):  # then that work is done again
            self.flush()
        os.close(self._descriptor)


def _records(content: bytes) -> tuple[list[tuple[str, str, Any]], int]:
    """The whole records at the start of a journal, and how many bytes they take."""
    records, whole = [], 0
    for line in content.splitlines(keepends=True):
        crc, _, text = line.removesuffix(b"\n").partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
            break
        step, name, value = json.loads(text)
        records.append((step, name, value))
        whole += len(line)
    return records, whole
