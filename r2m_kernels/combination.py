"""Step 5, θ₀ + core + residuals, rounded once and written. What it adds up: :mod:`.terms` (README §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._stream.blocks import BLOCK_ELEMENTS
from ._stream.budget import Inputs
from ._stream.loader import Group
from ._stream.plan import PlannedTensor, Role
from ._stream.run import Run
from ._stream.schedule import Found, Pass, Step
from ._stream.tensors import PartialSink, TensorSink, TensorSpec, dtype_name, fetched
from .config import MergeConfig
from .errors import NotFinite, quoted
from .progress import Progress
from .terms import LowRank, Terms, Written, by_factors, kind_of, unmatched

Known = tuple[Sequence[PlannedTensor], Written]  # tensors that were computed
ROLES: tuple[Role, ...] = ("matrix", "vector", "statistic", "copied", "extra")


def combination_pass(tensors: Sequence[PlannedTensor], config: MergeConfig, *, cut: bool = True) -> Pass:
    """Every tensor of the output; ``cut``: whether the sink takes parts."""

    def block_elements(tensor: PlannedTensor) -> int | None:
        if not cut:
            return None
        if tensor.role not in ("matrix", "vector"):
            return BLOCK_ELEMENTS
        if by_factors(tensor, config):
            return LowRank.block_elements(tensor)
        return kind_of(tensor, config).block_elements(tensor)

    def factors(tensor: PlannedTensor, inputs: Inputs) -> int:
        return inputs.factor_bytes(tensor, config) // sum(tensor.matrix_shape) if tensor.truncated else 0

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
    squares = run.each(CombinationStep(run, terms, sink, specs), progress)
    return math.sqrt(math.fsum(squares[tensor.name] for tensor in run.plan.of("matrix")))


class CombinationStep(Step):
    """Writes every merged tensor into a sink.

    Args:
        run: for what is read, and who computes.
        terms: what tensors are made of.
        sink: what is written to.
        specs: name → shape and dtype of the output.
    """

    def __init__(self, run: Run, terms: Terms, sink: TensorSink, specs: Mapping[str, TensorSpec]) -> None:
        tensors = [terms.findings.at(tensor, terms.config) for tensor in run.plan.of(*ROLES)]
        super().__init__(combination_pass(tensors, terms.config, cut=isinstance(sink, PartialSink)))
        self._terms, self._loader, self._operators = terms, run.loader, run.backend.operators
        self._sink, self._specs, self._factors = sink, specs, run.factors

    def work(self, group: Group) -> list[Known]:
        """What is known of the tensors that were computed."""
        outs, written = self._merged(group)
        tied = self._terms.findings.plan.tied
        for tensor, merged in zip(group.tensors, outs, strict=True):
            for name in (tensor.name, *tied.get(tensor.name, ())):
                if group.part is None:
                    self._sink.write(name, merged)
                else:
                    self._write_part(name, group, merged)
        return written

    def _write_part(self, name: str, group: Group, merged: Tensor) -> None:
        assert isinstance(self._sink, PartialSink)
        assert group.part is not None
        if group.columns is None:
            self._sink.write_elements(name, group.part.start, merged.reshape(-1))
            return
        first, n = group.part.start + group.columns.start, group.tensors[0].matrix_shape[1]
        for index, row in enumerate(merged):
            self._sink.write_elements(name, first + index * n, row)

    def join(self, tensor: PlannedTensor, parts: list[Any]) -> list[Known]:
        """That of all parts."""
        self._factors.let_go(tensor.name)
        return [known for part in parts for known in part]

    def settled(self, found: Found) -> list[Sequence[float]]:
        """‖η Σ_i W_i ∘ X_i‖² of each matrix whose rows are weighted, without what ``scale`` makes of it; else 0.

        Raises:
            NotFinite: a tensor was written as NaN or Inf.
        """
        known: list[Known] = [one for _, several in found for one in several]
        numbers = [(one.largest, *(one.residual.numbers if one.residual else ())) for _, one in known]
        at_hand = iter(fetched([number for several in numbers for number in several]))
        squares: dict[str, list[float]] = {tensor.name: [] for tensors, _ in found for tensor in tensors}
        for tensors, one in known:
            self._refuse_non_finite(tensors, next(at_hand))
            if one.residual is not None:
                of_group = one.residual.squares(*(next(at_hand) for _ in one.residual.numbers))
                for tensor, own in zip(tensors, of_group, strict=True):
                    squares[tensor.name] += own.flatten().tolist()
        # Exact sums: how a tensor was cut touches no bit.
        return [[math.fsum(squares[one.name]) / self._terms.lengthened(one) ** 2 for one in some] for some, _ in found]

    def _refuse_non_finite(self, tensors: Sequence[PlannedTensor], largest: Tensor) -> None:
        if not bool(torch.isfinite(largest).all()):
            first = tensors[int((~torch.isfinite(largest)).nonzero()[0])]
            raise NotFinite(
                f"tensor {quoted(first.name)}: merged values exceed the range of "
                f"{dtype_name(self._specs[first.name].dtype)}; ask for a wider dtype or smaller core_scale and eta"
            )

    def _merged(self, group: Group) -> tuple[list[Tensor], list[Known]]:
        first, loader, base = group.tensors[0], self._loader, self._loader.inputs.base
        if first.role == "copied":
            return [loader.read(base, tensor, group.part).clone() for tensor in group.tensors], []
        # Contiguous, whatever the base's strides: `empty_like` would keep a transposed or channels-last layout.
        outs = [
            torch.empty(theta.shape, dtype=self._specs[name].dtype, device=theta.device)
            for theta, name in zip(group.bases or group.experts[0], group.names, strict=True)
        ]
        if first.role in ("statistic", "extra"):
            largest = self._operators.mean(group.experts, self._terms.findings.real.weights, outs)
            return outs, [(group.tensors, Written(largest))]
        if first.role == "matrix" and self._terms.single:
            groups = [(group.single(index), [out]) for index, out in enumerate(outs)]
        else:
            groups = [(group, outs)]
        return outs, [(one.tensors, self._terms.of(one).write(self._operators, one, some)) for one, some in groups]
