"""Step 5, θ₀ + core + residuals, rounded once and written. What it adds up: :mod:`.terms` (README §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._stream.blocks import BLOCK_ELEMENTS
from ._stream.loader import Group
from ._stream.plan import PlannedTensor, Role
from ._stream.run import Run
from ._stream.schedule import Pass, Step
from ._stream.tensors import PartialSink, TensorSink, TensorSpec, dtype_name
from .config import MergeConfig
from .errors import NotFinite, quoted
from .terms import Terms, kind_of

ROLES: tuple[Role, ...] = ("matrix", "vector", "statistic", "copied", "extra")


def combination_pass(tensors: Sequence[PlannedTensor], config: MergeConfig, *, cut: bool = True) -> Pass:
    """Every tensor of the output; ``cut``: whether the sink takes parts."""

    def block_elements(tensor: PlannedTensor) -> int | None:
        if not cut:
            return None
        if tensor.role not in ("matrix", "vector"):
            return BLOCK_ELEMENTS
        return kind_of(tensor, config).block_elements(tensor)

    return Pass("combination", tensors, block_elements)


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
        self._sink, self._specs = sink, specs

    def work(self, group: Group) -> list[Any]:
        """Nothing is found: written tensors are remembered by name."""
        tied = self._terms.findings.plan.tied
        for tensor, merged in zip(group.tensors, self._merged(group), strict=True):
            for name in (tensor.name, *tied.get(tensor.name, ())):
                if group.part is None:
                    self._sink.write(name, merged)
                else:
                    assert isinstance(self._sink, PartialSink)
                    self._sink.write_elements(name, group.part.start, merged.reshape(-1))
        return [None] * len(group.tensors)

    def _merged(self, group: Group) -> list[Tensor]:
        first, loader, base = group.tensors[0], self._loader, self._loader.inputs.base
        if first.role == "copied":
            return [loader.read(base, tensor, group.part).clone() for tensor in group.tensors]
        # Contiguous, whatever the base's strides: `empty_like` would keep a transposed or channels-last layout.
        outs = [
            torch.empty(theta.shape, dtype=self._specs[name].dtype, device=theta.device)
            for theta, name in zip(group.experts[0], group.names, strict=True)
        ]
        if first.role in ("statistic", "extra"):
            largest = self._operators.mean(group.experts, self._terms.findings.real.weights, outs)
        elif first.role == "matrix" and self._terms.single:
            singles = [(group.single(index), [out]) for index, out in enumerate(outs)]
            written = [self._terms.of(one.tensors).write(self._operators, one, out) for one, out in singles]
            largest = torch.cat(written)
        else:
            largest = self._terms.of(group.tensors).write(self._operators, group, outs)
        _refuse_out_of_range(group.names, outs, largest)
        return outs


def _refuse_out_of_range(names: list[str], merged: list[Tensor], largest: Tensor) -> None:
    for name, tensor, bound in zip(names, merged, largest.tolist(), strict=True):
        if not math.isfinite(bound):
            raise NotFinite(
                f"tensor {quoted(name)}: merged values exceed the range of {dtype_name(tensor.dtype)}; ask for a wider "
                "dtype or smaller core_scale and eta"
            )
