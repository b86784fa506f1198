"""Brings the inputs of tensors to where they are computed with: whole, in parts, or groups of one shape.

On a GPU the next group is read and copied, through a ring of pinned memory and on a stream of its own, while kernels
work on this one, and results go back the same way. Inputs that fit stay in memory for the steps that follow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import NotFinite, quoted
from .budget import Inputs
from .plan import PlannedTensor
from .ring import RING_BYTES, Piece, Ring
from .state_dicts import StateDictSink, StateDictSource
from .stored import StoredMatrix
from .tensors import (
    BlockSource,
    DirectSource,
    LowRankSource,
    PartialSink,
    PartialSource,
    TensorSink,
    TensorSource,
    compute_dtype,
)

# Bytes of a tensor looked at together in search of NaN.
WINDOW = 2**24


@dataclass(frozen=True)
class Group:
    """Tensors of one role with their inputs on the device; without them where the base is copied.

    They are of one shape and rank, but where the pass takes groups of any.

    Attributes:
        bases: L tensors; none of extras.
        experts: N lists of L tensors.
        part: the elements of a single tensor that this is about, its inputs then being runs of those; ``None``: all.
        columns: of a part of whole rows some columns, its inputs then being blocks of those; ``None``: all.
        factored: the experts' are factors of whole task vectors, as :meth:`LowRankSource.read_change` has them.
    """

    tensors: Sequence[PlannedTensor]
    bases: list[Tensor] = field(default_factory=list)
    experts: list[list[Tensor]] = field(default_factory=list)
    part: slice | None = None
    columns: slice | None = None
    factored: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the tensors are computed in; all of a group have the same dtypes."""
        return compute_dtype([*self.bases[:1], *(expert[0] for expert in self.experts)])

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [tensor.name for tensor in self.tensors]

    @property
    def rows(self) -> slice | None:
        """Which rows of a matrix a part of whole rows has; ``None``: all."""
        if self.part is None:
            return None
        columns = self.tensors[0].matrix_shape[1]
        return slice(self.part.start // columns, self.part.stop // columns)

    @property
    def width(self) -> int:
        """How many columns a part of whole rows has."""
        return self.tensors[0].matrix_shape[1] if self.columns is None else self.columns.stop - self.columns.start

    def inputs(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """One tensor's: the base's and the experts'."""
        return self.bases[index], [expert[index] for expert in self.experts]

    def some(self, places: Sequence[int]) -> Group:
        """A group of the tensors at some places, with their inputs."""
        if len(places) == len(self.tensors):
            return self
        return replace(
            self,
            tensors=[self.tensors[place] for place in places],
            bases=[self.bases[place] for place in places if self.bases],
            experts=[[expert[place] for place in places] for expert in self.experts],
        )

    def of_one_shape(self) -> list[Group]:
        """As groups of one shape and rank each."""
        places: dict[object, list[int]] = {}
        for place, tensor in enumerate(self.tensors):
            places.setdefault((tensor.spec.shape, tensor.rank), []).append(place)
        return [self.some(each) for each in places.values()]

    def in_rows(self, outs: Sequence[Tensor]) -> tuple[Group, Sequence[Tensor]]:
        """A part of a matrix, which is whole rows then, and what is written of it, as rows; whole ones as they are."""
        if self.part is None:
            return self, outs
        base, experts = self.inputs(0)
        rows = [[expert.view(-1, self.width)] for expert in experts]
        group = replace(self, bases=[base.view(-1, self.width)], experts=rows)
        return group, [out.view(-1, self.width) for out in outs]


class Loader:
    """Reads tensors and moves them to the device.

    Attributes:
        inputs: the checkpoints.
        device: where tensors go.
        read_bytes: how many were read so far.
        kept: tensors whose inputs stay in memory once they are loaded; set when the memory is split.
        ring_bytes: of pinned memory at most; set then, too.
    """

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self.inputs, self.device = inputs, device
        self.read_bytes = 0
        self.kept: frozenset[str] = frozenset()
        self._at_hand: dict[str, list[Tensor]] = {}
        self._lock = threading.Lock()
        self.ring_bytes = RING_BYTES
        self._made_ring: Ring | None = None
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        # Other GPUs that lend inputs.
        named = [source.devices for source in inputs.sources if isinstance(source, StateDictSource)]
        lent = {place for devices in named for place in devices.values() if place.type == "cuda"}
        self._lenders = sorted(lent - {device}, key=str)

    def await_lenders(self) -> None:
        """Wait for the caller's streams on other GPUs, of which the threads that copy from there know nothing."""
        for lender in self._lenders:
            torch.cuda.current_stream(lender).synchronize()

    def await_kernels(self) -> None:
        """Wait for the caller's stream: whoever goes on with what it left may do so on another."""
        if self._on_gpu:
            torch.cuda.current_stream(self.device).synchronize()

    @property
    def _ring(self) -> Ring:
        with self._lock:  # one thread brings inputs, another gives results back
            if self._made_ring is None:
                self._made_ring = Ring(self.device, self.ring_bytes)
            return self._made_ring

    def await_given(self) -> None:
        """Wait until sinks have what they were given; raises what went wrong there."""
        if self._made_ring is not None:
            self._made_ring.finish()

    def load(
        self,
        tensors: Sequence[PlannedTensor],
        part: slice | None = None,
        columns: slice | None = None,
        *,
        with_base: bool = True,
        factored: bool = False,
    ) -> Group:
        """A group's inputs on the device, or a part of a single tensor's.

        Args:
            part, columns: of :class:`Group`.
            with_base: whether the base's are among them.
            factored: whether the experts' come as factors, whole ones of a part too.
        """
        if factored:
            own = [self.inputs.base] if with_base else []
            read = self._loaded(tensors, own, part, columns)
            changes = [[self._change(source, one) for one in tensors] for source in self.inputs.experts]
            bases = [base for bases in read for base in bases]
            return Group(tensors, bases, changes, part, columns, factored=True)
        sources = self.inputs.sources if with_base else self.inputs.experts
        loaded = self._loaded(tensors, sources, part, columns)
        of_sources = [list(of_source) for of_source in zip(*loaded, strict=True)]
        return Group(tensors, of_sources.pop(0) if with_base else [], of_sources, part, columns)

    def _change(self, source: TensorSource, tensor: PlannedTensor) -> Tensor:
        """The factors of one task vector, on the device."""
        assert isinstance(source, LowRankSource)
        change = source.read_change(tensor.name)
        self._count(change)
        if not self._on_gpu:
            return change
        target = torch.empty(change.shape, dtype=change.dtype, device=self.device)
        flat = change.reshape(-1)
        self._ring.bring(self._pieces(target, lambda start, out: out.copy_(flat[start : start + out.numel()])))
        return target

    def ahead(self, load: Callable[[], Group]) -> tuple[Group, torch.cuda.Event | None]:
        """A group, and the event after which kernels may use it."""
        if self._stream is None:
            return load(), None
        with torch.no_grad(), torch.cuda.stream(self._stream):
            return load(), self._stream.record_event()

    def await_group(self, group: Group, ready: torch.cuda.Event | None) -> None:
        """Let the kernels that follow wait for what :meth:`ahead` copies."""
        if ready is None:
            return
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(ready)
        for index, planned in enumerate(group.tensors):
            if not self.in_place(planned):  # the memory of what was brought is not reused before these kernels are done
                for tensors in (group.bases, *group.experts):
                    for tensor in tensors[index : index + 1]:
                        tensor.record_stream(compute)

    def whole(self, tensor: PlannedTensor, sources: Sequence[TensorSource]) -> list[Tensor]:
        """Each source's tensor on the device; of one that is kept all sources are asked for."""
        return self._loaded([tensor], sources, None, None)[0]

    def _loaded(
        self,
        tensors: Sequence[PlannedTensor],
        sources: Sequence[TensorSource],
        part: slice | None,
        columns: slice | None,
    ) -> list[list[Tensor]]:
        """Each tensor's inputs on the device; what has to be brought is brought together."""
        pieces: list[Piece] = []
        loaded = []
        for tensor in tensors:
            inputs = self._at_hand_of(tensor, part, columns)
            if inputs is None:
                inputs = [self._input(source, tensor, part, columns, pieces) for source in sources]
            loaded.append(inputs)
        if pieces:
            self._ring.bring(pieces)
        if part is None:
            named = zip(tensors, loaded, strict=True)
            self._at_hand.update({tensor.name: inputs for tensor, inputs in named if tensor.name in self.kept})
        return loaded

    def _at_hand_of(self, tensor: PlannedTensor, part: slice | None, columns: slice | None) -> list[Tensor] | None:
        """A tensor's inputs where they are kept, or parts of them."""
        known = self._at_hand.get(tensor.name)
        if known is None or part is None:
            return known
        if columns is None:
            return [one.reshape(-1)[part] for one in known]
        n = tensor.matrix_shape[1]
        rows = slice(part.start // n, part.stop // n)
        return [one.reshape(-1, n)[rows, columns].contiguous() for one in known]

    def _input(
        self,
        source: TensorSource,
        tensor: PlannedTensor,
        part: slice | None,
        columns: slice | None,
        pieces: list[Piece],
    ) -> Tensor:
        """One input on the device: there already, or filled when the ``pieces`` that are added have been brought."""
        if part is not None and columns is not None:
            n = tensor.matrix_shape[1]
            return self._read_block(source, tensor, slice(part.start // n, part.stop // n), columns)
        if not self._on_gpu:
            return self.read(source, tensor, part).to(self.device)
        name, spec = tensor.name, source.specs[tensor.name]
        first = 0 if part is None else part.start
        elements = spec.numel if part is None else part.stop - part.start
        if isinstance(source, StateDictSource) and source.devices[name].type != "cpu":
            return self.read(source, tensor, part).to(self.device, non_blocking=True)
        target = torch.empty(spec.shape if part is None else elements, dtype=spec.dtype, device=self.device)
        if isinstance(source, DirectSource) and source.in_blocks(name):

            def fill(start: int, out: Tensor) -> None:
                source.read_into(name, first + start, out)
                self._count(out)

        elif isinstance(source, StateDictSource):

            def fill(start: int, out: Tensor) -> None:
                out.copy_(source.read_elements(name, first + start, first + start + out.numel()))
                self._count(out)

        else:  # whatever it costs to read some of it
            whole = self.read(source, tensor, part).reshape(-1)

            def fill(start: int, out: Tensor) -> None:
                out.copy_(whole[start : start + out.numel()])

        pieces += self._pieces(target, fill)
        return target

    def _pieces(self, target: Tensor, host: Callable[[int, Tensor], object]) -> list[Piece]:
        """A contiguous tensor on the device by slots of the ring; ``host`` is told where a run starts."""
        flat, step = target.view(-1), self._ring.slot_bytes // target.dtype.itemsize
        return [Piece(flat[start : start + step], partial(host, start)) for start in range(0, flat.numel(), step)]

    def give(self, sink: TensorSink, outputs: Sequence[tuple[str, Tensor]], start: int | None = None) -> None:
        """Hand merged tensors to a sink, through the ring where they leave a GPU; :meth:`await_given` waits for that.

        Args:
            sink: who takes them.
            outputs: names, and tensors or, flat, runs of their elements.
            start: of runs the first element.
        """
        pieces: list[Piece] = []
        for name, tensor in outputs:
            leaves = not isinstance(sink, StateDictSink) or sink.device_of(name).type == "cpu"
            through = self._on_gpu and tensor.device == self.device and tensor.numel() > 0
            if through and leaves and isinstance(sink, PartialSink):
                pieces += self._pieces(tensor, partial(_write_run, sink, name, start or 0))
            elif start is None:
                sink.write(name, tensor)
            else:
                assert isinstance(sink, PartialSink)
                sink.write_elements(name, start, tensor)
        if pieces:
            self._ring.give_back(pieces)

    def read(self, source: TensorSource, tensor: PlannedTensor, part: slice | None = None) -> Tensor:
        """One input of a tensor, or a run of its elements; counted."""
        if part is None:
            read = source.read(tensor.name)
        else:
            assert isinstance(source, PartialSource)
            read = source.read_elements(tensor.name, part.start, part.stop)
        self._count(read)
        return read

    def _count(self, read: Tensor) -> None:
        with self._lock:
            self.read_bytes += read.nbytes

    def stored(self, tensor: PlannedTensor) -> list[StoredMatrix]:
        """The inputs of a matrix where they are stored, the base's and the experts'."""

        def of_source(source: TensorSource) -> StoredMatrix:
            read = partial(self._read_block, source, tensor)
            return StoredMatrix(tensor.matrix_shape, source.specs[tensor.name].dtype, self.device, read)

        return list(map(of_source, self.inputs.sources))

    def _read_block(self, source: TensorSource, tensor: PlannedTensor, rows: slice, columns: slice) -> Tensor:
        n, count, length = tensor.matrix_shape[1], rows.stop - rows.start, columns.stop - columns.start
        if length == n:
            return self.read(source, tensor, slice(rows.start * n, rows.stop * n)).view(count, n).to(self.device)
        if not isinstance(source, BlockSource):
            runs = (slice(row * n + columns.start, row * n + columns.stop) for row in range(rows.start, rows.stop))
            return torch.stack([self.read(source, tensor, run) for run in runs]).to(self.device)
        block = source.read_block(tensor.name, rows.start * n + columns.start, length, n, count)
        self._count(block)
        return block.to(self.device)

    @property
    def lends(self) -> bool:
        """Whether what is read of the base is its owner's, who does not want it written to."""
        return isinstance(self.inputs.base, StateDictSource)

    def on_device(self, tensor: PlannedTensor) -> bool:
        """Whether nothing has to be brought for this tensor."""
        return tensor.name in self._at_hand or self.in_place(tensor)

    def in_place(self, tensor: PlannedTensor) -> bool:
        """Whether all inputs of a tensor are in the device's memory without our doing."""
        return all(
            isinstance(source, StateDictSource) and source.devices[tensor.name] == self.device
            for source in self.inputs.read_for(tensor)
        )

    def refuse_non_finite(self, tensor: PlannedTensor, part: slice | None = None) -> None:
        """Name the first input that holds NaN or Inf; looking for it only in a ``part`` if one is given.

        Raises:
            NotFinite: there is one.
        """
        for source in self.inputs.experts if tensor.role == "extra" else self.inputs.sources:
            everywhere = list(_windows(tensor)) if isinstance(source, PartialSource) else [None]
            if self._non_finite(source, tensor, everywhere if part is None else [part]):
                count = self._non_finite(source, tensor, everywhere)
                raise NotFinite(
                    f"{source.label}: tensor {quoted(tensor.name)} holds NaN or Inf in {count} of "
                    f"{tensor.spec.numel} elements"
                )

    def _non_finite(self, source: TensorSource, tensor: PlannedTensor, parts: Sequence[slice | None]) -> int:
        return sum(int((~torch.isfinite(self.read(source, tensor, part))).sum()) for part in parts)


def _write_run(sink: PartialSink, name: str, first: int, start: int, elements: Tensor) -> None:
    sink.write_elements(name, first + start, elements)


def _windows(tensor: PlannedTensor) -> Iterator[slice]:
    size, step = tensor.spec.numel, max(1, WINDOW // tensor.spec.dtype.itemsize)
    return (slice(i, min(i + step, size)) for i in range(0, size, step))
