"""What a backend provides: the operators, what is particular about it, and what its truncation gives.

Most operators work on L tensors of one shape at once. ``bases`` holds those of θ₀ and ``experts`` N sequences of L
tensors, of any floating dtypes and layouts, all on one device; a tensor is seen as m × n, its first dimension by the
rest. They are computed in float32, in float64 where one of them is, and are not written to. Small tensors (``core``,
``mixing``, ``scale``, …) are float64 and may lie on the CPU. :mod:`r2m_kernels.ops` has checked what comes from
outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._stream.stored import Matrix, StoredMatrix

# Shares of the short side beyond which a CPU's truncation takes a step of subspace iteration more.
MORE_STEPS = (0.15, 0.45, 0.6)
# Longest short side whose Gram stands in for two products: it takes 8 MiB in float32, as the smallest budgets bear it.
GRAM_SIDE = 1448
# Of the products that make a Gram: those of its blocks on the diagonal and below.
GRAM_SHARE = 0.625
# Of the work with A and Aᵀ, what that with a Gram may be: the former may have operands that a CPU multiplies faster.
GRAM_WORK = 0.6
# Steps from a sketch of A, from which on one fewer will do from a sketch of AᵀA.
FROM_GRAM_STEPS = 3
# The share beyond which an exact one is no slower.
MOST = 0.7
# Ranks below this have a sketch that is much wider, and as small: the luck of the draw evens out over many rows only.
FEW = 64
FEW_RATIO = 1.4
ROWS_MULTIPLE = 8  # BLAS runs better there
# Where a greater share of a residual's energy than this is cut off, products may have operands in bfloat16: the last
# one of a truncation, and that of its factors. Each rounds 2e-3 of the residual's length; the error of the truncation
# is 1.0003 times as large at most.
CUT_OFF = 2.0**-6


def sketch_rows(rank: int, oversampling: int) -> int:
    """Rows of the first sketch of a CPU's fast truncation."""
    wanted = (FEW_RATIO * rank if rank < FEW else rank) + oversampling
    return -(-int(wanted) // ROWS_MULTIPLE) * ROWS_MULTIPLE


def spans(rank: int, oversampling: int, short: int) -> bool:
    """Whether so much of a matrix is kept that a fast truncation would save nothing."""
    return rank > MOST * short or sketch_rows(rank, oversampling) >= short


class Traits(NamedTuple):
    """What is particular about a backend.

    Attributes:
        groups_tensors: it wants tensors in groups, those of one shape for a launch; else one by one, on threads.
        independent_pairs: an entry of the task Gram depends on its two experts alone and not on who else is there.
        takes_tolerance: ``shifted_truncation`` can stop early.
        gap_basis: what its estimate of the gap rests on, as the report says it.
    """

    groups_tensors: bool
    independent_pairs: bool
    takes_tolerance: bool
    gap_basis: str


class Grams(NamedTuple):
    """Of L tensors, from one read.

    Attributes:
        tasks: (L, N, N) float64, ⟨τ_li, τ_lj⟩, symmetric up to rounding; NaN and Inf in an input show in it.
        base: (L,) float64, ‖θ₀‖² to 1e-5 of itself.
    """

    tasks: Tensor
    base: Tensor


class RowGrams(NamedTuple):
    """Of the rows of L tensors of one shape; P = N(N+1)/2 pairs, (i, j ≤ i) at i(i+1)/2 + j.

    Attributes:
        rows: (L, P, m) float64, products of row r of τ_li and of τ_lj.
        base: (L,) float64, ‖θ₀‖² to 1e-5 of itself.
        sums: (L, P), what ``sum_rows`` gives of the rows, where it came with them.
    """

    rows: Tensor
    base: Tensor
    sums: Tensor | None = None


class ShiftedFactors(NamedTuple):
    """Truncated residuals of L tensors, F_li = left_li right_li.

    Attributes:
        left: (L, N, m, r).
        right: (L, N, r, n); the factor on the short side has orthonormal vectors.
        ordered: components come by descending singular value.
        products: (L, N, N) float64, ⟨F_li, F_lj⟩; None where they are not wanted, or not cheap here.
        trusted: (L, N) bool, whether each truncation can be relied on.
        gap: (L, N) float64, an estimate of the energy that the best truncation would keep beyond this one's;
            NaN where there is none.
        energies: (L, N) float64, ‖F_li‖²; None where they are not cheap here.
    """

    left: Tensor
    right: Tensor
    ordered: bool
    products: Tensor | None
    trusted: Tensor
    gap: Tensor
    energies: Tensor | None = None


class Effort(NamedTuple):
    """How hard a truncation tries: options of :class:`r2m_kernels.MergeConfig`; a backend may do without some."""

    iterations: int
    oversampling: int
    tolerance: float | None
    products: bool = True  # whether inner products of truncated residuals are wanted, beside their energies
    # Residuals are taken to have fewer directions than the rank: a sketch in full precision has them all, or nothing is
    # trusted. Asked of backends that group tensors, for residuals that were too steep.
    few_directions: bool = False
    # No Gram matrix, which does not tell small singular values from rounding, is an operand, and what is lost is told
    # precisely. Asked of such backends, too, for residuals that were neither trusted nor of few directions.
    carefully: bool = False

    def more_steps(self, rank: int, short: int) -> int:
        """Those that :data:`MORE_STEPS` adds."""
        return sum(rank > share * short for share in MORE_STEPS)

    def steps_on_cpu(self, rank: int, short: int) -> int:
        """Of subspace iteration, of matrices with such a short side, by a CPU's fast method.

        At small ranks, where its blocks are wider, one step does what two do without. The more of all directions are
        kept, the less the last of them stands out: the steps that :data:`MORE_STEPS` adds hold the error below 1.02
        times the optimum's.
        """
        if rank < FEW:
            return -(-self.iterations // 2)
        return self.iterations + self.more_steps(rank, short)

    def by_gram(self, rank: int, shape: Sequence[int]) -> bool:
        """Whether those steps multiply with AᵀA, formed once, and not with A and Aᵀ: where that is well less work."""
        direct, formed = self._work(rank, shape)
        return rank >= FEW and min(shape) <= GRAM_SIDE and formed < GRAM_WORK * direct

    def from_gram(self, rank: int, shape: Sequence[int]) -> bool:
        """Whether steps with AᵀA, from a sketch of it, are less work; where spectra fall slowly they are taken.

        A tolerance asks for steps that all residuals take together.
        """
        steps = self.steps_on_cpu(rank, min(shape))
        enough = rank >= FEW and steps >= FROM_GRAM_STEPS and self.tolerance is None
        direct, formed = self._work(rank, shape, steps - 1)
        return enough and min(shape) <= GRAM_SIDE and formed < direct

    def passes_on_cpu(self, rank: int, shape: Sequence[int]) -> int:
        """Over A, from its sketch to the last step; where its spectrum falls slowly, beside a run that tells it."""
        if self.from_gram(rank, shape):
            return 1
        return 2 if self.by_gram(rank, shape) else 1 + self.steps_on_cpu(rank, min(shape))

    def work_on_cpu(self, rank: int, shape: Sequence[int]) -> int:
        """Multiplications and additions, two each, of a fast truncation's steps, likewise."""
        if self.from_gram(rank, shape):
            return self._work(rank, shape, self.steps_on_cpu(rank, min(shape)) - 1)[1]
        return self._work(rank, shape)[self.by_gram(rank, shape)]

    def _work(self, rank: int, shape: Sequence[int], with_gram: int | None = None) -> tuple[int, int]:
        """With A and Aᵀ, and with AᵀA, in as many steps or another number."""
        short, long = sorted(shape)
        steps = self.steps_on_cpu(rank, short)
        fewer = steps if with_gram is None else with_gram
        return 4 * steps * rank * short * long, int(2 * short**2 * (GRAM_SHARE * long + fewer * rank))


class Pace(NamedTuple):
    """How much of a truncation from storage is at work at once; it touches no bit.

    Attributes:
        experts: how many have their subspaces found in one pass over the inputs.
        panels: of a pass over the inputs.
    """

    experts: int
    panels: int


class ResidualGroup(NamedTuple):
    """Matrices of one shape whose residuals are to be truncated.

    Attributes:
        bases, experts: L tensors of two dimensions or more, with a short side of more than ``rank``, and N of each.
        keys: (L,) int64, what the random numbers of each tensor are made from.
        energies: (L, N) float64, ‖X_li‖² from the task Gram.
        rank: r.
    """

    bases: Sequence[Tensor]
    experts: Sequence[Sequence[Tensor]]
    keys: Tensor
    energies: Tensor
    rank: int


class ShiftedTruncation(Protocol):
    """A backend's fast method for step 3 (README §4)."""

    def __call__(self, groups: Sequence[ResidualGroup], mixing: Tensor, effort: Effort) -> list[ShiftedFactors]:
        """Near-optimal rank-r approximations of X_li = Σ_j mixing[j, i] τ_lj; none depends on other tensors or groups.

        Args:
            groups: each of a shape of its own, all of one dtype.
            mixing: (N, N).
            effort: how hard to try.
        """
        ...


class Operators(Protocol):
    """A backend module: the heavy part of each step."""

    @property
    def traits(self) -> Traits:
        """What is particular about this backend."""
        ...

    def task_gram(self, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], precise: bool = False) -> Grams:
        """⟨τ_li, τ_lj⟩ and ‖θ₀‖².

        Args:
            bases, experts: of any shapes, which may differ between the L tensors.
            precise: differences and sums in float64; else |error| ≤ 16·2⁻²⁴ · |A||A|ᵀ.
        """
        ...

    def gram_panel_elements(self, precise: bool) -> int:
        """Elements of a panel: the Gram of a flat tensor is the sum of its panels' in their order, to the bit."""
        ...

    def row_grams(self, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> RowGrams:
        """Products of rows of the task vectors, differences and sums in float64.

        A row's numbers depend on that row alone: a tensor may come in parts of whole rows.
        """
        ...

    def sum_rows(self, rows: Tensor) -> Tensor:
        """Σ_r of (L, P, m) float64: (L, P), in an order that depends on m alone and not on L."""
        ...

    def row_coefficients(
        self,
        rows: Tensor,
        core: Tensor,
        mixing: Tensor,
        weights: Tensor,
        scales: Tensor,
        eta: float,
        power: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Coefficients of θ₀ + Σ_j core_j τ_j + eta Σ_i W_i ∘ X_i, W_ri ∝ weights_i ‖row r of scales_i X_i‖^power.

        K_rj = core_j + eta Σ_i mixing_ji W_ri with Σ_i W_ri = 1, and W_ri = weights_i where nobody has a residual. The
        matching scales enter the weights alone: there they keep one generator from dominating, and residuals stay as
        long as they are. float64 inside; a row's numbers depend on that row alone.

        Args:
            rows: (L, P, m) of :meth:`row_grams`; ‖row r of X_i‖² = m_iᵀ G_r m_i, at least 0.
            core: (N,) λ c.
            mixing: (N, N) M, X_i = Σ_j M_ji τ_j.
            weights: (N,) w, summing to 1.
            scales: (N,) s.
            eta: η.
            power: p ≥ 0.
            dtype: of the result, what the tensors are computed in.

        Returns:
            (L, m, N), for :meth:`combine`.
        """
        ...

    def residual_matmul(
        self,
        bases: Sequence[Matrix],
        experts: Sequence[Sequence[Matrix]],
        mixing: Tensor,
        rhs: Tensor,
        transpose: bool = False,
        precision: str = "ieee",
    ) -> Tensor:
        """X_li · rhs_li, (L, N, m, k), or X_liᵀ · rhs_li, (L, N, n, k), in float32 (float64 if an input is).

        Args:
            bases, experts: tensors of one shape, on a CPU also matrices where they are stored; no residual is stored.
            mixing: (N, N).
            rhs: (L, N, n, k), or (L, N, m, k) with ``transpose``; float32 or float64.
            transpose: multiply with X_liᵀ.
            precision: of the operands on matrix units, at least: one of :data:`r2m_kernels.ops.PRECISIONS`.
        """
        ...

    def residual_matrices(self, base: Matrix, experts: Sequence[Matrix], mixing: Tensor) -> list[StoredMatrix]:
        """The residuals of one tensor on a CPU, each as a matrix of its own that is formed where it is read.

        Args:
            base, experts, mixing: as of :meth:`residual_matmul`.
        """
        ...

    def orthonormalize(self, y: Tensor, *, overwrite: bool = False) -> Tensor:
        """Orthonormal columns with the range of each (…, m, k) block, k ≤ m; zeros for one that is all zero.

        Args:
            overwrite: the result may take the memory of y.
        """
        ...

    @property
    def shifted_truncation(self) -> ShiftedTruncation:
        """The fast method for step 3."""
        ...

    def truncate_by_expert(
        self,
        base: Matrix,
        experts: Sequence[Matrix],
        mixing: Tensor,
        key: int,
        energies: Tensor,
        rank: int,
        effort: Effort,
        pace: Pace,
    ) -> Iterator[ShiftedFactors]:
        """What :attr:`shifted_truncation` of a CPU's backend makes of one matrix, to the bit, an expert after another.

        Args:
            base, experts: matrices, which may stay where they are stored: they are read a block at a time.
            mixing, key, rank, effort: see there; with a tolerance experts decide together when to stop.
            energies: (N,) float64, as there.
            pace: how much is at work at once.
        """
        ...

    def row_lengths(self, left: Tensor, right: Tensor, orthogonal: bool, orthonormal: bool = False) -> Tensor:
        """‖row of left_li right_li‖: (L, N, m) float64 where they are.

        A matrix's numbers depend on it alone.

        Args:
            left, right: (L, N, m, r) and (L, N, r, n).
            orthogonal: the rows of each right factor are, to the compute dtype's rounding.
            orthonormal: and of length 1, so that a backend may do without right factors.
        """
        ...

    def weigh_rows(
        self,
        left: Tensor,
        lengths: Tensor,
        weights: Tensor,
        scales: Tensor,
        power: float,
        factors: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Left factors with row r times the share W_ri of :meth:`row_coefficients`, X_i being left_i right_i.

        Args:
            left: (L, N, m, r), or some of their rows.
            lengths: (L, N, m) float64, ‖row r of X_i‖ of those, of :meth:`row_lengths`.
            weights, scales, power: see there.
            factors: (N,), what all rows of an expert are multiplied by then.
            dtype: of the result: the factors', or bfloat16 of those in float32.

        Returns:
            (L, N, m, r).
        """
        ...

    def combine(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        coefficients: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        scale: Tensor | None,
        outs: Sequence[Tensor],
        squares: list[Tensor] | None = None,
    ) -> Tensor:
        """θ₀ + Σ_j c_j τ_lj + Σ_i scale_i · left_li right_li into each out, rounded once to its dtype.

        An expert whose coefficient is 0 is not read, where there is one coefficient for a whole group.

        Args:
            bases, experts: tensors of one shape.
            coefficients: (N,), or (L, m, N) in the compute dtype: one of each row.
            left, right: (L, N, m, r) and (L, N, r, n), or None both; in bfloat16, products have such operands, and sums
                in the compute dtype.
            scale: (N,); None where factors are to be added as they are, as those in bfloat16 have to be.
            outs: L tensors of that shape, of any dtype and layout; one may be an input of its own tensor.
            squares: takes numbers, (L, …) float64, of which each tensor's add up to ‖Σ_i scale_i · left_i right_i‖² of
                factors that are given.

        Returns:
            (L,) largest magnitudes, as of all operators that write.
        """
        ...

    def match_columns(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        merged: Sequence[Tensor],
        counts: Tensor,
        outs: Sequence[Tensor],
    ) -> Tensor:
        """Every column of the merged changes scaled to Σ_j counts_j ‖column of τ_lj‖ / Σ_j counts_j.

        Args:
            bases, experts: tensors of one shape (m, …); columns are indices of all dimensions but the first.
            merged: L θ* in the compute dtype, contiguous; may be overwritten.
            counts: (N,), none negative.
            outs: L contiguous tensors. A factor is at most :data:`r2m_kernels.update_scale.MOST`; a column that did not
                change stays.

        Returns:
            (L,) largest magnitudes.
        """
        ...

    def count_magnitudes(
        self, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], upper: Tensor | None, counts: Tensor
    ) -> None:
        """Add to counts how many elements of the task vectors there are of each magnitude.

        Args:
            bases, experts: of any shapes, which may differ between the L tensors.
            upper: None: count the upper 16 bits of |τ| as float32; (N,) int64: the lower 16 bits of those elements of
                expert j whose upper ones are upper_j.
            counts: (N, 65536) int64 on the inputs' device, written to by one call at a time.
        """
        ...

    def combine_ties(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        weights: Tensor,
        scale: float,
        thresholds: Tensor,
        outs: Sequence[Tensor],
    ) -> Tensor:
        """θ₀ + scale · the weighted mean, element by element, of those τ_j that agree in sign with their sum.

        Elements with |τ_j| (as float32) below the threshold count as 0; what is no multiple of the sum's sign is not in
        the mean, and where none is, it is 0.

        Args:
            weights: (N,) w, summing to 1: of sum and mean.
            scale: λ.
            thresholds: (N,) float32.
            outs: L contiguous tensors.

        Returns:
            (L,) largest magnitudes.
        """
        ...

    def combine_dare(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        weights: Tensor,
        scale: float,
        density: float,
        keys: Tensor,
        first: int,
        outs: Sequence[Tensor],
    ) -> Tensor:
        """θ₀ + scale · Σ_j w_j τ_j / density over the elements that the masks keep.

        Element e of expert j is kept where hash(keys_lj, e) < ⌊density · 2³²⌋, the upper 32 bits of splitmix64: with
        z = key + 0x9E3779B97F4A7C15 · (e + 1) modulo 2⁶⁴, z = (z ^ z >> 30) · 0xBF58476D1CE4E5B9, z = (z ^ z >> 27) ·
        0x94D049BB133111EB, z ^= z >> 31. Every backend and the reference draw the same.

        Args:
            weights: (N,) w, summing to 1.
            scale: λ.
            density: share of elements that are kept, in (0, 1].
            keys: (L, N) int64.
            first: place in the whole tensor of these tensors' first element.
            outs: L contiguous tensors.

        Returns:
            (L,) largest magnitudes.
        """
        ...

    def weighted_sum(
        self, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], coefficients: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Σ_j coefficients_j τ_lj of tensors of one shape, (L, m, n), differences and sums in ``dtype``."""
        ...

    def add(self, bases: Sequence[Tensor], changes: Tensor, outs: Sequence[Tensor]) -> Tensor:
        """θ₀ + change, (L, m, n) float32 or float64, summed in the wider of its dtype and the compute dtype.

        Returns:
            (L,) largest magnitudes of the contiguous ``outs``.
        """
        ...

    def mean(self, experts: Sequence[Sequence[Tensor]], weights: Tensor, outs: Sequence[Tensor]) -> Tensor:
        """Σ_j weights_j θ_lj with sums in float64.

        θ₀ plus rounded differences could turn a variance negative.

        Args:
            experts: N sequences of L tensors of one shape.
            weights: (N,) w, summing to 1.
            outs: L contiguous tensors.

        Returns:
            (L,) largest magnitudes.
        """
        ...
