"""What part each tensor takes in a merge, as plain data; made by :mod:`.compatibility` (README §1)."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..config import MergeConfig
from ..fields import JOINT_BASES, WHOLE_SPECTRUM
from .tensors import TensorSpec

Role = Literal["matrix", "vector", "statistic", "copied", "extra"]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        role: ``matrix``: takes part in subspace and truncation; ``vector``: mean plus matched deviation;
            ``statistic``: plain mean; ``copied``: from the base; ``extra``: mean of the experts, absent from the base.
        rank: truncation rank of a matrix; 0 for other roles.
        mapped: its residuals' singular values are changed, not only cut off: never linear in the task vectors.
        change_ranks: of a tensor that may be merged by its task vectors' factors, how many columns each expert's have;
            all 0 where it is the base's in every expert.
        apart: its residuals are wanted as factors of their own, also where all of their columns fit the rank.
    """

    name: str
    spec: TensorSpec
    role: Role
    rank: int = 0
    mapped: bool = False
    change_ranks: tuple[int, ...] | None = None
    apart: bool = False

    @property
    def factored(self) -> bool:
        """Whether its task vectors are there as factors."""
        return self.change_ranks is not None

    @property
    def change_elements(self) -> int:
        """Numbers of all those factors."""
        columns = sum(self.change_ranks or ())
        return columns * sum(self.matrix_shape) if columns else 0

    @property
    def unchanged(self) -> bool:
        """Whether every expert has the base's."""
        return self.factored and not any(self.change_ranks or ())

    @property
    def full_rank(self) -> bool:
        """A matrix that is kept whole: linear in the task vectors, no factors needed."""
        return self.role == "matrix" and self.rank == min(self.matrix_shape) and not self.mapped

    @property
    def whole(self) -> bool:
        """A matrix whose residuals are linear in the task vectors: by its rank, or since these have few columns."""
        by_columns = self.factored and not self.apart and sum(self.change_ranks or ()) <= self.rank
        return self.full_rank or (self.role == "matrix" and by_columns)

    @property
    def truncated(self) -> bool:
        """A matrix of which residuals have less than full rank."""
        return self.role == "matrix" and not self.full_rank

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n): the first dimension and the product of the rest."""
        return self.spec.shape[0], math.prod(self.spec.shape[1:])

    def at(self, rank: int) -> PlannedTensor:
        """The same with another truncation rank."""
        return self if rank == self.rank else replace(self, rank=rank)


@dataclass(frozen=True, repr=False)
class Plan:
    """All tensors of the output in the base's order (extras last), and the tied ones left out of the arithmetic.

    ``heads`` are the classifier's tensors, which are statistics or extras, where ``head="mean"`` found any.
    """

    tensors: tuple[PlannedTensor, ...]
    aliases: Mapping[str, str]
    tied: Mapping[str, Sequence[str]]
    dropped: tuple[str, ...]
    heads: tuple[str, ...] = ()

    def __repr__(self) -> str:
        counts = Counter(tensor.role for tensor in self.tensors)
        return f"<Plan: {', '.join(f'{count} {role}' for role, count in counts.items())}>"

    def of(self, *roles: Role) -> list[PlannedTensor]:
        """The tensors of some roles, largest first: the order in which threads take them."""
        chosen = [tensor for tensor in self.tensors if tensor.role in roles]
        return sorted(chosen, key=lambda tensor: (-tensor.spec.numel, tensor.name))

    def output_specs(self, base: Iterable[str], dtype: torch.dtype | None) -> dict[str, TensorSpec]:
        """What is written: names in the base's order, then the extras; ``dtype`` for all that is not copied."""
        planned = {tensor.name: tensor for tensor in self.tensors}
        specs = {}
        for name in dict.fromkeys((*base, *planned)):
            tensor = planned.get(self.aliases.get(name, name))
            if tensor is None:  # of a head that the experts have otherwise
                continue
            keep = dtype is None or tensor.role == "copied"
            specs[name] = tensor.spec if keep else replace(tensor.spec, dtype=dtype or tensor.spec.dtype)
        return specs


def fits(names: Iterable[str], globs: Iterable[str]) -> bool:
    """Whether a tensor that goes by ``names`` is meant by one of the globs."""
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


def weighted_by_rows(tensor: PlannedTensor, config: MergeConfig) -> bool:
    """Whether a tensor's whole residuals are weighted row by row, by their lengths in the rows' Gram matrices."""
    whole = tensor.whole and config.elementwise == "none" and config.core_spectrum != "flat"
    return whole and config.eta != 0 and config.row_power > 0


def by_rows(tensor: PlannedTensor, config: MergeConfig) -> bool:
    """Whether those matrices are found in step 1 and kept; from factors they are made where they are needed."""
    return weighted_by_rows(tensor, config) and not tensor.factored


def goes_by_factors(config: MergeConfig) -> bool:
    """Whether a merge can do with the factors of task vectors: whole ones are nowhere needed."""
    plain = config.elementwise == "none" and config.core_spectrum != "flat" and config.scale != "column"
    plain = plain and config.descent_steps == 0
    return plain and config.spectrum == "truncate" and config.svd != "textbook"


def residual_rank(config: MergeConfig, name: str, shape: Sequence[int], count: int) -> int:
    """r_l of a matrix tensor: how many singular values of each of ``count`` residuals are computed."""
    smaller = min(shape[0], math.prod(shape[1:]))
    if config.spectrum in WHOLE_SPECTRUM:
        return smaller
    if config.truncate and not fits([name], config.truncate):
        return smaller
    own = next((rank for glob, rank in config.ranks if fits([name], [glob])), None)
    if own is None and smaller <= config.whole_up_to and config.spectrum == "truncate":
        return smaller
    rank = config.rank if own is None else own
    if config.rank_rounding == "down" and isinstance(rank, float):
        rank = max(1, math.floor(rank * smaller * (1 + 1e-12)))
    return truncation_rank(rank, shape, smaller // count if config.spectrum in JOINT_BASES else None)


def truncation_rank(rank: float | int, shape: Sequence[int], most: int | None = None) -> int:
    """r_l = max(1, ⌈rank · min(m, n)⌉) for a ratio, at most ``most`` or min(m, n)."""
    smaller = min(shape[0], math.prod(shape[1:]))
    if most is not None:
        return min(max(1, most), truncation_rank(rank, shape))
    if isinstance(rank, int):
        return min(rank, smaller)
    # 0.07 · 100 is 7.000000000000001 in binary: a hair above a whole number is that number.
    return min(smaller, max(1, math.ceil(rank * smaller * (1 - 1e-12))))
