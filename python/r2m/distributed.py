"""Several processes on one merge, as ``torchrun`` starts them.

What they exchange is small: N × N numbers and names, as Python objects over gloo, whatever device computes. Tensors go
from and to files that all of them see.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from typing import Any

from r2m_kernels.errors import R2MError
from r2m_kernels.streaming import ProcessGroup, SingleProcess

# One process may work for hours while another has nothing left to do; one that died is noticed at once.
PATIENCE = datetime.timedelta(days=30)


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
def processes() -> Iterator[ProcessGroup]:
    """The processes that ``torchrun`` started together with this one, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield SingleProcess()
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield TorchrunProcesses(torch.distributed.get_rank(), size)
    finally:
        with contextlib.suppress(RuntimeError):  # of a group that has lost one
            torch.distributed.destroy_process_group()


def local_processes() -> int:
    """How many processes of the job are on this machine, and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_device(device: str | None) -> str | None:
    """``"cuda"`` as this process's own GPU; anything else as it is."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
