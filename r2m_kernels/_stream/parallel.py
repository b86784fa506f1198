"""The one place where work is spread over CPU threads, without letting the thread count touch a bit of the result.

A BLAS that splits one product over threads may sum in another order for another thread count. So every product runs
on one thread, and the parallelism is across whole tensors or across blocks whose size depends on shapes only.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


class _State(threading.local):
    inside = False
    alone = False  # whether there was nothing to set, and so is nothing to restore
    threads = 1
    pool: ThreadPoolExecutor | None = None


_state = _State()


# Whose `fp32_precision` is the matmuls' of torch.backends.cuda and mkldnn: asked for in every call of an operator, and
# torch.backends takes five times as long to say it.
_MATMULS = (("cuda", "matmul"), ("mkldnn", "matmul"))
_precision, _set_precision = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
_EXACT = ("ieee", "none")  # what float32 products are by default, too


class _TorchThreads:
    """The thread count and modes of products to restore, where several merges run side by side.

    The count in force is each thread's own, but a thread that never set one starts with what any thread set last: a
    second merge must not take the first one's 1 for the user's wish.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._count = 1
        self._allowed: list[tuple[tuple[str, str], str]] = []
        self._strict = self._warns = False  # whether deterministic algorithms were asked for, and how

    def fit(self) -> bool:
        """Whether all is as it is to be, for this thread alone: every call of an operator asks."""
        if self._inside or torch.get_num_threads() != 1 or torch.are_deterministic_algorithms_enabled():
            return False
        return _precision("cuda", "matmul") in _EXACT and _precision("mkldnn", "matmul") in _EXACT

    def enter(self) -> int:
        with self._lock:
            count = torch.get_num_threads()
            if self._inside == 0:
                self._count = count
                # A training script may have allowed tf32 or bf16 inside float32 products: not here.
                for matmul in _MATMULS:
                    if (precision := _precision(*matmul)) not in _EXACT:
                        self._allowed.append((matmul, precision))
                        _set_precision(*matmul, "ieee")
                # Where a script asked for deterministic algorithms PyTorch refuses every cuBLAS product unless an
                # environment variable was set before, and takes other CPU kernels. Here nothing depends on it.
                self._strict = torch.are_deterministic_algorithms_enabled()
                if self._strict:
                    self._warns = torch.is_deterministic_algorithms_warn_only_enabled()
                    torch.use_deterministic_algorithms(False)
            self._inside += 1
            if count != 1:
                torch.set_num_threads(1)
            return self._count

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._count != 1:
                torch.set_num_threads(self._count)
            if self._inside == 0:
                while self._allowed:
                    matmul, precision = self._allowed.pop()
                    _set_precision(*matmul, precision)
                if self._strict:
                    torch.use_deterministic_algorithms(True, warn_only=self._warns)


_torch_threads = _TorchThreads()


@contextmanager
def one_thread_per_product() -> Iterator[None]:
    """Within the block BLAS and LAPACK run on one thread, and :func:`for_each` uses as many workers as torch had.

    The number of workers is ``torch.get_num_threads()`` at entry (``OMP_NUM_THREADS``, ``torch.set_num_threads``); it
    is restored at exit. Nested blocks change nothing.
    """
    entered = _enter()
    try:
        yield
    finally:
        if entered:
            _leave()


def _enter() -> bool:
    """Whether it was not so before."""
    if _state.inside:
        return False
    _state.inside, _state.alone = True, _torch_threads.fit()
    if not _state.alone:
        _state.threads = _torch_threads.enter()
    return True


def _leave() -> None:
    if _state.pool is not None:
        _state.pool.shutdown(wait=True, cancel_futures=True)
    _state.inside, _state.threads, _state.pool = False, 1, None
    if not _state.alone:
        _torch_threads.leave()


def deterministic(function: Callable[P, R]) -> Callable[P, R]:
    """Run a public function inside :func:`one_thread_per_product`, without gradients, autocast or a default device.

    Nor in inference mode, which is a thread's own: what one made in it, no other thread could write to.
    """
    # Leaving inference mode would switch gradients on.
    return _inside(lambda: [*_surroundings(), torch.no_grad()], function)


def differentiable(function: Callable[P, R]) -> Callable[P, R]:
    """The same with gradients, where they are on."""
    return _inside(_surroundings, function)


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """The same for what PyTorch's dispatcher calls: it has left gradients and a default device behind. It is cheap."""
    return _inside(_foreign_modes, function)


def _surroundings() -> list[AbstractContextManager[Any]]:
    """What ends them, and a default device."""
    found = _foreign_modes()
    return found if torch.get_default_device().type == "cpu" else [*found, torch.device("cpu")]


def _foreign_modes() -> list[AbstractContextManager[Any]]:
    """What ends the modes that would change a result, or keep workers from writing it; few are ever on."""
    found: list[AbstractContextManager[Any]] = []
    if torch.is_inference_mode_enabled():
        found.append(torch.inference_mode(False))
    if torch._C._is_any_autocast_enabled():
        on = filter(torch.is_autocast_enabled, ("cpu", "cuda"))
        found.extend(torch.autocast(device, enabled=False) for device in on)
    return found


def _inside(modes: Callable[[], list[AbstractContextManager[Any]]], function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        entered = _enter()
        try:
            found = modes()
            if not found:
                return function(*args, **kwargs)
            with ExitStack() as stack:
                for mode in found:
                    stack.enter_context(mode)
                return function(*args, **kwargs)
        finally:
            if entered:
                _leave()

    return wrapper


def workers() -> int:
    """How many calls :func:`for_each` keeps running at once here; 1 inside a worker."""
    return _state.threads if _state.inside else 1


def _pool() -> ThreadPoolExecutor:
    """The workers of this thread's outermost call; they start with the first work for them."""
    if _state.pool is None:
        _state.pool = ThreadPoolExecutor(_state.threads, "r2m", initializer=_enter_worker)
    pool: ThreadPoolExecutor = _state.pool
    return pool


def for_each(function: Callable[[T], R], items: Iterable[T], limit: int | None = None) -> Iterator[R]:
    """``function(item)`` for every item, several at once, yielded in the order of the items.

    Args:
        limit: at most this many calls begun and not yet yielded, where memory demands it.
    """
    if workers() == 1 or (limit is not None and limit <= 1):
        yield from map(function, items)
        return
    # A short queue bounds how many finished results, and so how much memory, wait for a slow one.
    queue = 2 * workers() if limit is None else limit
    items = iter(items)
    begun = list(itertools.islice(items, 2))
    if len(begun) < 2:  # nothing to run side by side: no threads are started for it, and as in one none within
        threads, _state.threads = _state.threads, 1
        try:
            results = [function(item) for item in begun]
        finally:
            _state.threads = threads
        yield from results
        return
    pool = _pool()
    waiting: deque[Future[R]] = deque()
    try:
        for item in itertools.chain(begun, items):
            if len(waiting) >= queue:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_without_gradients, function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def for_each_within(function: Callable[[T], R], items: Sequence[T], sizes: Sequence[int], room: int) -> Iterator[R]:
    """:func:`for_each` of items that take memory: whose thread is free takes the first that fits beside those at work.

    Args:
        sizes: bytes that each takes; one that takes more than all is worked on with nothing beside it.
        room: bytes for all that are at work.
    """
    if workers() == 1 or len(items) < 2:
        yield from for_each(function, items)
        return
    pool = _pool()
    found: list[Future[R]] = [Future() for _ in items]
    waiting, at_work, fits = list(range(len(items))), dict[int, int](), threading.Condition()

    def next_place() -> int | None:
        with fits:
            while waiting:
                free = room - sum(at_work.values())
                place = next((one for one in waiting if sizes[one] <= free or not at_work), None)
                if place is not None:
                    waiting.remove(place)
                    at_work[place] = sizes[place]
                    return place
                fits.wait()
            return None

    def work(_: int) -> None:
        while (place := next_place()) is not None:
            try:
                found[place].set_result(function(items[place]))
            except BaseException as error:
                found[place].set_exception(error)
            with fits:
                del at_work[place]
                fits.notify_all()

    working = [pool.submit(_without_gradients, work, thread) for thread in range(_state.threads)]
    try:
        for one in found:
            yield one.result()
    finally:
        with fits:
            waiting.clear()
            fits.notify_all()
        for one_thread in working:
            one_thread.result()


def ordered_sum(
    function: Callable[[T], tuple[Tensor, ...]], items: Iterable[T], limit: int | None = None
) -> tuple[Tensor, ...]:
    """Sums of what ``function`` gives for every item, one after another in their order, whoever computes them."""
    total: tuple[Tensor, ...] | None = None
    for sums in for_each(function, items, limit):
        total = sums if total is None else tuple(one.add_(other) for one, other in zip(total, sums, strict=True))
        del sums  # before the next ones are made
    assert total is not None, "nothing to sum"
    return total


def _enter_worker() -> None:
    torch.set_num_threads(1)
    _state.inside, _state.threads = True, 1


def _without_gradients(function: Callable[[T], R], item: T) -> R:
    with torch.no_grad():  # the gradient mode is a thread's own
        return function(item)
