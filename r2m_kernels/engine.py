"""Carries a step over all tensors: reads them, moves them to the device, spreads or groups the work.

On a CPU tensors are spread over threads, one each. The Triton backend takes groups of one shape instead, a launch a
group; on a GPU the next group is read and copied, through pinned memory and on a stream of its own, while the kernels
work on this one, and inputs that fit stay on the device for the steps that follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from r2m_kernels import gram
from r2m_kernels._backends import Backend
from r2m_kernels._parallel import for_each, workers
from r2m_kernels.compatibility import Plan, PlannedTensor
from r2m_kernels.errors import InvalidInput
from r2m_kernels.tensors import StateDictSource, TensorSource

R = TypeVar("R")

# Bytes of inputs in one group, where no budget says less. What comes from elsewhere waits in pinned memory, which is
# slow to get and to be had twice; what is on the device already can be taken in few launches, each of which costs the
# host more time than a small group costs the GPU.
GROUP_BYTES = 2**28
DEVICE_GROUP_BYTES = 2**31
# Of the device memory free at the start, what the merge takes unless it is told.
DEVICE_SHARE = 0.8


@dataclass(frozen=True)
class ProgressEvent:
    """More tensors done: one, or a group on the Triton backend.

    ``step`` is "task Gram", "truncation" or "combination"; counts are of that step.
    """

    step: str
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int


Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class StepRecord:
    """What a step cost: wall seconds, bytes of the inputs it reads."""

    step: str
    seconds: float
    bytes_read: int


@dataclass(frozen=True)
class Group:
    """Tensors of one role, shape and rank with their inputs on the device; no inputs for roles that are not computed.

    Attributes:
        bases: L tensors.
        experts: N lists of L tensors.
    """

    tensors: list[PlannedTensor]
    bases: list[Tensor] = field(default_factory=list)
    experts: list[list[Tensor]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [tensor.name for tensor in self.tensors]

    def inputs(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """One tensor's: the base's and the experts'."""
        return self.bases[index], [expert[index] for expert in self.experts]

    def single(self, index: int) -> Group:
        """A group of one of its tensors, with its inputs."""
        base, experts = self.inputs(index)
        return Group([self.tensors[index]], [base], [[expert] for expert in experts])


class Engine:
    """Reads tensors, moves them to the device and hands them to a step."""

    def __init__(
        self,
        base: TensorSource,
        experts: list[TensorSource],
        plan: Plan,
        device: torch.device,
        backend: Backend,
        budget: int | None,
        exact: bool,
    ) -> None:
        self.base, self.experts, self.device, self.backend = base, experts, device, backend
        self._exact = exact
        self.steps: dict[str, StepRecord] = {}
        self._grouped = backend.name == "triton"
        self._stream: torch.cuda.Stream | None = None
        self._resident: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self._resident_bytes = 0
        self.device_budget: int | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = int(DEVICE_SHARE * (torch.cuda.mem_get_info(device)[0] + cached))
            self.device_budget = free if budget is None else min(free, budget)
        # Half is for factors; a quarter for inputs that stay; the rest for two groups, results and workspace.
        room = [] if self.device_budget is None else [self.device_budget // 16]
        self._most_bytes = min([DEVICE_GROUP_BYTES, *room, *([] if budget is None else [budget // 8])])
        # Threads are for CPUs: a GPU has one queue of work.
        self._limit: int | None = None if device.type == "cpu" else 1
        if budget is not None:
            largest = max((self._bytes(tensor) for tensor in plan.tensors), default=1)
            share = max(1, budget // 2 // max(1, largest))
            self._limit = share if self._limit is None else min(self._limit, share)

    def load(self, tensors: list[PlannedTensor]) -> Group:
        """A group's inputs on the device; tensors of a role that is not computed come without."""
        if tensors[0].role not in ("matrix", "vector"):
            return Group(tensors)
        loaded = [self._read(tensor.name) for tensor in tensors]
        experts = [[others[j] for _, others in loaded] for j in range(len(self.experts))]
        return Group(tensors, [base for base, _ in loaded], experts)

    def mean_of_experts(self, tensor: PlannedTensor, weights: Tensor) -> Tensor:
        """Weighted mean of the experts' tensors: θ₀ plus rounded differences could turn a variance negative.

        Args:
            tensor: what to read.
            weights: (N,) w, summing to 1.

        Returns:
            float64 on the CPU.
        """
        total = torch.zeros(tensor.spec.shape, dtype=torch.float64)
        for weight, source in zip((weights * len(weights)).tolist(), self.experts, strict=True):
            total += source.read(tensor.name).to("cpu", torch.float64) * weight
        return total / len(self.experts)

    def grams(self, group: Group) -> list[Tensor]:
        """Step 1 for a group; refuses NaN and Inf, which a Gram matrix cannot hide."""
        if not group.bases:
            for tensor in group.tensors:
                sources = self.experts if tensor.role == "extra" else [self.base, *self.experts]
                self._refuse_non_finite(tensor, ((source.label, source.read(tensor.name)) for source in sources))
            return [torch.zeros(0, 0, dtype=torch.float64) for _ in group.tensors]
        first = group.tensors[0]
        precise = self._exact or first.role != "matrix" or first.full_rank
        results = gram.task_grams(group.bases, group.experts, self.backend.operators, precise=precise)
        for index, (tensor, result) in enumerate(zip(group.tensors, results, strict=True)):
            if bool(torch.isfinite(result).all()):
                continue
            base, experts = group.inputs(index)
            labels = [self.base.label, *(source.label for source in self.experts)]
            self._refuse_non_finite(tensor, zip(labels, [base, *experts], strict=True))
            raise InvalidInput(
                f"tensor '{tensor.name}': the differences from the base are too large to be squared and summed"
            )
        return results

    def over(
        self,
        step: str,
        tensors: list[PlannedTensor],
        function: Callable[[Group], Sequence[R]],
        progress: Progress | None,
    ) -> dict[str, R]:
        """Apply a step to every tensor, group by group; ``function`` gives a result for each tensor of its group."""
        start = time.perf_counter()
        total = sum(self._bytes(tensor) for tensor in tensors)
        results: dict[str, R] = {}
        done = 0
        work = self._in_groups if self._grouped else self._on_threads
        for group, found in work(tensors, function):
            results.update(zip((tensor.name for tensor in group), found, strict=True))
            done += sum(self._bytes(tensor) for tensor in group)
            if progress is not None:
                progress(ProgressEvent(step, len(results), len(tensors), done, total))
        self.steps[step] = StepRecord(step, time.perf_counter() - start, total)
        return results

    def _on_threads(
        self, tensors: list[PlannedTensor], function: Callable[[Group], Sequence[R]]
    ) -> Iterator[tuple[list[PlannedTensor], Sequence[R]]]:
        """One tensor at a time, several at once; a tensor too large for one thread's share goes alone.

        Alone means that its own blocks are spread over the threads instead; the result is the same to the bit.
        """
        elements = sum(tensor.spec.numel for tensor in tensors)
        alone = [tensor for tensor in tensors if tensor.spec.numel * workers() > elements]
        shared = [tensor for tensor in tensors if tensor.spec.numel * workers() <= elements]

        def work(tensor: PlannedTensor) -> Sequence[R]:
            return function(self.load([tensor]))

        for tensor in alone:
            yield [tensor], work(tensor)
        for tensor, found in zip(shared, for_each(work, shared, self._limit), strict=True):
            yield [tensor], found

    def _in_groups(
        self, tensors: list[PlannedTensor], function: Callable[[Group], Sequence[R]]
    ) -> Iterator[tuple[list[PlannedTensor], Sequence[R]]]:
        """Tensors of one shape together; the next group is loaded while one is worked on."""
        groups = self._groups(tensors)
        with ThreadPoolExecutor(1, "r2m-load") as pool:
            waiting = [pool.submit(self._load_ahead, group) for group in groups[:1]]
            for index in range(len(groups)):
                group, ready = waiting.pop().result()
                if index + 1 < len(groups):
                    waiting.append(pool.submit(self._load_ahead, groups[index + 1]))
                if ready is not None:
                    compute = torch.cuda.current_stream(self.device)
                    compute.wait_event(ready)
                    for tensor in (*group.bases, *(one for expert in group.experts for one in expert)):
                        tensor.record_stream(compute)  # its memory is not reused before these kernels are done
                yield group.tensors, function(group)

    def _groups(self, tensors: list[PlannedTensor]) -> list[list[PlannedTensor]]:
        alike: dict[object, list[list[PlannedTensor]]] = {}
        filled: dict[object, int] = {}
        for tensor in tensors:
            dtypes = tuple(source.specs[tensor.name].dtype for source in self._sources(tensor))
            key = (tensor.role, tensor.spec.shape, tensor.rank, dtypes)
            size = self._bytes(tensor)
            most = self._most_bytes if self._on_device(tensor) else min(GROUP_BYTES, self._most_bytes)
            if key not in alike or filled[key] + size > most:
                alike.setdefault(key, []).append([])
                filled[key] = 0
            alike[key][-1].append(tensor)
            filled[key] += size
        return [group for groups in alike.values() for group in groups]

    def _on_device(self, tensor: PlannedTensor) -> bool:
        """Whether nothing has to be brought for this tensor."""
        if tensor.name in self._resident:
            return True
        sources = self._sources(tensor)
        return all(isinstance(one, StateDictSource) and one.devices[tensor.name] == self.device for one in sources)

    def _load_ahead(self, tensors: list[PlannedTensor]) -> tuple[Group, torch.cuda.Event | None]:
        if self._stream is None:
            return self.load(tensors), None
        with torch.no_grad(), torch.cuda.stream(self._stream):
            group = self.load(tensors)
            return group, self._stream.record_event()

    def _read(self, name: str) -> tuple[Tensor, list[Tensor]]:
        if name in self._resident:
            return self._resident[name]
        found = [source.read(name) for source in (self.base, *self.experts)]
        brought = sum(tensor.nbytes for tensor in found if tensor.device != self.device)
        if self.device_budget is None or brought == 0:
            return found[0].to(self.device), [tensor.to(self.device) for tensor in found[1:]]
        pinned = (tensor.contiguous().pin_memory() if tensor.device.type == "cpu" else tensor for tensor in found)
        base, *experts = (tensor.to(self.device, non_blocking=True) for tensor in pinned)
        if self._resident_bytes + brought <= self.device_budget // 4:
            self._resident[name] = (base, experts)
            self._resident_bytes += brought
        return base, experts

    def _sources(self, tensor: PlannedTensor) -> list[TensorSource]:
        """Who is read for a tensor."""
        sources = [self.base] if tensor.role == "copied" else [self.base, *self.experts]
        return [source for source in sources if tensor.name in source.specs]

    def _bytes(self, tensor: PlannedTensor) -> int:
        """Bytes read for a tensor: the base's and every expert's, each in its own dtype."""
        return sum(source.specs[tensor.name].nbytes for source in self._sources(tensor))

    def _refuse_non_finite(self, tensor: PlannedTensor, labelled: Iterable[tuple[str, Tensor]]) -> None:
        for label, content in labelled:
            bad = int((~torch.isfinite(content)).sum())
            if bad:
                raise InvalidInput(
                    f"{label}: tensor '{tensor.name}' holds NaN or Inf in {bad} of {content.numel()} elements"
                )
