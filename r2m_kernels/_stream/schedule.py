"""In what order and pieces a step passes over tensors: a list that is made first, and can be shown, and then run.

On a CPU tensors are spread over threads, one each. A backend that takes groups has a launch a group instead. A tensor
that takes more than its share of the memory is worked on in parts, where the step can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from .._interface import Pace
from ..config import MergeConfig
from . import budget
from .blocks import column_panels, runs
from .budget import Inputs, Memory
from .loader import Group, Loader
from .parallel import for_each, for_each_within, workers
from .plan import Plan, PlannedTensor, Role
from .processes import Journal, assign
from .stored import StoredMatrix

# Of some rows of left factors while they are multiplied: as they were kept, weighed, and those of all experts in one.
LEFT_COPIES = 3


@dataclass(frozen=True)
class Pass:
    """One way over the tensors, as it is known before any of them is read.

    Attributes:
        name: in events, report and journal.
        tensors: those it is for, largest first: the last thread to finish then has a small one in hand.
        block_elements: elements of which a part of a tensor holds a multiple, with the same bits as whole; ``None``
            where all of it is needed at once.
        base_of: roles whose base is read, beside the experts.
        pace: how a tensor is worked on where it is stored, from all inputs, how the memory is split, and the number of
            threads; ``None`` where it is loaded.
        reads: how often that reads its inputs.
        factors: bytes of low-rank factors that a row of a part is made with, and a column too; those of columns stay
            in memory while rows pass.
        workspace: bytes that a tensor takes beside its inputs and result where all of it is needed at once.
        by_factors: whether of a tensor the factors of its task vectors are enough.
        base_by_factors: whether the base's is needed beside them.
        passed_on: whether the step itself reads what it needs of a tensor, which is the base's alone.
        of_any_shape: whether it may be in a group with tensors of other shapes.
    """

    name: str
    tensors: Sequence[PlannedTensor]
    block_elements: Callable[[PlannedTensor], int | None] = lambda tensor: None
    base_of: tuple[Role, ...] = ("matrix", "vector")
    pace: Callable[[PlannedTensor, Inputs, Memory, int], Pace | None] = lambda *_: None
    reads: Callable[[PlannedTensor, Inputs, Pace], Fraction] = lambda *_: Fraction(1)
    factors: Callable[[PlannedTensor, Inputs], int] = lambda *_: 0
    workspace: Callable[[PlannedTensor, Inputs], int] = lambda *_: 0
    by_factors: Callable[[PlannedTensor], bool] = lambda tensor: False
    base_by_factors: bool = True
    passed_on: Callable[[PlannedTensor], bool] = lambda tensor: False
    of_any_shape: Callable[[PlannedTensor], bool] = lambda tensor: False

    def takes_base(self, tensor: PlannedTensor) -> bool:
        """Whether the base's tensor is read."""
        return tensor.role in self.base_of and (self.base_by_factors or not self.by_factors(tensor))

    def read_bytes(self, tensor: PlannedTensor, inputs: Inputs) -> int:
        """What is read of a tensor each time."""
        idle = tensor.factored and not self.takes_base(tensor)
        return inputs.nbytes(tensor) - (inputs.base.specs[tensor.name].nbytes if idle else 0)

    def working_bytes(self, tensor: PlannedTensor, inputs: Inputs) -> int:
        """What a tensor takes at once, where all of it is needed."""
        factors_alone = self.by_factors(tensor) and not self.base_by_factors
        taken = inputs.algebra_bytes(tensor) if factors_alone else inputs.working_bytes(tensor)
        return taken + self.workspace(tensor, inputs)

    def load(
        self,
        loader: Loader,
        tensors: Sequence[PlannedTensor],
        part: slice | None = None,
        columns: slice | None = None,
    ) -> Group:
        """What is needed of a group, or of a part of a single tensor."""
        first = tensors[0]
        if self.passed_on(first):
            return Group(tensors, part=part)
        with_base, factored = self.takes_base(first), self.by_factors(first)
        return loader.load(tensors, part, columns, with_base=with_base, factored=factored)


def shares(plan: Plan, passes: Sequence[Pass], inputs: Inputs, config: MergeConfig, processes: int) -> list[set[str]]:
    """Names of the tensors that each process works on, by what they cost over all passes."""
    uses = Counter(tensor.name for one in passes for tensor in one.tensors)
    return assign(budget.costs(plan.tensors, uses, inputs, config), processes)


def whole_bytes(passes: Sequence[Pass], inputs: Inputs) -> dict[str, int]:
    """What each tensor takes at most on passes that need all of it, by name."""
    most: dict[str, int] = {}
    for one in passes:
        for tensor in one.tensors:
            if one.block_elements(tensor) is None:
                most[tensor.name] = max(most.get(tensor.name, 0), one.working_bytes(tensor, inputs))
    return most


Found = Sequence[tuple[Sequence[PlannedTensor], Any]]


class Step:
    """What is done to tensors on a pass: from a group to a value for each, which journals and processes read.

    Attributes:
        over: the pass.
        journaled: values are written down, for a run that is cut off.
    """

    journaled = True

    def __init__(self, over: Pass) -> None:
        self.over = over

    def work(self, group: Group) -> Any:
        """What is found of a group's tensors, or of a part; it may still be on the device, which nobody waits for."""
        raise NotImplementedError

    def from_storage(self, tensor: PlannedTensor, inputs: Sequence[StoredMatrix], pace: Pace) -> Any:
        """What :meth:`work` finds of a tensor that is too large to be loaded; the base is the first of the inputs."""
        raise NotImplementedError

    def join(self, tensor: PlannedTensor, parts: list[Any]) -> Any:
        """What :meth:`work` finds of a tensor, from what it found of all its parts, in their order."""
        return None

    def settled(self, found: Found) -> list[Sequence[Any]]:
        """The values of each group's tensors, on the CPU, from what :meth:`work` found: one copy from the device.

        Raises:
            NotFinite: they show NaN or Inf.
        """
        return [[None] * len(tensors) for tensors, _ in found]

    def plain(self, value: Any) -> Any:
        """A value as a journal takes it."""
        return value

    def remembered(self, journal: Journal) -> Mapping[str, Any]:
        """Values of a former run that need not be worked out again."""
        return journal.known(self.over.name) if self.journaled else {}


@dataclass(frozen=True)
class Work:
    """What is worked on at once.

    Attributes:
        tensors: one, or a group of one shape.
        parts: runs of elements of a single tensor, spread over threads; empty: it is taken whole.
        columns: panels of columns that parts of whole rows are taken in, one after another; empty: all at once.
        shared: several such run at once, each on a thread of its own; else it has all threads for itself.
        pace: of a single tensor that is worked on where it is stored.
    """

    tensors: tuple[PlannedTensor, ...]
    parts: tuple[slice, ...] = ()
    columns: tuple[slice, ...] = ()
    shared: bool = False
    pace: Pace | None = None


def work_list(
    over: Pass,
    tensors: Sequence[PlannedTensor],
    inputs: Inputs,
    memory: Memory,
    threads: int,
    on_device: Callable[[PlannedTensor], bool] | None = None,
) -> list[Work]:
    """All that is done on a pass, in its order: tensors in parts, from storage, those that go alone, then the others.

    Args:
        over: the pass.
        tensors: of it, those that are left to do.
        inputs: their sizes.
        memory: of this process.
        threads: at work at once.
        on_device: for a backend that takes groups: whether a tensor's inputs are where it computes.
    """
    cuts = {tensor.name: _cut(over, tensor, inputs, memory, panels=on_device is None) for tensor in tensors}
    works = [cut for cut in cuts.values() if cut.parts]
    rest = [tensor for tensor in tensors if not cuts[tensor.name].parts]
    if on_device is not None:
        return works + [Work(tuple(group)) for group in _groups(over, rest, inputs, memory, on_device)]
    paces = {tensor.name: over.pace(tensor, inputs, memory, threads) for tensor in rest}
    works += [Work((tensor,), pace=paces[tensor.name]) for tensor in rest if paces[tensor.name] is not None]
    rest = [tensor for tensor in rest if paces[tensor.name] is None]
    alone = _alone(over, rest, inputs, memory, threads)
    works += [Work((tensor,)) for tensor in rest if tensor.name in alone]
    return works + [Work((tensor,), shared=True) for tensor in rest if tensor.name not in alone]


def _alone(over: Pass, tensors: Sequence[PlannedTensor], inputs: Inputs, memory: Memory, threads: int) -> set[str]:
    """Names of those that go alone, their own blocks being spread over the threads; the others run side by side.

    One that has more than a thread's share of the elements does. So do those that leave no room for another of their
    size, but for as many as one thread has time for while the others work on smaller ones, which fit beside them.
    """
    elements = sum(tensor.spec.numel for tensor in tensors)
    alone = {tensor.name for tensor in tensors if tensor.spec.numel * threads > elements}
    if threads == 1 or memory.flight is None:
        return alone
    sizes = {one.name: over.working_bytes(one, inputs) for one in tensors if one.name not in alone}
    large = [name for name, size in sizes.items() if 2 * size > memory.flight]
    small = [size for name, size in sizes.items() if name not in large]
    time = sum(small) // (threads - 1)  # of work, by the memory it takes
    for name in large:
        time -= sizes[name]
        if time < 0 or sizes[name] + max(small) > memory.flight:
            alone.add(name)
    return alone


def _cut(over: Pass, tensor: PlannedTensor, inputs: Inputs, memory: Memory, *, panels: bool) -> Work:
    """A tensor in parts, where it exceeds its share of the memory and can be cut.

    Args:
        over, tensor, inputs, memory: see :func:`work_list`.
        panels: whether parts may have some columns alone.
    """
    elements, block = tensor.spec.numel, over.block_elements(tensor)
    too_large = memory.piece is not None and inputs.working_bytes(tensor) > memory.piece
    if not too_large or block is None or not inputs.in_parts(tensor):
        return Work((tensor,))
    assert memory.piece is not None
    columns: tuple[slice, ...] = ()
    if (factors := over.factors(tensor, inputs)) and panels and inputs.in_blocks(tensor):
        found = column_panels(tensor.matrix_shape[1], _room(memory) // 2 // factors)
        columns = tuple(found) if len(found) > 1 else ()
    length = max(1, memory.piece // _part_bytes(over, tensor, inputs, block, columns)) * block
    if length >= elements and not columns:
        return Work((tensor,))
    return Work((tensor,), parts=tuple(runs(elements, length)), columns=columns)


def _room(memory: Memory) -> int:
    """Bytes for what is at work on a tensor in parts."""
    return memory.stored or memory.flight or 0


def _widest(tensor: PlannedTensor, columns: Sequence[slice]) -> int:
    """Columns of the widest panel."""
    return max((panel.stop - panel.start for panel in columns), default=tensor.matrix_shape[1])


def _part_bytes(over: Pass, tensor: PlannedTensor, inputs: Inputs, elements: int, columns: Sequence[slice]) -> int:
    """What a part takes that has so many elements, or some columns of them."""
    size, factors = inputs.working_bytes(tensor) * elements // tensor.spec.numel, over.factors(tensor, inputs)
    if factors:
        n = tensor.matrix_shape[1]
        size = size * _widest(tensor, columns) // n + LEFT_COPIES * factors * elements // n
    return max(1, size)


def _groups(
    over: Pass,
    tensors: Sequence[PlannedTensor],
    inputs: Inputs,
    memory: Memory,
    on_device: Callable[[PlannedTensor], bool],
) -> list[list[PlannedTensor]]:
    alike: dict[object, list[list[PlannedTensor]]] = {}
    filled: dict[object, int] = {}
    for tensor in tensors:
        dtypes = tuple(source.specs[tensor.name].dtype for source in inputs.read_for(tensor))
        shape = None if over.of_any_shape(tensor) else (tensor.spec.shape, tensor.rank)
        key = (tensor.role, shape, dtypes, tensor.change_ranks)
        size = inputs.nbytes(tensor)
        most = memory.group if on_device(tensor) else min(budget.GROUP_BYTES, memory.group)
        if key not in alike or filled[key] + size > most:
            alike.setdefault(key, []).append([])
            filled[key] = 0
        alike[key][-1].append(tensor)
        filled[key] += size
    return [group for groups in alike.values() for group in groups]


Done = Iterator[tuple[Sequence[PlannedTensor], Any]]


def run_on_threads(works: Sequence[Work], step: Step, loader: Loader, memory: Memory) -> Done:
    """Tensors with what was found, one after the other, several at work at once."""
    ahead = budget.AHEAD * workers() if loader.device.type == "cpu" else 1
    for work in works:
        if work.parts:
            yield work.tensors, _in_parts(work, step, loader, memory, ahead)
        elif work.pace is not None:
            (tensor,) = work.tensors
            yield work.tensors, step.from_storage(tensor, loader.stored(tensor), work.pace)
        elif not work.shared:
            yield work.tensors, step.work(step.over.load(loader, work.tensors))
    shared = [work for work in works if work.shared]
    sizes = [step.over.working_bytes(work.tensors[0], loader.inputs) for work in shared]
    limit = ahead if memory.flight is None else max(1, min(ahead, memory.flight // max([1, *sizes])))

    def done(work: Work) -> Any:
        return step.work(step.over.load(loader, work.tensors))

    if memory.flight is None or limit >= min(ahead, workers()):
        each = for_each(done, shared, limit)
    else:
        each = for_each_within(done, shared, sizes, memory.flight)
    yield from zip((work.tensors for work in shared), each, strict=True)


def run_in_groups(works: Sequence[Work], step: Step, loader: Loader, memory: Memory) -> Done:
    """Groups with what was found; the next one is loaded while one is worked on."""
    for work in works:
        if work.parts:
            yield work.tensors, _in_parts(work, step, loader, memory, ahead=1)
    groups = [work.tensors for work in works if not work.parts]

    def ahead(group: Sequence[PlannedTensor]) -> tuple[Group, torch.cuda.Event | None]:
        return loader.ahead(lambda: step.over.load(loader, group))

    with ThreadPoolExecutor(1, "r2m-load") as pool:
        waiting = [pool.submit(ahead, group) for group in groups[:1]]
        for index in range(len(groups)):
            group, ready = waiting.pop().result()
            if index + 1 < len(groups):
                waiting.append(pool.submit(ahead, groups[index + 1]))
            loader.await_group(group, ready)
            yield group.tensors, step.work(group)


def _in_parts(work: Work, step: Step, loader: Loader, memory: Memory, ahead: int) -> Any:
    """What is found of one tensor from its parts, which are spread over threads."""
    (tensor,), inputs = work.tensors, loader.inputs
    if tensor.name in loader.kept:
        loader.whole(tensor, inputs.sources)
    # A block may take more than a thread's share: then fewer parts are begun at once.
    first = work.parts[0]
    size = _part_bytes(step.over, tensor, inputs, first.stop - first.start, work.columns)
    assert memory.flight is not None
    factors = step.over.factors(tensor, inputs)
    beside = factors * _widest(tensor, work.columns) if factors else 0
    limit = max(1, min(ahead, min(memory.flight, _room(memory) - beside) // size))

    def found(columns: slice | None) -> Iterator[Any]:
        return for_each(lambda part: step.work(step.over.load(loader, [tensor], part, columns)), work.parts, limit)

    return step.join(tensor, [value for columns in work.columns or (None,) for value in found(columns)])
