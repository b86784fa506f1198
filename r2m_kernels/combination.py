"""Step 5, θ₀ + core + residuals, rounded once and written. What it adds up: :mod:`.terms` (README §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import low_rank
from ._stream.blocks import BLOCK_ELEMENTS, runs
from ._stream.budget import Inputs
from ._stream.loader import Group
from ._stream.plan import PlannedTensor, Role
from ._stream.processes import Journal
from ._stream.run import Run
from ._stream.schedule import Found, Pass, Step
from ._stream.tensors import PartialSink, PartialSource, TensorSink, TensorSpec, dtype_name, fetched
from .config import MergeConfig
from .errors import NotFinite, quoted
from .progress import Progress
from .terms import LowRank, Terms, Unchanged, Written, by_factors, kind_of, unmatched

Known = tuple[Sequence[PlannedTensor], Written]  # tensors that were computed


class Sizes(NamedTuple):
    """What is known of a tensor once it was merged.

    Attributes:
        residual: ‖η Σ_i W_i ∘ X_i‖² of a matrix whose rows are weighted, without what ``scale`` makes of it; else 0.
        base: ‖θ₀‖² where step 1 has not found it.
    """

    residual: float
    base: float | None


WINDOW = 2**20  # elements that are passed on at once
ROLES: tuple[Role, ...] = ("matrix", "vector", "statistic", "copied", "extra")


def combination_pass(tensors: Sequence[PlannedTensor], config: MergeConfig, *, cut: bool = True) -> Pass:
    """Every tensor of the output; ``cut``: whether the sink takes parts."""

    def block_elements(tensor: PlannedTensor) -> int | None:
        if not cut:
            return None
        if tensor.role not in ("matrix", "vector"):
            return BLOCK_ELEMENTS
        if by_factors(tensor, config) and not tensor.unchanged:
            return LowRank.block_elements(tensor)
        return kind_of(tensor, config).block_elements(tensor)

    def factors(tensor: PlannedTensor, inputs: Inputs) -> int:
        kept = tensor.truncated and not tensor.whole
        return inputs.factor_bytes(tensor, config) // sum(tensor.matrix_shape) if kept else 0

    def workspace(tensor: PlannedTensor, inputs: Inputs) -> int:
        merged = tensor.role in ("matrix", "vector")
        return unmatched(tensor, config).workspace_bytes(tensor, len(inputs.experts)) if merged else 0

    return Pass(
        "combination",
        tensors,
        block_elements,
        factors=factors,
        workspace=workspace,
        by_factors=lambda tensor: by_factors(tensor, config),
        passed_on=lambda tensor: tensor.role == "copied" or kind_of(tensor, config) is Unchanged,
    )


def write(
    run: Run, terms: Terms, sink: TensorSink, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> float:
    """Every merged tensor into a sink; ``dtype`` of floating-point ones, where it is not the base's.

    Returns:
        ‖η Σ_i W_i ∘ X_i‖ over matrix tensors where rows are weighted; else 0.
    """
    specs = run.plan.output_specs(run.inputs.base.specs, dtype)
    run.together(lambda: sink.begin(specs))  # nobody writes before all is laid out
    sizes: dict[str, Sizes] = run.each(CombinationStep(run, terms, sink, specs), progress)
    terms.findings.base_squares.update({name: one.base for name, one in sizes.items() if one.base is not None})
    return math.sqrt(math.fsum(sizes[tensor.name].residual for tensor in run.plan.of("matrix")))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each with memory of its own; on a GPU one launch fills many."""
    if tensors[0].device.type == "cpu":
        return [tensor.clone() for tensor in tensors]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def base_square(run: Run, tensor: PlannedTensor) -> float:
    """‖θ₀‖² of a tensor that is merged by factors, as writing it finds it.

    Raises:
        NotFinite: it holds NaN or Inf.
    """
    elements = BLOCK_ELEMENTS if tensor.unchanged else LowRank.block_elements(tensor)
    assert elements is not None
    parts = runs(tensor.spec.numel, elements) if isinstance(run.inputs.base, PartialSource) else [None]
    squares: list[float] = []
    for part in parts:
        read = run.loader.read(run.inputs.base, tensor, part)
        block = read if tensor.unchanged or part is None else read.view(-1, tensor.matrix_shape[1])
        squares += low_rank.base_squares([block], flat=tensor.unchanged).flatten().tolist()
    if not all(map(math.isfinite, squares)):
        run.loader.refuse_non_finite(tensor)
    return math.fsum(squares)


class CombinationStep(Step):
    """Writes every merged tensor into a sink.

    Args:
        run: for what is read, and who computes.
        terms: what tensors are made of.
        sink: what is written to.
        specs: name → shape and dtype of the output.
    """

    def __init__(self, run: Run, terms: Terms, sink: TensorSink, specs: Mapping[str, TensorSpec]) -> None:
        tensors = [terms.planned(tensor) for tensor in run.plan.of(*ROLES)]
        super().__init__(combination_pass(tensors, terms.config, cut=isinstance(sink, PartialSink)))
        self._terms, self._loader, self._operators = terms, run.loader, run.backend.operators
        self._sink, self._specs, self._factors = sink, specs, run.factors

    def work(self, group: Group) -> list[Known]:
        """What is known of the tensors that were computed."""
        if kind_of(group.tensors[0], self._terms.config) is Unchanged:
            return [self._passed_on(tensor, group.part) for tensor in group.tensors]
        outs, written = self._merged(group)
        named = [
            (name, merged) for tensor, merged in zip(group.tensors, outs, strict=True) for name in self._names(tensor)
        ]
        if group.columns is None:
            flat = named if group.part is None else [(name, merged.reshape(-1)) for name, merged in named]
            self._loader.give(self._sink, flat, None if group.part is None else group.part.start)
        else:
            for name, merged in named:
                self._write_columns(name, group, merged)
        return written

    def _names(self, tensor: PlannedTensor) -> tuple[str, ...]:
        return (tensor.name, *self._terms.findings.plan.tied.get(tensor.name, ()))

    def _passed_on(self, tensor: PlannedTensor, part: slice | None) -> Known:
        """The base's tensor, or a part, a window at a time: what was just read is still in a core's cache."""
        base, sink, dtype = self._loader.inputs.base, self._sink, self._specs[tensor.name].dtype
        pieces: list[slice | None] = [None]
        if isinstance(base, PartialSource) and isinstance(sink, PartialSink):
            start, stop = (0, tensor.spec.numel) if part is None else (part.start, part.stop)
            pieces = [slice(at, min(at + WINDOW, stop)) for at in range(start, stop, WINDOW)]
        squares, largest = [], []
        for piece in pieces:
            theta = self._loader.read(base, tensor, piece)
            squares.append(low_rank.base_squares([theta], flat=True))
            merged = theta.to(dtype, copy=piece is None and self._loader.lends).contiguous()
            # NaN and Inf of the base show in its squares; a narrower type has some of its own.
            largest.append(squares[-1].new_zeros(()) if dtype == theta.dtype else merged.abs().amax().double())
            for name in self._names(tensor):
                if piece is None:
                    sink.write(name, merged)
                else:
                    assert isinstance(sink, PartialSink)
                    sink.write_elements(name, piece.start, merged)
        return [tensor], Written(torch.stack(largest).amax(dim=0, keepdim=True), bases=torch.cat(squares, dim=1))

    def _write_columns(self, name: str, group: Group, merged: Tensor) -> None:
        assert isinstance(self._sink, PartialSink)
        assert group.part is not None
        assert group.columns is not None
        first, n = group.part.start + group.columns.start, group.tensors[0].matrix_shape[1]
        for index, row in enumerate(merged):
            self._sink.write_elements(name, first + index * n, row)

    def join(self, tensor: PlannedTensor, parts: list[Any]) -> list[Known]:
        """That of all parts."""
        self._factors.let_go(tensor.name)
        return [known for part in parts for known in part]

    def plain(self, value: Any) -> Any:
        """A list."""
        return list(value)

    def remembered(self, journal: Journal) -> Mapping[str, Any]:
        """Of tensors that are written."""
        return {name: Sizes(*value) for name, value in super().remembered(journal).items()}

    def settled(self, found: Found) -> list[Sequence[Sizes]]:
        """See :class:`Sizes`.

        Raises:
            NotFinite: a base of whose task vectors the factors alone were looked at holds NaN or Inf, or a tensor was
                written as such.
        """
        known: list[Known] = [one for _, several in found for one in several]
        numbers = [
            (*([] if one.bases is None else [one.bases]), one.largest, *(one.residual.numbers if one.residual else ()))
            for _, one in known
        ]
        at_hand = iter(fetched([number for several in numbers for number in several]))
        squares: dict[str, list[float]] = {tensor.name: [] for tensors, _ in found for tensor in tensors}
        bases: dict[str, list[float]] = {}
        for tensors, one in known:
            if one.bases is not None:
                for tensor, own in zip(tensors, next(at_hand), strict=True):
                    if not bool(torch.isfinite(own).all()):
                        self._loader.refuse_non_finite(tensor)
                    bases.setdefault(tensor.name, []).extend(own.tolist())
            self.refuse_non_finite(tensors, next(at_hand))
            if one.residual is not None:
                of_group = one.residual.squares(*(next(at_hand) for _ in one.residual.numbers))
                for tensor, own in zip(tensors, of_group, strict=True):
                    squares[tensor.name] += own.flatten().tolist()
        # Exact sums: how a tensor was cut touches no bit.
        return [
            [
                Sizes(
                    math.fsum(squares[one.name]) / self._terms.lengthened(one) ** 2,
                    math.fsum(bases[one.name]) if one.name in bases else None,
                )
                for one in some
            ]
            for some, _ in found
        ]

    def refuse_non_finite(self, tensors: Sequence[PlannedTensor], largest: Tensor) -> None:
        """Name the first of merged tensors whose largest magnitude is none.

        Raises:
            NotFinite: there is one.
        """
        if not bool(torch.isfinite(largest).all()):
            first = tensors[int((~torch.isfinite(largest)).nonzero()[0])]
            raise NotFinite(
                f"tensor {quoted(first.name)}: merged values exceed the range of "
                f"{dtype_name(self._specs[first.name].dtype)}; ask for a wider dtype or smaller core_scale and eta"
            )

    def _merged(self, group: Group) -> tuple[list[Tensor], list[Known]]:
        first, loader, base = group.tensors[0], self._loader, self._loader.inputs.base
        if first.role == "copied":
            return _copies([loader.read(base, tensor, group.part) for tensor in group.tensors]), []
        outs = [
            self._target(theta, self._specs[name].dtype, reused=group.factored)
            for theta, name in zip(group.bases or group.experts[0], group.names, strict=True)
        ]
        if first.role in ("statistic", "extra"):
            largest = self._operators.mean(group.experts, self._terms.findings.real.weights, outs)
            return outs, [(group.tensors, Written(largest))]
        alike = self._terms.alike(group)
        groups = [(group.some(places), [outs[place] for place in places]) for places in alike]
        return outs, [(one.tensors, self._terms.of(one).write(self._operators, one, some)) for one, some in groups]

    def _target(self, theta: Tensor, dtype: torch.dtype, *, reused: bool) -> Tensor:
        """What is written to; ``reused``: the base's own memory, where nobody else wants what is in it."""
        if reused and theta.dtype == dtype and theta.is_contiguous() and not self._loader.lends:
            return theta
        # Contiguous, whatever the base's strides: `empty_like` would keep a transposed or channels-last layout.
        return torch.empty(theta.shape, dtype=dtype, device=theta.device)
