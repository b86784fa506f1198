"""Carries a step over all tensors: reads them, moves them to the device, spreads or groups the work.

On a CPU tensors are spread over threads, one each. The Triton backend takes groups of one shape instead, a launch a
group; on a GPU the next group is read and copied, through pinned memory and on a stream of its own, while the kernels
work on this one. Inputs that fit stay in memory for the steps that follow; a tensor that takes more than its share of
the budget is worked on in parts. In a team of processes each one does this with tensors of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import gram
from .._backends import Backend
from ..config import MergeConfig
from ..errors import NotFinite, R2MError, quoted
from . import budget as planning
from .compatibility import Plan, PlannedTensor
from .parallel import for_each, workers
from .processes import Journal, NoJournal, ProcessGroup, SingleProcess, assign
from .tensors import PartialSource, StateDictSource, TensorSource

# Bytes of inputs in one group, where no budget says less. What comes from elsewhere waits in pinned memory, which is
# slow to get and to be had twice; what is on the device already can be taken in few launches, each of which costs the
# host more time than a small group costs the GPU.
GROUP_BYTES = 2**28
DEVICE_GROUP_BYTES = 2**31
# Bytes of a tensor looked at together in search of NaN.
WINDOW = 2**24
# Of the device memory free at the start, what the merge takes unless it is told.
DEVICE_SHARE = 0.8


@dataclass(frozen=True)
class ProgressEvent:
    """More tensors done: one, or a group on the Triton backend.

    ``step`` is "task Gram", "truncation" or "combination"; counts are of that step, and in a team of processes of what
    falls to this one.
    """

    step: str
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int


Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class StepRecord:
    """What a step cost: wall seconds, and bytes that all processes read of the inputs."""

    step: str
    seconds: float
    bytes_read: int


@dataclass(frozen=True)
class Group:
    """Tensors of one role, shape and rank with their inputs on the device; no inputs for roles that are not computed.

    Attributes:
        bases: L tensors.
        experts: N lists of L tensors.
        part: the elements of a single tensor that this is about, its inputs then being runs of those; ``None``: all.
    """

    tensors: list[PlannedTensor]
    bases: list[Tensor] = field(default_factory=list)
    experts: list[list[Tensor]] = field(default_factory=list)
    part: slice | None = None

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
        return Group([self.tensors[index]], [base], [[expert] for expert in experts], self.part)


# A step: from a group to a plain value for each of its tensors, which the journal and other processes understand.
Step = Callable[[Group], Sequence[Any]]


@dataclass(frozen=True)
class Cut:
    """How a step takes a tensor in parts, with the same bits as whole.

    Attributes:
        granule: elements of which a part holds a multiple; ``None`` where the tensor cannot be cut.
        join: the tensor's value from its parts' values, in their order.
    """

    granule: Callable[[PlannedTensor], int | None]
    join: Callable[[PlannedTensor, list[Any]], Any]


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
        config: MergeConfig,
        team: ProcessGroup | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.base, self.experts, self.device, self.backend = base, experts, device, backend
        self.team, self.journal = team or SingleProcess(), journal or NoJournal()
        self._exact = config.svd == "exact"
        self.steps: dict[str, StepRecord] = {}
        self._grouped = backend.name == "triton"
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self._read_bytes = 0
        costs = {t.name: planning.cost(t, config, self._bytes(t), len(experts)) for t in plan.tensors}
        self._hand = assign(costs, self.team.size)[self.team.member]
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
        threads = workers() if device.type == "cpu" else 1
        self._ahead = planning.AHEAD * threads if device.type == "cpu" else 1
        mine = [tensor for tensor in plan.tensors if tensor.name in self._hand]
        self.shares = None if budget is None else planning.shares(budget, mine, self._bytes, len(experts), threads)
        # Low-rank factors that will not fit.
        needed = sum(planning.factor_bytes(tensor, len(experts)) for tensor in mine) if config.eta != 0 else 0
        self.spill = 0 if self.shares is None else needed - self.shares.factors
        # On a device, what stays there is bounded by its own memory. What is there already takes none.
        keep = 0 if self.shares is None else self.shares.kept
        if self.device_budget is not None:
            keep = self.device_budget // 4
        brought = [tensor for tensor in mine if not self._in_place(tensor)]
        self._to_keep = planning.kept(keep, brought, self._bytes)

    def owns(self, tensor: PlannedTensor) -> bool:
        """Whether this member of the team works on a tensor."""
        return tensor.name in self._hand

    def load(self, tensors: list[PlannedTensor], part: slice | None = None) -> Group:
        """A group's inputs on the device, or a part of a single tensor's; roles that are not computed come without."""
        if tensors[0].role not in ("matrix", "vector"):
            return Group(tensors, part=part)
        if part is not None:
            base, *others = self._read_part(tensors[0], part)
            return Group(tensors, [base], [[other] for other in others], part)
        loaded = [self._read(tensor) for tensor in tensors]
        experts = [[others[j] for _, others in loaded] for j in range(len(self.experts))]
        return Group(tensors, [base for base, _ in loaded], experts)

    def read(self, source: TensorSource, tensor: PlannedTensor, part: slice | None = None) -> Tensor:
        """One input of a tensor, or a run of its elements; counted."""
        if part is None:
            found = source.read(tensor.name)
        else:
            assert isinstance(source, PartialSource)
            found = source.read_elements(tensor.name, part.start, part.stop)
        with self._lock:
            self._read_bytes += found.nbytes
        return found

    def mean_of_experts(self, tensor: PlannedTensor, weights: Tensor, part: slice | None = None) -> Tensor:
        """Weighted mean of the experts' tensors: θ₀ plus rounded differences could turn a variance negative.

        Args:
            tensor: what to read.
            weights: (N,) w, summing to 1.
            part: which elements; ``None``: all, in the tensor's shape.

        Returns:
            float64 on the CPU.
        """
        shape = tensor.spec.shape if part is None else (part.stop - part.start,)
        total = torch.zeros(shape, dtype=torch.float64)
        for weight, source in zip((weights * len(weights)).tolist(), self.experts, strict=True):
            total += self.read(source, tensor, part).to("cpu", torch.float64) * weight
        return total / len(self.experts)

    def grams(self, tensors: list[PlannedTensor], progress: Progress | None) -> dict[str, Tensor]:
        """Step 1; refuses NaN and Inf, which a Gram matrix cannot hide.

        Returns:
            (N, N) float64 for each matrix and vector tensor.
        """
        operators = self.backend.operators

        def precise(tensor: PlannedTensor) -> bool:
            return self._exact or tensor.role != "matrix" or tensor.full_rank

        def granule(tensor: PlannedTensor) -> int:
            return operators.gram_elements(precise(tensor))

        def work(group: Group) -> list[Any]:
            first = group.tensors[0]
            if not group.bases:
                for tensor in group.tensors:
                    self._refuse_non_finite(tensor, group.part)
                return [None] * len(group.tensors)
            if group.part is not None:
                panels = gram.panel_grams(*group.inputs(0), operators, precise=precise(first), panel=granule(first))
                return [panels.tolist()]
            found = gram.task_grams(group.bases, group.experts, operators, precise=precise(first))
            return [self._finite(*of_tensor).tolist() for of_tensor in zip(group.tensors, found, strict=True)]

        def join(tensor: PlannedTensor, panels: list[Any]) -> Any:
            if tensor.role not in ("matrix", "vector"):
                return None
            whole = gram.from_panels(torch.tensor([one for found in panels for one in found], dtype=torch.float64))
            return self._finite(tensor, whole).tolist()

        found = self.over("task Gram", tensors, work, progress, cut=Cut(granule, join), resume=True)
        return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in found.items() if rows is not None}

    def over(
        self,
        step: str,
        tensors: list[PlannedTensor],
        function: Step,
        progress: Progress | None,
        *,
        cut: Cut | None = None,
        resume: bool = False,
        known: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Apply a step to every tensor, group by group.

        Args:
            step: its name in events, report and journal.
            tensors: largest first.
            function: gives a plain value for each tensor of its group.
            progress: told of every tensor.
            cut: how tensors are cut that take more than their share of the budget; ``None``: none is.
            resume: write values down in the journal, and take those it has instead of working them out again.
            known: values that are taken instead, where not all of the journal's can be; others are written down.

        Returns:
            The values of all tensors, whoever of the team worked on them.
        """
        start, read_before = time.perf_counter(), self._read_bytes
        remembered = dict(known or {})
        if resume:
            remembered.update(self.journal.known(step))
        found = {tensor.name: remembered[tensor.name] for tensor in tensors if tensor.name in remembered}
        mine = [tensor for tensor in tensors if self.owns(tensor) and tensor.name not in found]
        total = sum(self._bytes(tensor) for tensor in mine)
        done = count = 0
        work = self._in_groups if self._grouped else self._on_threads
        trouble: Exception | None = None
        try:
            for group, values in work(mine, function, cut):
                for tensor, value in zip(group, values, strict=True):
                    found[tensor.name] = value
                    if resume or known is not None:
                        self.journal.record(step, tensor.name, value)
                    done, count = done + self._bytes(tensor), count + 1
                if progress is not None:
                    progress(ProgressEvent(step, count, len(mine), done, total))
        except (R2MError, OSError) as error:
            trouble = error
        read = self._read_bytes - read_before
        found = self.team.gather(found, trouble)
        read = sum(self.team.gather({str(self.team.member): read}).values())
        self.steps[step] = StepRecord(step, time.perf_counter() - start, read)
        return found

    def _on_threads(
        self, tensors: list[PlannedTensor], function: Step, cut: Cut | None
    ) -> Iterator[tuple[list[PlannedTensor], Sequence[Any]]]:
        """One tensor at a time, several at once; a tensor too large for one thread's share goes alone.

        Alone means that its own blocks are spread over the threads instead, or its parts where it exceeds its share of
        the memory; the result is the same to the bit.
        """
        parts = self._all_parts(tensors, cut)
        yield from self._in_parts(tensors, parts, function, cut)
        tensors = [tensor for tensor in tensors if tensor.name not in parts]
        elements = sum(tensor.spec.numel for tensor in tensors)
        alone = [tensor for tensor in tensors if tensor.spec.numel * workers() > elements]
        shared = [tensor for tensor in tensors if tensor.spec.numel * workers() <= elements]

        def work(tensor: PlannedTensor) -> Sequence[Any]:
            return function(self.load([tensor]))

        for tensor in alone:
            yield [tensor], work(tensor)
        limit = self._ahead
        if self.shares is not None:
            largest = max((self._working_bytes(tensor) for tensor in shared), default=1)
            limit = max(1, min(limit, self.shares.flight // max(1, largest)))
        for tensor, found in zip(shared, for_each(work, shared, limit), strict=True):
            yield [tensor], found

    def _in_parts(
        self,
        tensors: list[PlannedTensor],
        parts: Mapping[str, list[slice]],
        function: Step,
        cut: Cut | None,
    ) -> Iterator[tuple[list[PlannedTensor], Sequence[Any]]]:
        """The tensors that are cut, one after the other, their parts spread over threads."""
        for tensor in tensors:
            if cut is None or tensor.name not in parts:
                continue

            if tensor.name in self._to_keep:
                self._read(tensor)

            def work(part: slice, tensor: PlannedTensor = tensor) -> Any:
                (value,) = function(self.load([tensor], part))
                return value

            # A granule may take more than a thread's share: then fewer parts are begun at once.
            first = parts[tensor.name][0]
            size = self._working_bytes(tensor) * (first.stop - first.start) // tensor.spec.numel
            assert self.shares is not None
            limit = max(1, min(self._ahead, self.shares.flight // max(1, size)))
            yield [tensor], [cut.join(tensor, list(for_each(work, parts[tensor.name], limit)))]

    def _all_parts(self, tensors: list[PlannedTensor], cut: Cut | None) -> dict[str, list[slice]]:
        """Runs of elements for each tensor that exceeds its share of the budget and can be cut."""
        if cut is None or self.shares is None:
            return {}
        found = {}
        for tensor in tensors:
            size, granule = self._working_bytes(tensor), cut.granule(tensor)
            partial = all(isinstance(source, PartialSource) for source in self._sources(tensor))
            if size <= self.shares.piece or granule is None or not partial:
                continue
            elements = tensor.spec.numel
            step = max(1, elements * self.shares.piece // size // granule) * granule
            if step < elements:
                found[tensor.name] = [slice(i, min(i + step, elements)) for i in range(0, elements, step)]
        return found

    def _in_groups(
        self, tensors: list[PlannedTensor], function: Step, cut: Cut | None
    ) -> Iterator[tuple[list[PlannedTensor], Sequence[Any]]]:
        """Tensors of one shape together; the next group is loaded while one is worked on."""
        parts = self._all_parts(tensors, cut)
        yield from self._in_parts(tensors, parts, function, cut)
        groups = self._groups([tensor for tensor in tensors if tensor.name not in parts])
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
        return tensor.name in self._kept or self._in_place(tensor)

    def _in_place(self, tensor: PlannedTensor) -> bool:
        """Whether all inputs of a tensor are in the device's memory without our doing."""
        sources = self._sources(tensor)
        return all(isinstance(one, StateDictSource) and one.devices[tensor.name] == self.device for one in sources)

    def _load_ahead(self, tensors: list[PlannedTensor]) -> tuple[Group, torch.cuda.Event | None]:
        if self._stream is None:
            return self.load(tensors), None
        with torch.no_grad(), torch.cuda.stream(self._stream):
            group = self.load(tensors)
            return group, self._stream.record_event()

    @property
    def _all(self) -> list[TensorSource]:
        return [self.base, *self.experts]

    def _read(self, tensor: PlannedTensor) -> tuple[Tensor, list[Tensor]]:
        if tensor.name in self._kept:
            return self._kept[tensor.name]
        found = [self.read(source, tensor) for source in self._all]
        if self.device_budget is not None:
            found = [one.contiguous().pin_memory() if one.device.type == "cpu" else one for one in found]
        base, *experts = (one.to(self.device, non_blocking=self.device_budget is not None) for one in found)
        if tensor.name in self._to_keep:
            self._kept[tensor.name] = (base, experts)
        return base, experts

    def _read_part(self, tensor: PlannedTensor, part: slice) -> list[Tensor]:
        if tensor.name in self._to_keep:
            base, experts = self._kept[tensor.name]
            return [one.reshape(-1)[part] for one in (base, *experts)]
        return [self.read(source, tensor, part).to(self.device) for source in self._all]

    def _sources(self, tensor: PlannedTensor) -> list[TensorSource]:
        """Who is read for a tensor."""
        sources = [self.base] if tensor.role == "copied" else [self.base, *self.experts]
        return [source for source in sources if tensor.name in source.specs]

    def _bytes(self, tensor: PlannedTensor) -> int:
        """Bytes read for a tensor: the base's and every expert's, each in its own dtype."""
        return sum(source.specs[tensor.name].nbytes for source in self._sources(tensor))

    def _working_bytes(self, tensor: PlannedTensor) -> int:
        return planning.working_bytes(tensor, self._bytes(tensor))

    def _finite(self, tensor: PlannedTensor, result: Tensor) -> Tensor:
        """A Gram matrix as it is, or why it holds NaN or Inf."""
        if not bool(torch.isfinite(result).all()):
            self._refuse_non_finite(tensor)
            raise NotFinite(
                f"tensor {quoted(tensor.name)}: the differences from the base are too large to be squared and summed"
            )
        return result

    def _refuse_non_finite(self, tensor: PlannedTensor, part: slice | None = None) -> None:
        """Name the first input that holds NaN or Inf; looking for it only in a ``part`` if one is given."""
        size, step = tensor.spec.numel, max(1, WINDOW // tensor.spec.dtype.itemsize)
        windows = [slice(i, min(i + step, size)) for i in range(0, size, step)]
        for source in self.experts if tensor.role == "extra" else self._all:
            everywhere = windows if isinstance(source, PartialSource) else [None]
            if self._bad(source, tensor, everywhere if part is None else [part]):
                bad = self._bad(source, tensor, everywhere)
                raise NotFinite(
                    f"{source.label}: tensor {quoted(tensor.name)} holds NaN or Inf in {bad} of {size} elements"
                )

    def _bad(self, source: TensorSource, tensor: PlannedTensor, parts: Sequence[slice | None]) -> int:
        return sum(int((~torch.isfinite(self.read(source, tensor, part))).sum()) for part in parts)
