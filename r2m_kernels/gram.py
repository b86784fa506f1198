"""Step 1, the task Gram matrices of tensors (README §2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import low_rank
from ._interface import Grams, Operators, RowGrams
from ._stream.blocks import row_block_elements
from ._stream.loader import Group
from ._stream.plan import Plan, PlannedTensor, Role, by_rows
from ._stream.processes import Journal
from ._stream.run import Run
from ._stream.schedule import Found, Pass, Step
from ._stream.tensors import fetched
from .config import MergeConfig
from .errors import NotFinite, quoted
from .real_subspace import layer_weights


def ordered_sum(numbers: Sequence[Tensor], *shape: int) -> Tensor:
    """Σ in the given order, float64 of one shape: a fixed tree, which ``torch.sum`` over a stack does not promise."""
    # The last partial sum, alone in its memory: one call, however many there are.
    return torch.stack([torch.zeros(shape, dtype=torch.float64), *numbers]).cumsum(dim=0)[-1].clone()


def panel_grams(base: Tensor, experts: Sequence[Tensor], operators: Operators, *, precise: bool, panel: int) -> Grams:
    """Those of the panels of a part of a tensor, whose ordered sum is the tensor's, to the bit.

    Args:
        base, experts: (elements,) runs that start at a multiple of ``panel`` in the tensor.
        panel: the operators' ``gram_panel_elements``.
    """
    runs = [slice(start, start + panel) for start in range(0, base.numel(), panel)]
    grams = [operators.task_gram([base[run]], [[expert[run]] for expert in experts], precise=precise) for run in runs]
    return Grams(*map(torch.cat, zip(*grams, strict=True)))


@dataclass(frozen=True)
class TaskGram:
    """What step 1 finds of one matrix or vector tensor.

    Attributes:
        tasks: (N, N) float64 ⟨τ_i, τ_j⟩, exactly symmetric.
        base: ‖θ₀‖²; ``None`` where it was worked out from factors, and the base not read.
        factored: whether it was, with other bits than from whole task vectors.
    """

    tasks: Tensor
    base: float | None
    factored: bool = False

    def plain(self) -> dict[str, Any]:
        """As plain values, for journals."""
        return {"tasks": self.tasks.tolist(), "base": self.base, "factored": self.factored}

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> TaskGram:
        """From :meth:`plain`."""
        return cls(torch.tensor(value["tasks"], dtype=torch.float64), value["base"], value.get("factored", False))


def gram_pass(plan: Plan, config: MergeConfig, operators: Operators) -> Pass:
    """Everything but what is copied; statistics and extras are only looked at for NaN and Inf."""
    tensors = plan.of("matrix", "vector", "statistic", "extra")

    def block_elements(tensor: PlannedTensor) -> int | None:
        if tensor.factored:
            return None
        if by_rows(tensor, config):
            return row_block_elements(*tensor.matrix_shape)
        return operators.gram_panel_elements(_precise(tensor, config))

    base_of: tuple[Role, ...] = ("matrix", "vector", "statistic")
    return Pass(
        "task Gram",
        tensors,
        block_elements,
        base_of=base_of,
        by_factors=lambda tensor: tensor.factored,
        base_by_factors=False,
        of_any_shape=lambda tensor: not tensor.factored and not by_rows(tensor, config),
    )


def _precise(tensor: PlannedTensor, config: MergeConfig) -> bool:
    """Whether the Gram is computed in float64.

    Of tensors that are merged without factors (vectors, full rank) it is the only source of their residual norms, and a
    difference of nearly equal numbers needs the digits.
    """
    return config.svd == "exact" or tensor.role != "matrix" or tensor.full_rank


class GramStep(Step):
    """A :class:`TaskGram` of each matrix and vector; refuses NaN and Inf, which a Gram matrix cannot hide.

    Of tensors whose residuals are weighted by rows the rows' Gram matrices are kept for the combination.
    """

    def __init__(self, run: Run, config: MergeConfig) -> None:
        super().__init__(gram_pass(run.plan, config, run.backend.operators))
        self._config, self._operators = config, run.backend.operators
        self._loader, self._kept = run.loader, run.factors

    def work(self, group: Group) -> Grams | RowGrams:
        """The group's :class:`Grams`; of a part its panels', or its rows'."""
        first, operators = group.tensors[0], self._operators
        if group.factored:
            return low_rank.task_grams(group.experts, first.matrix_shape[0])
        if by_rows(first, self._config):
            rows, _ = group.in_rows([])
            grams = operators.row_grams(rows.bases, rows.experts)
            return grams if group.part is not None else self._summed(group.tensors, grams)
        precise = _precise(first, self._config)
        if group.part is not None and group.bases:
            panel = operators.gram_panel_elements(precise)
            return panel_grams(*group.inputs(0), operators, precise=precise, panel=panel)
        # Extras have no base: NaN and Inf show in their differences from any of them.
        return operators.task_gram(group.bases or group.experts[0], group.experts, precise=precise)

    def join(self, tensor: PlannedTensor, parts: list[Any]) -> Grams:
        """The sum of all panels, or of all rows."""
        if by_rows(tensor, self._config):
            rows, bases = torch.cat([part.rows for part in parts], dim=2), [part.base for part in parts]
            return self._summed([tensor], RowGrams(rows, torch.stack(bases).sum(dim=0)))
        tasks, base = (torch.cat(panels) for panels in zip(*parts, strict=True))
        total = torch.zeros_like(tasks[0])
        for panel in tasks:
            total += panel
        return Grams(total.unsqueeze(0), base.sum().unsqueeze(0))

    def settled(self, found: Found) -> list[Sequence[Any]]:
        """``None`` for what takes no part in the subspace."""
        numbers = fetched([one for _, grams in found for one in grams])
        values: list[Sequence[Any]] = []
        for (tensors, _), tasks, base in zip(found, numbers[::2], numbers[1::2], strict=True):
            if not bool(torch.isfinite(tasks).all()):
                self._refuse(tensors, tasks)
            if tasks.ndim == 2:
                tasks = from_pairs(tasks)
            if tensors[0].role in ("matrix", "vector"):
                factored = tensors[0].factored
                bases = [None] * len(tensors) if factored else base.tolist()
                values.append(list(map(TaskGram, (tasks + tasks.mT) / 2, bases, [factored] * len(tensors))))
            else:
                values.append([None] * len(tensors))
        return values

    def plain(self, value: Any) -> Any:
        """See :meth:`TaskGram.plain`."""
        return None if value is None else value.plain()

    def remembered(self, journal: Journal) -> Mapping[str, Any]:
        """Gram matrices of a former run; rows' are not written down: the combination finds them again, to the bit."""
        known = super().remembered(journal)
        looked_at = {tensor.name for tensor in self.over.tensors if tensor.role not in ("matrix", "vector")}
        # With other experts beside them those of another merge may have come from factors, or not.
        factored = {tensor.name: tensor.factored for tensor in self.over.tensors}
        grams = {name: None if value is None else TaskGram.from_plain(value) for name, value in known.items()}
        fitting = {
            name: one
            for name, one in grams.items()
            if (name in looked_at if one is None else one.factored == factored.get(name))
        }
        count = len(self._loader.inputs.experts)
        nothing = TaskGram(torch.zeros(count, count, dtype=torch.float64), None, factored=True)
        return {**dict.fromkeys((one.name for one in self.over.tensors if one.unchanged), nothing), **fitting}

    def _summed(self, tensors: Sequence[PlannedTensor], grams: RowGrams) -> Grams:
        """Keeps the rows of whole tensors; their sums, (L, P) as pairs are."""
        for tensor, rows in zip(tensors, grams.rows, strict=True):
            self._kept.put_rows(tensor.name, rows)
        sums = self._operators.sum_rows(grams.rows) if grams.sums is None else grams.sums
        return Grams(sums, grams.base)

    def _refuse(self, tensors: Sequence[PlannedTensor], tasks: Tensor) -> None:
        for tensor, finite in zip(tensors, torch.isfinite(tasks).flatten(1).all(dim=1).tolist(), strict=True):
            if finite:
                continue
            self._loader.refuse_non_finite(tensor)
            if tensor.role in ("matrix", "vector"):  # what is only averaged may be as large as it is
                raise NotFinite(
                    f"tensor {quoted(tensor.name)}: the differences from the base are too large to be squared and "
                    "summed"
                )


def tasks_and_bases(values: Mapping[str, TaskGram | None]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(N, N) Gram matrix of each matrix and vector tensor, and ‖θ₀‖² where it is known, of :class:`GramStep`'s."""
    known = {name: value for name, value in values.items() if value is not None}
    bases = {name: one.base for name, one in known.items() if one.base is not None}
    return {name: one.tasks for name, one in known.items()}, bases


def from_pairs(pairs: Tensor) -> Tensor:
    """(L, P) pairs (i, j ≤ i), at i(i+1)/2 + j, as (L, N, N)."""
    count = math.isqrt(2 * pairs.shape[1])
    places = [[max(i, j) * (max(i, j) + 1) // 2 + min(i, j) for j in range(count)] for i in range(count)]
    return pairs[:, torch.tensor(places)]


def weighted(grams: Mapping[str, Tensor], plan: Plan, config: MergeConfig, count: int) -> Tensor:
    """G = Σ γ_l G_l over matrix tensors of ``count`` experts: (N, N) float64."""
    # In the order of names: the order in the file must not touch a bit.
    matrices = [grams[name] for name in sorted(tensor.name for tensor in plan.of("matrix"))]
    gammas = layer_weights(matrices, config)
    weighed = (gram if gamma == 1.0 else gamma * gram for gamma, gram in zip(gammas, matrices, strict=True))
    return ordered_sum([*weighed], count, count)
