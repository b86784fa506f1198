"""Several processes on one merge, as ``torchrun`` starts them.

What they exchange is small: N × N numbers and names, as Python objects; over nccl where each process has a GPU of its
own, else over gloo. The bytes of an object are the same either way. Tensors go from and to files that all of them see.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from r2m_kernels.errors import R2MError
from r2m_kernels.streaming import ProcessGroup, SingleProcess

# One process may work for hours while another has nothing left to do; one that died is noticed at once.
PATIENCE = datetime.timedelta(days=30)


_SILENCE = 10.0  # seconds in which the others usually come
# What torchrun sets, beside WORLD_SIZE.
_TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


class ProcessWarning(UserWarning):
    """What the environment says of other processes cannot be."""


class LostProcess(R2MError):
    """Another process of the job has ended."""

    exit_code = 1


class TorchrunProcesses:
    """The processes of a job as a :class:`r2m_kernels.streaming.ProcessGroup`."""

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.size = size

    def gather(self, values: Mapping[str, Any], error: Exception | None = None) -> dict[str, Any]:
        """See the protocol.

        Raises:
            LostProcess: one of the processes is gone.
        """
        import torch.distributed

        everyone: list[Any] = [None] * self.size
        try:
            torch.distributed.all_gather_object(everyone, (dict(values), error))
        except RuntimeError as lost:
            raise LostProcess(
                f"process {self.index} of {self.size}: another process of this job has ended; start the job again "
                "with --resume, with any number of processes"
            ) from lost
        for _, trouble in everyone:
            if trouble is not None:
                # A process's own error keeps its traceback.
                raise error if error is not None and str(error) == str(trouble) else trouble
        return {name: value for theirs, _ in everyone for name, value in theirs.items()}


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[ProcessGroup]:
    """The processes that ``torchrun`` started together with this one, or this one alone.

    Variables of another job that are left in the environment are told and not followed: nobody would come.

    Args:
        device: where they compute, as the user said it.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        yield SingleProcess()
        return
    missing = next((name for name in _TORCHRUN if not os.environ.get(name)), None)
    if missing is not None or _number("RANK", size) >= size:
        what = f"{missing} is not set" if missing else f"RANK is {os.environ['RANK']!r}"
        text = f"WORLD_SIZE is {size} and {what}: not started by torchrun, this process goes on alone"
        warnings.warn(text, ProcessWarning, stacklevel=2)
        yield SingleProcess()
        return
    import torch.distributed

    at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waits = f"process {os.environ['RANK']} of {size} waits for the others at {at}"
    with _told_after(_SILENCE, f"{waits}; alone? unset WORLD_SIZE, or start all of them with torchrun"):
        torch.distributed.init_process_group(_exchange(device), timeout=PATIENCE)
    try:
        yield TorchrunProcesses(torch.distributed.get_rank(), size)
    finally:
        with contextlib.suppress(RuntimeError):  # of a group that has lost one
            torch.distributed.destroy_process_group()


def _exchange(device: str | None) -> str:
    """What carries objects between processes. nccl's lie on this process's GPU, which it takes for its own."""
    import torch

    mine = local_device(device)
    if device != "cuda" or mine == device or not torch.distributed.is_nccl_available():
        return "gloo"
    if local_processes() > torch.cuda.device_count():  # nccl refuses two on one GPU; a merge says so itself
        return "gloo"
    torch.cuda.set_device(mine)
    return "nccl"


@contextlib.contextmanager
def _told_after(seconds: float, text: str) -> Iterator[None]:
    """A warning where the block takes longer."""
    timer = threading.Timer(seconds, lambda: print(f"Warning: {text}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _number(variable: str, default: int) -> int:
    """What a variable of the environment says; the default where that is no number."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and len(text) < 10 else default


def local_processes() -> int:
    """How many processes of the job are on this machine, and share its memory."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def local_device(device: str | None) -> str | None:
    """``"cuda"`` as this process's own GPU; anything else as it is."""
    return f"cuda:{_number('LOCAL_RANK', 0)}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
