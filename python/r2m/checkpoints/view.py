"""Checkpoints as a merge sees them: under other names, without some tensors, with some that are worked out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from r2m.checkpoints.files import Checkpoint
from r2m_kernels.errors import BadCheckpoint, quoted
from r2m_kernels.streaming import TensorSpec


@dataclass(frozen=True)
class Added:
    """A product of few columns that was added to a tensor.

    Attributes:
        to: the tensor.
        rank: its columns r.
        read: (m + n, r), of both factors, as :class:`r2m_kernels.streaming.LowRankSource` has it.
    """

    to: LazyTensor
    rank: int
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a view, read when it is asked for: the whole, or a run of its flattened elements.

    Attributes:
        read_block: several runs at once, where a run is read without the rest.
        read_into: a run into memory of the reader's, where it is read so.
        change: of one that is another with a product added.
    """

    spec: TensorSpec
    read: Callable[[], Tensor]
    read_elements: Callable[[int, int], Tensor]
    read_block: Callable[[int, int, int, int], Tensor] | None = None
    change: Added | None = None
    read_into: Callable[[int, Tensor], None] | None = None

    @classmethod
    def stored(cls, source: Checkpoint, name: str) -> LazyTensor:
        """As a checkpoint has it."""
        runs = partial(source.read_block, name) if source.in_blocks(name) else None
        reads = (partial(source.read, name), partial(source.read_elements, name), runs)
        return cls(source.specs[name], *reads, read_into=partial(source.read_into, name))

    @classmethod
    def computed(cls, spec: TensorSpec, read: Callable[[], Tensor]) -> LazyTensor:
        """Worked out, whole, whenever it is read."""
        return cls(spec, read, lambda start, stop: read().reshape(-1)[start:stop])


def folded(main: LazyTensor, left: LazyTensor, singular: LazyTensor, right: LazyTensor) -> LazyTensor:
    """W + U diag(s) V, in float32 or wider, in W's dtype: (m, n), (m, r), (r,) and (r, n)."""

    def read() -> Tensor:
        whole = main.read()
        wide = torch.promote_types(whole.dtype, torch.float32)
        change = (left.read().to(wide) * singular.read().to(wide)) @ right.read().to(wide)
        return (whole.to(wide) + change).to(whole.dtype)

    return LazyTensor.computed(main.spec, read)


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """The same elements in another shape."""
    spec = TensorSpec(shape, tensor.spec.dtype)
    return LazyTensor(spec, lambda: tensor.read().reshape(shape), tensor.read_elements)


def zeros(spec: TensorSpec) -> LazyTensor:
    """All zero."""
    return LazyTensor.computed(spec, lambda: torch.zeros(spec.shape, dtype=spec.dtype))


def constant(tensor: Tensor) -> LazyTensor:
    """A tensor in memory."""
    return LazyTensor.computed(TensorSpec(tuple(tensor.shape), tensor.dtype), tensor.clone)


class View:
    """Tensors by name, as a source of :mod:`r2m_kernels.streaming` in all its kinds. Its methods give other views.

    Attributes:
        label: how error messages name the checkpoint.
        source: whose files it shows.
        tensors: name → what reads it, in order.
        aliases: name → the earlier name of the same stored tensor.
    """

    def __init__(self, source: Checkpoint, tensors: Mapping[str, LazyTensor], aliases: Mapping[str, str]) -> None:
        self.label, self.source = source.label, source
        self.tensors = dict(tensors)
        self.aliases = {name: first for name, first in aliases.items() if name in tensors and first in tensors}
        self.specs = {name: tensor.spec for name, tensor in tensors.items()}
        self.files, self.fingerprints = source.files, source.fingerprints
        self._base: Mapping[str, LazyTensor] = {}

    @classmethod
    def of(cls, source: Checkpoint) -> View:
        """A checkpoint as it is."""
        return cls(source, {name: LazyTensor.stored(source, name) for name in source.specs}, source.aliases)

    def read(self, name: str) -> Tensor:
        """See the protocol."""
        return self.tensors[name].read()

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """See the protocol."""
        return self.tensors[name].read_elements(start, stop)

    def in_blocks(self, name: str) -> bool:
        """See :class:`r2m_kernels.streaming.BlockSource`."""
        return self.tensors[name].read_block is not None

    def read_block(self, name: str, start: int, length: int, step: int, count: int) -> Tensor:
        """See there."""
        read = self.tensors[name].read_block
        assert read is not None
        return read(start, length, step, count)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """See :class:`r2m_kernels.streaming.DirectSource`."""
        tensor = self.tensors[name]
        if tensor.read_into is None:
            out.copy_(tensor.read_elements(start, start + out.numel()))
        else:
            tensor.read_into(start, out)

    def change_rank(self, name: str) -> int | None:
        """See :class:`r2m_kernels.streaming.LowRankSource`; known where :meth:`over` has said what the base is."""
        tensor, base = self.tensors[name], self._base.get(name)
        if base is None or (tensor is not base and (tensor.change is None or tensor.change.to is not base)):
            return None
        return 0 if tensor.change is None or tensor is base else tensor.change.rank

    def read_change(self, name: str) -> Tensor:
        """See there."""
        tensor = self.tensors[name]
        if tensor is self._base[name] or tensor.change is None:
            m = tensor.spec.shape[0]
            return torch.empty(m + tensor.spec.numel // m, 0)
        return tensor.change.read()

    def over(self, base: View) -> View:
        """The same, knowing the base that it is merged into."""
        view = View(self.source, self.tensors, self.aliases)
        view._base = base.tensors
        return view

    def renamed(self, rules: Mapping[str, str | None]) -> View:
        """The same tensors under other names.

        Args:
            rules: what a name begins with → what it begins with instead, or None: the tensor is left out. The first
                rule that fits a name counts.

        Raises:
            BadCheckpoint: two tensors get one name.
        """
        names: dict[str, str] = {}
        taken: dict[str, str] = {}
        for name in self.tensors:
            old = next((prefix for prefix in rules if name.startswith(prefix)), None)
            beginning = None if old is None else rules[old]
            if old is not None and beginning is None:
                continue
            new = name if old is None or beginning is None else beginning + name[len(old) :]
            if new in taken:
                raise BadCheckpoint(
                    f"{self.label}: renamed, {quoted(taken[new])} and {quoted(name)} are both {quoted(new)}"
                )
            names[name], taken[new] = new, name
        return View(
            self.source,
            {new: self.tensors[name] for name, new in names.items()},
            {names[name]: names[first] for name, first in self.aliases.items() if name in names and first in names},
        )

    def without(self, names: Iterable[str]) -> View:
        """The others."""
        left_out = set(names)
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in left_out}
        return View(self.source, kept, self.aliases)

    def having(self, tensors: Mapping[str, LazyTensor]) -> View:
        """With tensors replaced where they are, others at the end. They are tied to nothing."""
        aliases = {name: first for name, first in self.aliases.items() if not {name, first} & tensors.keys()}
        return View(self.source, {**self.tensors, **tensors}, aliases)
