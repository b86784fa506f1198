"""Step 1, the task Gram matrices of tensors (README §2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._interface import Operators
from ._stream.loader import Group
from ._stream.plan import Plan, PlannedTensor
from ._stream.run import Run
from ._stream.schedule import Pass, Step
from .config import MergeConfig
from .errors import NotFinite, quoted
from .real_subspace import layer_weights


def task_grams(
    bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], operators: Operators, *, precise: bool
) -> list[Tensor]:
    """G_l = A_l A_lᵀ of L tensors of one shape, (N, N) float64 each, exactly symmetric.

    Args:
        precise: compute in float64. For tensors that are merged without factors (vectors, full rank) the Gram is the
            only source of their residual norms, and a difference of nearly equal numbers needs the digits.
    """
    grams = operators.task_gram(bases, experts, precise=precise).tasks.cpu()
    return list((grams + grams.mT) / 2)


def ordered_sum(grams: Sequence[Tensor], count: int) -> Tensor:
    """Σ in the given order, float64: a fixed tree, which ``torch.sum`` over a stack does not promise."""
    total = torch.zeros(count, count, dtype=torch.float64)
    for gram in grams:
        total += gram
    return total


def panel_grams(base: Tensor, experts: Sequence[Tensor], operators: Operators, *, precise: bool, panel: int) -> Tensor:
    """What the panels of a part of a tensor add to its Gram: (panels, N, N), for :func:`from_panels`.

    Args:
        base, experts: (elements,) runs that start at a multiple of ``panel`` in the tensor.
        panel: the operators' ``gram_panel_elements``.
    """
    starts = range(0, base.numel(), panel)
    panels = [
        operators.task_gram(
            [base[start : start + panel]], [[expert[start : start + panel]] for expert in experts], precise=precise
        ).tasks
        for start in starts
    ]
    return torch.cat(panels).cpu()


def from_panels(panels: Tensor) -> Tensor:
    """A tensor's Gram, bit for bit that of :func:`task_grams`, from all its panels' in order."""
    total = ordered_sum(list(panels), panels.shape[1])
    return (total + total.mT) / 2


def gram_pass(plan: Plan, config: MergeConfig, operators: Operators) -> Pass:
    """Everything but what is copied; statistics and extras are only looked at for NaN and Inf."""
    tensors = plan.of("matrix", "vector", "statistic", "extra")

    def block_elements(tensor: PlannedTensor) -> int:
        return operators.gram_panel_elements(_precise(tensor, config))

    return Pass("task Gram", tensors, block_elements, base_of=("matrix", "vector", "statistic"))


def _precise(tensor: PlannedTensor, config: MergeConfig) -> bool:
    return config.svd == "exact" or tensor.role != "matrix" or tensor.full_rank


class GramStep(Step):
    """Gram matrices as rows of numbers; refuses NaN and Inf, which a Gram matrix cannot hide."""

    def __init__(self, run: Run, config: MergeConfig) -> None:
        super().__init__(gram_pass(run.plan, config, run.backend.operators))
        self._config, self._operators, self._loader = config, run.backend.operators, run.loader

    def work(self, group: Group) -> list[Any]:
        """(N, N) each; of a part its panels'; ``None`` for what takes no part in the subspace."""
        first, operators = group.tensors[0], self._operators
        if first.role not in ("matrix", "vector"):
            self._look_at(group)
            return [None] * len(group.tensors)
        precise = _precise(first, self._config)
        if group.part is not None:
            panel = operators.gram_panel_elements(precise)
            return [panel_grams(*group.inputs(0), operators, precise=precise, panel=panel).tolist()]
        grams = task_grams(group.bases, group.experts, operators, precise=precise)
        return [self._finite(*of_tensor).tolist() for of_tensor in zip(group.tensors, grams, strict=True)]

    def join(self, tensor: PlannedTensor, parts: list[Any]) -> Any:
        """The sum of all panels."""
        if tensor.role not in ("matrix", "vector"):
            return None
        panels = torch.tensor([panel for part in parts for panel in part], dtype=torch.float64)
        return self._finite(tensor, from_panels(panels)).tolist()

    def _look_at(self, group: Group) -> None:
        """Refuse NaN and Inf in what is only averaged; what is finite may be as large as it is."""
        bases = group.bases or group.experts[0]
        grams = self._operators.task_gram(bases, group.experts, precise=True).tasks
        finite = torch.isfinite(grams).flatten(1).all(dim=1).tolist()
        for tensor, fine in zip(group.tensors, finite, strict=True):
            if not fine:
                self._loader.refuse_non_finite(tensor, group.part)

    def _finite(self, tensor: PlannedTensor, gram: Tensor) -> Tensor:
        """A Gram matrix as it is, or why it holds NaN or Inf."""
        if not bool(torch.isfinite(gram).all()):
            self._loader.refuse_non_finite(tensor)
            raise NotFinite(
                f"tensor {quoted(tensor.name)}: the differences from the base are too large to be squared and summed"
            )
        return gram


def as_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """(N, N) float64 for each matrix and vector tensor, from what :class:`GramStep` gives."""
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in values.items() if rows is not None}


def weighted(grams: Mapping[str, Tensor], plan: Plan, config: MergeConfig, count: int) -> Tensor:
    """G = Σ γ_l G_l over matrix tensors of ``count`` experts: (N, N) float64."""
    # In the order of names: the order in the file must not touch a bit.
    matrices = [grams[name] for name in sorted(tensor.name for tensor in plan.of("matrix"))]
    gammas = layer_weights(matrices, config)
    return ordered_sum([gamma * gram for gamma, gram in zip(gammas, matrices, strict=True)], count)
