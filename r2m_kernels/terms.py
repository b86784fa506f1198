"""What each merged tensor is made of, as data that says how it may be cut and writes itself (README §6).

What a matrix or vector becomes, and whether it may be cut, is decided by :func:`kind_of` alone; a new way to merge is a
class here, or a new configuration of those that are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import descent, elements, low_rank, spectra, truncation
from ._interface import CUT_OFF, Operators
from ._stream.blocks import BLOCK_ELEMENTS, product_height, row_block_elements
from ._stream.budget import COMPUTE_BYTES
from ._stream.factors import Factors, stacked
from ._stream.loader import Group
from ._stream.plan import PlannedTensor, weighted_by_rows
from .config import MergeConfig
from .findings import Findings, Residuals
from .row_weights import shared_weight
from .update_scale import gain

# Elements of the matrices that are worked on at once, whole and in float64.
FLAT_ELEMENTS = 2**25


class Measured(NamedTuple):
    """What is known of ‖η Σ_i W_i ∘ X_i‖², where it was made: nobody has waited for it.

    Attributes:
        numbers: float64 tensors of L tensors, on any device.
        squares: from these on the CPU (L, …) numbers, each of a block or a row, of which a tensor's add up to it.
    """

    numbers: Sequence[Tensor]
    squares: Callable[..., Tensor]


class Written(NamedTuple):
    """What is known of L tensors that were written.

    Attributes:
        largest: (L,) magnitudes.
        residual: of the residual term where rows are weighted; ``None``: there is none, or it is known from elsewhere.
        bases: (L, blocks) float64, of which a tensor's add up to ‖θ₀‖²; ``None``: step 1 has found it.
    """

    largest: Tensor
    residual: Measured | None = None
    bases: Tensor | None = None


class Term:
    """What tensors of one role, shape and rank become: θ₀ and something more."""

    @staticmethod
    def block_elements(tensor: PlannedTensor) -> int | None:
        """Elements of the blocks it is made in; ``None`` where the tensor is needed whole."""
        return BLOCK_ELEMENTS

    @staticmethod
    def workspace_bytes(tensor: PlannedTensor, experts: int) -> int:
        """What making it whole takes beside its inputs and result."""
        return 0

    def write(self, operators: Operators, group: Group, outs: Sequence[Tensor]) -> Written:
        """The merged tensors, or a part of one, into contiguous ``outs``, rounded once."""
        raise NotImplementedError


def _result_bytes(tensor: PlannedTensor) -> int:
    """Of a wide result and of what is written, which float64 algebra stands for until it is done."""
    width = tensor.spec.dtype.itemsize
    return (max(COMPUTE_BYTES, width) + width) * tensor.spec.numel


@dataclass(frozen=True)
class Linear(Term):
    """θ₀ + Σ_j c_j τ_j, with (N,) coefficients c."""

    coefficients: Tensor

    def write(self, operators: Operators, group: Group, outs: Sequence[Tensor]) -> Written:
        if group.factored:
            return _by_factors(operators, group, self.coefficients, None, outs)
        return Written(operators.combine(group.bases, group.experts, self.coefficients, None, None, None, outs))


@dataclass(frozen=True)
class Unchanged(Term):
    """θ₀, which all experts have: it goes from the source to the sink."""


@dataclass(frozen=True)
class RowWeights:
    """Weights of residuals in row r: W_ri ∝ w_i ‖row r of s_i X_i‖^p, Σ_i W_ri = 1, from w (N,), s (N,) and p.

    The matching scales s enter the weights alone: there they keep one generator from dominating, and residuals stay as
    long as they are.
    """

    weights: Tensor
    scales: Tensor
    power: float


@dataclass(frozen=True)
class LowRank(Term):
    """θ₀ + Σ_j c_j τ_j + Σ_i scale_i · left_i right_i.

    Attributes:
        coefficients: (N,) c.
        factors: of each of the L tensors; none where no residual is beyond rounding. Of a part its rows of left ones
            and its columns of right ones.
        scale: (N,).
        rows: how rows of left factors are weighted; ``None``: all alike.
        lengths: (N, m) of all rows of a tensor's residuals, where it comes in parts; else they are worked out here.
        rounded: whether what is added is the product of factors in bfloat16.
    """

    coefficients: Tensor
    factors: Sequence[Factors]
    scale: Tensor
    rows: RowWeights | None
    lengths: Tensor | None = None
    rounded: bool = False

    @staticmethod
    def block_elements(tensor: PlannedTensor) -> int | None:
        columns = tensor.matrix_shape[1]
        return product_height(columns) * columns

    def write(self, operators: Operators, group: Group, outs: Sequence[Tensor]) -> Written:
        if not self.factors:
            return Linear(self.coefficients).write(operators, group, outs)
        products = self.products(operators, group.bases[0].device, group.rows)
        if group.factored:
            residual = None if self.rows is None else Measured([products.squares()], _as_they_are)
            return _by_factors(operators, group, self.coefficients, products, outs, residual)
        squares: list[Tensor] = []
        group, outs = group.in_rows(outs)
        wanted = None if self.rows is None else squares
        found = operators.combine(group.bases, group.experts, self.coefficients, *products, outs, wanted)
        return Written(found, Measured(squares, _as_they_are) if squares else None)

    def products(self, operators: Operators, device: torch.device, rows: slice | None = None) -> low_rank.Products:
        """Σ_i scale_i · left_i right_i of all L tensors, rows of left factors weighted, and rounded; there are some.

        Args:
            operators: who weighs them.
            device: where they are wanted.
            rows: which rows of a single tensor the left ones are; ``None``: all.
        """
        widest = max(factors.left.shape[2] for factors in self.factors)
        # Rows, as kernels have them; where tensors kept unlike numbers of components, with zeros below.
        lefts = [_rows(factors.left.to(device).mT, widest) for factors in self.factors]
        left, right = stacked(lefts).mT, stacked([_rows(factors.right.to(device), widest) for factors in self.factors])
        scale: Tensor | None = self.scale
        if self.rows is not None:
            if self.lengths is None:
                known = [(factors.orthogonal_rows, factors.orthonormal_rows) for factors in self.factors]
                # A tensor's numbers do not depend on what is known of others in its group.
                of_kind = {kind: operators.row_lengths(left, right, *kind) for kind in set(known)}
                alike = of_kind[known[0]]
                lengths = alike if len(of_kind) == 1 else stacked([of_kind[one][at] for at, one in enumerate(known)])
            else:
                lengths = self.lengths[:, rows or slice(None)].unsqueeze(0).to(device)
            rule = (self.rows.weights, self.rows.scales, self.rows.power)
            left = operators.weigh_rows(
                left, lengths, *rule, self.scale, torch.bfloat16 if self.rounded else left.dtype
            )
            scale = None
        products = low_rank.Products(left, right, scale)
        return products.rounded() if self.rounded else products


def _as_they_are(squares: Tensor) -> Tensor:
    return squares


def _by_factors(
    operators: Operators,
    group: Group,
    coefficients: Tensor,
    products: low_rank.Products | None,
    outs: Sequence[Tensor],
    residual: Measured | None = None,
) -> Written:
    """A linear term, by row or not, with truncated residuals or without, of task vectors that are factors."""
    m, _ = group.tensors[0].matrix_shape
    bases = group.bases if group.part is None else [base.view(-1, group.width) for base in group.bases]
    outs = outs if group.part is None else [out.view(-1, group.width) for out in outs]
    squares = low_rank.base_squares(bases, flat=False)  # before one of them is written to
    where = (group.compute_dtype, group.rows, group.columns)
    left, right = low_rank.columns(group.experts, m, coefficients, products, *where)
    return Written(low_rank.combine(operators, bases, left, right, outs), residual, squares)


def _rows(factor: Tensor, rank: int) -> Tensor:
    """(N, r, n) with zeros up to ``rank`` rows."""
    return functional.pad(factor, (0, 0, 0, rank - factor.shape[1])) if factor.shape[1] < rank else factor


@dataclass(frozen=True)
class ByRows(Term):
    """θ₀ + λ τ_core + η Σ_i W_i ∘ X_i: whole residuals X_i = Σ_j M_ji τ_j, weighted by row.

    Attributes:
        core: (N,) λ c.
        mixing: (N, N) M.
        rows: how rows are weighted.
        eta: η.
        grams: (P, m) Gram matrices of each tensor's rows, as step 1 left them; ``None`` where it did not.
    """

    core: Tensor
    mixing: Tensor
    rows: RowWeights
    eta: float
    grams: Sequence[Tensor | None]

    @staticmethod
    def block_elements(tensor: PlannedTensor) -> int | None:
        return row_block_elements(*tensor.matrix_shape)

    def write(self, operators: Operators, group: Group, outs: Sequence[Tensor]) -> Written:
        if group.factored:
            grams, coefficients = self.by_factors(operators, group)
            at = group.rows or slice(None)
            residual = Measured([grams[:, :, at], coefficients[:, at]], self._squares)
            return _by_factors(operators, group, coefficients, None, outs, residual)
        known = [rows.to(outs[0].device, non_blocking=True) for rows in self.grams if rows is not None]
        if group.rows is not None:
            known = [rows[:, group.rows] for rows in known]
        group, outs = group.in_rows(outs)
        whole = len(known) == len(outs)
        grams = stacked(known) if whole else operators.row_grams(group.bases, group.experts).rows
        coefficients = self._coefficients(operators, grams, group.compute_dtype)
        largest = operators.combine(group.bases, group.experts, coefficients, None, None, None, outs)
        return Written(largest, Measured([grams, coefficients], self._squares))

    def by_factors(self, operators: Operators, group: Group) -> tuple[Tensor, Tensor]:
        """Rows' Gram matrices, (L, P, m), and coefficients, (L, m, N), of whole tensors whatever the part is."""
        grams = low_rank.row_grams(group.experts, group.tensors[0].matrix_shape[0])
        return grams, self._coefficients(operators, grams, group.compute_dtype)

    def _coefficients(self, operators: Operators, grams: Tensor, dtype: torch.dtype) -> Tensor:
        rule = (self.rows.weights, self.rows.scales, self.eta, self.rows.power, dtype)
        return operators.row_coefficients(grams, self.core, self.mixing, *rule)

    def _squares(self, grams: Tensor, coefficients: Tensor) -> Tensor:
        """‖row of the residual term‖², (L, m), from (L, P, m) and (L, m, N)."""
        shares = (coefficients - self.core).mT
        pairs = torch.tril_indices(len(self.core), len(self.core))
        twice = torch.where(pairs[0] == pairs[1], 1.0, 2.0).view(-1, 1)
        return (grams * twice * shares[:, pairs[0]] * shares[:, pairs[1]]).sum(dim=1)


@dataclass(frozen=True)
class Flat(Term):
    """θ₀ + Σ_j c_j τ_j with all singular values of the sum set to their mean, with (N,) coefficients c."""

    coefficients: Tensor

    @staticmethod
    def block_elements(tensor: PlannedTensor) -> int | None:
        return None

    @staticmethod
    def workspace_bytes(tensor: PlannedTensor, experts: int) -> int:
        return max(0, spectra.flattening_bytes(tensor.matrix_shape) - _result_bytes(tensor))

    def write(self, operators: Operators, group: Group, outs: Sequence[Tensor]) -> Written:
        largest = []
        # Three of each.
        size = max(1, FLAT_ELEMENTS // max(1, outs[0].numel()))
        for start in range(0, len(outs), size):
            some = slice(start, start + size)
            bases, experts = group.bases[some], [expert[some] for expert in group.experts]
            changes = operators.weighted_sum(bases, experts, self.coefficients, torch.float64)
            largest.append(operators.add(bases, spectra.flattened(changes), outs[some]))
        return Written(torch.cat(largest))


@dataclass(frozen=True)
class Descent(Term):
    """θ₀ + λ X_T, where descent from the core on the task vectors' interference is after T steps.

    Attributes:
        core, weights: (N,) c, where it starts, and w, what each expert's loss counts.
        core_scale: λ.
        steps: T.
    """

    core: Tensor
    weights: Tensor
    core_scale: float
    steps: int

    @staticmethod
    def block_elements(tensor: PlannedTensor) -> int | None:
        return None

    @staticmethod
    def workspace_bytes(tensor: PlannedTensor, experts: int) -> int:
        taken = descent.workspace_elements(experts, *tensor.matrix_shape) * torch.float64.itemsize
        return max(0, taken - _result_bytes(tensor))

    def write(self, operators: Operators, group: Group, outs: Sequence[Tensor]) -> Written:
        largest, one = [], torch.ones(1, dtype=torch.float64)
        size = max(1, FLAT_ELEMENTS // max(1, outs[0].numel() * len(group.experts)))
        for start in range(0, len(outs), size):
            some = slice(start, start + size)
            bases, experts = group.bases[some], [expert[some] for expert in group.experts]
            each = [operators.weighted_sum(bases, [expert], one, torch.float64) for expert in experts]
            changes = torch.stack(each, dim=1)
            del each
            moved = descent.descended(changes, self.core, self.weights, self.steps)
            largest.append(operators.add(bases, moved.mul_(self.core_scale), outs[some]))
        return Written(torch.cat(largest))


@dataclass(frozen=True)
class ByElements(Term):
    """θ₀ + λ times the mean, by (N,) weights, of what a rule leaves of the task vectors' elements."""

    weights: Tensor
    core_scale: float
    rule: elements.Rule

    @staticmethod
    def block_elements(tensor: PlannedTensor) -> int | None:
        return BLOCK_ELEMENTS

    def write(self, operators: Operators, group: Group, outs: Sequence[Tensor]) -> Written:
        return Written(elements.combine(operators, group, outs, self.weights, self.core_scale, self.rule))


@dataclass(frozen=True)
class MatchedColumns(Term):
    """A term whose change has columns as long as the experts', which count ``counts`` (N,)."""

    term: Term
    counts: Tensor

    @staticmethod
    def block_elements(tensor: PlannedTensor) -> int | None:
        return None

    def write(self, operators: Operators, group: Group, outs: Sequence[Tensor]) -> Written:
        merged = [torch.empty(out.shape, dtype=group.compute_dtype, device=out.device) for out in outs]
        before = self.term.write(operators, group, merged)
        largest = operators.match_columns(group.bases, group.experts, merged, self.counts, outs)
        return before._replace(largest=largest)


def kind_of(tensor: PlannedTensor, config: MergeConfig) -> type[Term]:
    """What a matrix or vector becomes, which decides whether it may be cut."""
    if tensor.role == "matrix" and config.scale == "column":
        return MatchedColumns
    return unmatched(tensor, config)


def unmatched(tensor: PlannedTensor, config: MergeConfig) -> type[Term]:
    """The same before columns are matched."""
    if config.elementwise != "none":
        return ByElements
    if tensor.unchanged and not tensor.apart:
        return Unchanged
    if tensor.role == "vector":
        return Linear
    if config.descent_steps:
        return Descent
    if config.core_spectrum == "flat":
        return Flat
    if config.eta == 0:
        return Linear
    if not tensor.whole:
        return LowRank
    return ByRows if weighted_by_rows(tensor, config) else Linear


def by_factors(tensor: PlannedTensor, config: MergeConfig) -> bool:
    """Whether what a tensor becomes can be made of its task vectors' factors."""
    return tensor.factored and kind_of(tensor, config) in (Unchanged, Linear, LowRank, ByRows)


@dataclass(frozen=True)
class Terms:
    """Makes the terms of one merge.

    Attributes:
        findings: of steps 1–3.
        residuals: of step 4.
        config: of the merge.
        factors: the low-rank factors of a tensor, or those of some rows and columns; ``None`` where it has none.
        lengths: (N, m) of the rows of its truncated residuals, for one that comes in parts.
        rows: Gram matrices of a tensor's rows, by its name; ``None`` where they are not known.
        apart: whether truncated residuals are wanted as factors, also where these hold them whole.
        truncated: whether truncated residuals are added; whole ones are in any case.
    """

    findings: Findings
    residuals: Residuals
    config: MergeConfig
    factors: Callable[[PlannedTensor, slice | None, slice | None], Factors | None]
    lengths: Callable[[PlannedTensor], Tensor | None]
    rows: Callable[[str], Tensor | None]
    apart: bool = False
    truncated: bool = True

    def taken_apart(self) -> Terms:
        """Those of the same merge with truncated residuals as factors."""
        return replace(self, apart=True)

    def without_truncated(self) -> Terms:
        """Those of the same merge whose truncated residuals are elsewhere."""
        return replace(self, truncated=False)

    def planned(self, tensor: PlannedTensor) -> PlannedTensor:
        """A tensor as this merge has it."""
        apart = self.apart and tensor.role == "matrix" and (self.truncated or not tensor.unchanged)
        return replace(self.findings.at(tensor, self.config), apart=apart)

    def alike(self, group: Group) -> list[list[int]]:
        """Places of those tensors of a group that have one term.

        Where their changes are scaled by numbers of their own each has its own; else all, but for whether what is added
        of them is rounded.
        """
        places = range(len(group.tensors))
        if self.config.scale == "layer" and group.tensors[0].role == "matrix":
            return [[place] for place in places]
        rounded = self.rounded(group.tensors)
        return [[place for place in places if rounded[place] == kind] for kind in sorted(set(rounded))]

    def rounded(self, tensors: Sequence[PlannedTensor]) -> list[bool]:
        """Whether truncated residuals of tensors of one shape and rank are added as products of factors in bfloat16.

        Where a fast truncation cut off far more than that rounds, of every expert: merge and adapters take the same.
        """
        first, config = tensors[0], self.config
        truncated = unmatched(first, config) is LowRank and not first.factored and config.spectrum == "truncate"
        names = [one.name for one in tensors if one.name in self.residuals.energies]
        fast = truncated and names and config.svd == "randomized"
        if not fast or truncation.exactly(first.matrix_shape, first.rank, config):
            return [False] * len(tensors)
        energies = self.residuals.energies, self.findings.residual_energies
        kept, whole = (torch.stack([of_all[name] for name in names]) for of_all in energies)
        cut_off = dict(zip(names, (kept <= (1 - CUT_OFF) * whole).all(dim=1).tolist(), strict=True))
        return [cut_off.get(one.name, False) for one in tensors]

    def of(self, group: Group) -> Term:
        """The term of tensors of one role, shape and rank that are :meth:`alike`."""
        first, strength = group.tensors[0], self.residuals.strength
        lengthened = self.lengthened(first)
        term = self._plain(group, lengthened * strength.core_scale, lengthened * strength.eta)
        # Where the core is made of no task vector there is no length to match: the change stays as it is.
        if kind_of(first, self.config) is MatchedColumns and bool(self.findings.real.core.any()):
            return MatchedColumns(term, self.findings.real.core.abs())
        return term

    def lengthened(self, tensor: PlannedTensor) -> float:
        """By what the change of a tensor is scaled as a whole."""
        if tensor.role != "matrix" or self.config.scale != "layer":
            return 1.0
        return gain(self.findings.grams[tensor.name], self.findings.real.weights)

    def _plain(self, group: Group, core_scale: float, eta: float) -> Term:
        real, scales, config = self.findings.real, self.residuals.scales, self.config
        tensors, first, weights, core = group.tensors, group.tensors[0], real.weights, core_scale * real.core
        kind = unmatched(first, config)
        if kind is Unchanged:
            return Unchanged()
        if kind is ByElements:
            return ByElements(weights, core_scale, elements.Rule.of(config, self.findings.thresholds))
        if kind is Descent:
            return Descent(real.core, weights, core_scale, config.descent_steps)
        if first.role == "vector":  # λ · mean + η Σ_i w_i s_i (τ_i − mean), the mean being Σ w_j τ_j
            return Linear(core_scale * weights + eta * weights * (scales - weights @ scales))
        # Where η came out as 0 nothing is weighted: the residual term is rounding.
        rows = RowWeights(weights, scales, config.row_power) if config.row_power > 0 and eta != 0 else None
        eta = eta if rows is None else eta * shared_weight(weights, scales)
        if kind is ByRows and rows is not None:
            return ByRows(core, real.mixing, rows, eta, [self.rows(tensor.name) for tensor in tensors])
        # Where nothing is truncated: λ c + η M (w s).
        coefficients = core + eta * (real.mixing @ (weights * scales)) if first.whole else core
        if kind is Flat:
            return Flat(len(core) * coefficients)
        if kind is not LowRank:
            return Linear(coefficients)
        wanted = tensors if eta != 0 and self.truncated else []
        factors = [one for tensor in wanted if (one := self.factors(tensor, group.rows, group.columns)) is not None]
        lengths = self.lengths(first) if factors and rows is not None and group.part is not None else None
        scale = eta * (weights * scales if rows is None else torch.ones_like(scales))
        single = bool(factors) and factors[0].left.dtype == torch.float32
        return LowRank(coefficients, factors, scale, rows, lengths, single and self.rounded([first])[0])
