"""Between a GPU and what lies elsewhere: pinned memory in a ring of slots, filled and emptied by threads (README §10).

A GPU copies by itself from and to pinned memory alone, which is slow to get. So a few slots are got once and used again
and again: a thread fills one straight from a file or a tensor, the GPU fetches it, and meanwhile others are filled.
Results go the other way.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

# What a link needs to reach its speed, and what threads keep it busy with: three times what is on its way.
SLOT_BYTES = 2**24
RING_BYTES = 12 * SLOT_BYTES
FEWEST_SLOTS = 4
SMALLEST_SLOT = 2**12
THREADS = 4
# Of a slot, at which a tensor may start there: every dtype's size divides it.
ALIGNMENT = 64


class Piece(NamedTuple):
    """A run of elements on the device, and what is done with as many of them in pinned memory.

    Attributes:
        run: flat.
        host: fills pinned memory with them, or takes them from there; it is used again afterwards.
    """

    run: Tensor
    host: Callable[[Tensor], object]


class _Slot:
    """Pinned memory, and the event after which it may be filled again."""

    def __init__(self, size: int) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.fetched: torch.cuda.Event | None = None

    def await_copies(self) -> None:
        """Wait until the GPU has fetched what was filled in last."""
        if self.fetched is not None:
            self.fetched.synchronize()
            self.fetched = None


class Ring:
    """Slots and threads of one process, got when they are first needed.

    Args:
        device: the GPU.
        size: bytes of pinned memory at most.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        # A power of two, which is what pinned memory comes in.
        self.slot_bytes = min(SLOT_BYTES, max(SMALLEST_SLOT, 1 << max(1, size // FEWEST_SLOTS).bit_length() - 1))
        self.slots = max(FEWEST_SLOTS, size // self.slot_bytes)
        self._made, self._lock = 0, threading.Lock()
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._there: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._back: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: ThreadPoolExecutor | None = None
        self._given: deque[list[Future[None]]] = deque()

    def bring(self, pieces: Sequence[Piece]) -> None:
        """Fill runs on the device from what each piece's ``host`` writes; the current stream goes on behind that."""
        if not pieces:
            return
        current = torch.cuda.current_stream(self._device)
        ready = current.record_event()  # the runs' memory may have been another tensor's until then
        brought: list[Future[None]] = []
        try:
            for batch in self._batches(pieces):
                brought.append(self._submit(self._bring, batch, ready))
            _await(brought)
        finally:  # also where one has failed: the runs' memory is given back, and nothing may be on its way there
            wait(brought)
            current.wait_event(self._there.record_event())

    def give_back(self, pieces: Sequence[Piece]) -> None:
        """Hand runs on the device to what each piece's ``host`` reads, in threads, once the current stream is there.

        The results before the last ones are waited for, so that the device holds those of two groups at most.
        """
        while len(self._given) > 1:
            _await(self._given.popleft())
        if pieces:
            ready = torch.cuda.current_stream(self._device).record_event()
            self._given.append([self._submit(self._give, batch, ready) for batch in self._batches(pieces)])

    def finish(self) -> None:
        """Wait for all that was given back; raises what went wrong there."""
        given = [batch for batches in self._given for batch in batches]
        self._given.clear()
        _await(given)

    def _submit(
        self, action: Callable[[list[Piece], torch.cuda.Event], None], batch: list[Piece], ready: torch.cuda.Event
    ) -> Future[None]:
        with self._lock:  # one thread brings inputs, another gives results back
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, "r2m-ring")
            if self._made < self.slots:
                self._free.put(_Slot(self.slot_bytes))
                self._made += 1
        return self._pool.submit(action, batch, ready)

    def _batches(self, pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
        """Pieces by slots, none of which is larger than one: small ones together."""
        batch: list[Piece] = []
        filled = 0
        for piece in pieces:
            size = _aligned(piece.run.nbytes)
            if batch and filled + size > self.slot_bytes:
                yield batch
                batch, filled = [], 0
            batch.append(piece)
            filled += size
        if batch:
            yield batch

    def _laid_out(self, slot: _Slot, batch: list[Piece]) -> list[Tensor]:
        """Pinned memory for each piece of a batch."""
        places, start = [], 0
        for run, _ in batch:
            places.append(slot.memory[start : start + run.nbytes].view(run.dtype))
            start += _aligned(run.nbytes)
        return places

    def _bring(self, batch: list[Piece], ready: torch.cuda.Event) -> None:
        slot = self._free.get()
        try:
            slot.await_copies()
            places = self._laid_out(slot, batch)
            for place, piece in zip(places, batch, strict=True):
                piece.host(place)
            with torch.no_grad(), torch.cuda.stream(self._there):
                self._there.wait_event(ready)
                for place, piece in zip(places, batch, strict=True):
                    piece.run.copy_(place, non_blocking=True)
                slot.fetched = self._there.record_event()
        finally:
            self._free.put(slot)

    def _give(self, batch: list[Piece], ready: torch.cuda.Event) -> None:
        slot = self._free.get()
        try:
            slot.await_copies()
            places = self._laid_out(slot, batch)
            with torch.no_grad(), torch.cuda.stream(self._back):
                self._back.wait_event(ready)
                for place, piece in zip(places, batch, strict=True):
                    place.copy_(piece.run, non_blocking=True)
                slot.fetched = self._back.record_event()
            slot.await_copies()
            for place, piece in zip(places, batch, strict=True):
                piece.host(place)
        finally:
            self._free.put(slot)


def _await(batches: Sequence[Future[None]]) -> None:
    """All of them, also where one has failed: what others fill is not given back before they are done."""
    wait(batches)
    for batch in batches:
        batch.result()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
