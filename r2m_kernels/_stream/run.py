"""Carries steps over all tensors of a merge, in one process or as one of several, and remembers what they found."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import checks
from .._backends import choose, usable_device
from .._interface import Operators
from ..config import MergeConfig
from ..errors import R2MError
from ..progress import Progress, ProgressEvent, readable_bytes
from . import budget
from .budget import Inputs
from .compatibility import plan as plan_tensors
from .loader import Loader
from .parallel import workers
from .plan import Plan, PlannedTensor
from .processes import Journal, KeptFactors, NoJournal, ProcessGroup, SingleProcess
from .schedule import Found, Pass, Step, run_in_groups, run_on_threads, shares, whole_bytes, work_list
from .spill import FactorStore
from .state_dicts import device_of

logger = logging.getLogger(__name__)
# Of the device memory free at the start, what the merge takes unless it is told.
DEVICE_SHARE = 0.8


@dataclass(frozen=True)
class StepRecord:
    """What a step cost: wall seconds, and bytes that all processes read of the inputs."""

    step: str
    seconds: float
    bytes_read: int


@dataclass(frozen=True)
class RunOptions:
    """How a merge is run. Nothing of it touches a bit of the result, but for who computes.

    Attributes:
        device: where to compute; ``None``: where the base's tensors are.
        backend: ``"auto"``, or a backend by name, which then never falls back.
        memory_budget: bytes, or text such as "4GiB", for tensors in flight, factors and inputs that are kept.
        spill_directory: takes the factors that exceed the budget; ``None``: the system's temporary one.
        processes: who shares the work.
        journal: who writes down what is found.
        kept: where truncations of single experts are, and go.
    """

    device: str | torch.device | None = None
    backend: str = "auto"
    memory_budget: int | str | None = None
    spill_directory: str | Path | None = None
    processes: ProcessGroup | None = None
    journal: Journal | None = None
    kept: KeptFactors | None = None


Passes = Callable[[Plan, MergeConfig, Operators], Sequence[Pass]]


class Run:
    """One merge on its way: what is read, who computes, what fits into memory, who else works on it.

    Attributes:
        inputs, plan: the checkpoints and what becomes of their tensors.
        device, backend: where and by whom it is computed.
        processes, journal: who shares the work; who writes down what is found.
        kept: where truncations of single experts are.
        loader: brings tensors.
        memory: how this process's memory is split.
        factors: where low-rank factors are kept between steps.
        records: of the steps so far, by name.
    """

    def __init__(self, inputs: Inputs, config: MergeConfig, options: RunOptions, passes: Passes) -> None:
        self.inputs = inputs
        self.plan = plan_tensors(inputs.base, inputs.named, config)
        device = device_of(inputs.base, self.plan) if options.device is None else options.device
        limit = None if options.memory_budget is None else checks.byte_size("memory_budget", options.memory_budget)
        self.device = usable_device(device)
        self.backend = choose(options.backend, self.device)
        self.processes, self.journal = options.processes or SingleProcess(), options.journal or NoJournal()
        self.kept = options.kept
        self.loader = Loader(inputs, self.device)
        self.records: dict[str, StepRecord] = {}
        logger.info("backend %s on %s: %s", self.backend.name, self.device, self.backend.reason)
        logger.debug("%r", self.plan)
        known = passes(self.plan, config, self.backend.operators)
        self._share = shares(self.plan, known, inputs, config, self.processes.size)[self.processes.index]
        free = _free_bytes(self.device, limit)
        self.memory = budget.split(
            limit,
            [tensor for tensor in self.plan.tensors if self.owns(tensor)],
            inputs,
            config,
            # Threads are for CPUs: a GPU has one queue of work.
            threads=workers() if self.device.type == "cpu" else 1,
            whole=whole_bytes(known, inputs),
            device=free,
            brought=lambda tensor: not self.loader.in_place(tensor),
        )
        self.loader.kept = self.memory.kept
        if self.memory.ring:
            self.loader.ring_bytes = self.memory.ring
        self._passes = 0
        self.factors = FactorStore(self.memory.factors, options.spill_directory, None if free is None else free // 2)
        if self.memory.spill > 0:
            self.factors.reserve(self.memory.spill)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an analysis reads its inputs again at every merge and keeps factors in a file, so that it cannot be "
            "pickled or copied; keep its report() or what it merges"
        )

    def owns(self, tensor: PlannedTensor) -> bool:
        """Whether this process works on a tensor."""
        return tensor.name in self._share

    def together(self, action: Callable[[], None]) -> None:
        """Do something in every process; none goes on before all have done it, or where one could not."""
        trouble: Exception | None = None
        try:
            action()
        except (R2MError, OSError) as error:
            trouble = error
        self.processes.gather({}, trouble)

    def each(self, step: Step, progress: Progress | None = None) -> dict[str, Any]:
        """Take a step on every tensor of its pass.

        Returns:
            The values of all tensors, whichever process worked on them.
        """
        start, read_before = time.perf_counter(), self.loader.read_bytes
        over, remembered = step.over, step.remembered(self.journal)
        values = {tensor.name: remembered[tensor.name] for tensor in over.tensors if tensor.name in remembered}
        left = [tensor for tensor in over.tensors if self.owns(tensor) and tensor.name not in values]
        total = sum(map(self.inputs.nbytes, left))
        bytes_done = tensors_done = 0
        grouped = self.backend.groups_tensors
        on_device = self.loader.on_device if grouped else None
        works = work_list(over, left, self.inputs, self.memory, workers(), on_device)
        if grouped and self._passes % 2:
            works.reverse()  # what the last pass read in the end, files' pages may still be in memory of
        self._passes += 1
        trouble: Exception | None = None
        # Where a device is not to be waited for, what was found is fetched when all is done; but what is written down,
        # and what threads find, is settled at once.
        later = grouped and (isinstance(self.journal, NoJournal) or not step.journaled)
        waiting: list[tuple[Sequence[PlannedTensor], Any]] = []

        def settle(found: Found) -> None:
            for (group, _), results in zip(found, step.settled(found), strict=True):
                for tensor, value in zip(group, results, strict=True):
                    values[tensor.name] = value
                    if step.journaled and not later:
                        self.journal.record(over.name, tensor.name, step.plain(value))

        try:
            self.loader.await_lenders()
            for group, found in (run_in_groups if grouped else run_on_threads)(works, step, self.loader, self.memory):
                if later:
                    waiting.append((group, found))
                else:
                    self.loader.await_given()  # nothing is written down before it is there
                    settle([(group, found)])
                bytes_done, tensors_done = bytes_done + sum(map(self.inputs.nbytes, group)), tensors_done + len(group)
                if progress is not None:
                    progress(ProgressEvent(over.name, tensors_done, len(left), bytes_done, total))
            settle(waiting)
            self.loader.await_given()
            self.loader.await_kernels()  # no more than a look, since values have come from there
        except (R2MError, OSError) as error:
            trouble = error
        read = self.loader.read_bytes - read_before
        values = self.processes.gather(values, trouble)
        read = sum(self.processes.gather({str(self.processes.index): read}).values())
        record = self.records[over.name] = StepRecord(over.name, time.perf_counter() - start, read)
        logger.info("%s: %d tensors, %s in %.3f s", over.name, len(left), readable_bytes(read), record.seconds)
        return values


def _free_bytes(device: torch.device, memory_budget: int | None) -> int | None:
    """Of a GPU's memory what a merge may take; ``None`` on a CPU."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(DEVICE_SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
    return free if memory_budget is None else min(free, memory_budget)
