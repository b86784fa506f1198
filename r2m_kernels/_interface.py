"""What a backend provides: the operators, what is particular about it, and what its truncation gives.

Most operators work on L tensors of one shape at once. ``bases`` holds those of θ₀ and ``experts`` N sequences of L
tensors, of any floating dtypes and layouts, all on one device; a tensor is seen as m × n, its first dimension by the
rest. They are computed in float32, in float64 where one of them is, and are not written to. Small tensors (``core``,
``mixing``, ``scale``, …) are float64 and may lie on the CPU. :mod:`r2m_kernels.ops` has checked what comes from
outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Traits(NamedTuple):
    """What is particular about a backend.

    Attributes:
        groups_tensors: it wants tensors of one shape in groups, each a launch; else one by one, on several threads.
        independent_pairs: an entry of the task Gram depends on its two experts alone and not on who else is there.
        orders_components: factors of ``shifted_truncation`` come by descending singular value.
        takes_tolerance: ``shifted_truncation`` can stop early.
        gap_basis: what its estimate of the gap rests on, as the report says it.
    """

    groups_tensors: bool
    independent_pairs: bool
    orders_components: bool
    takes_tolerance: bool
    gap_basis: str


class ShiftedFactors(NamedTuple):
    """Truncated residuals of L tensors, F_li = left_li right_li.

    Attributes:
        left: (L, N, m, r).
        right: (L, N, r, n); the factor on the short side has orthonormal vectors.
        products: (L, N, N) float64 on the CPU, ⟨F_li, F_lj⟩; None where they are not cheap here.
        trusted: (L, N) bool on the CPU, whether each truncation can be relied on.
        gap: (L, N) float64 on the CPU, an estimate of the energy that the best truncation would keep beyond this one's;
            NaN where there is none.
    """

    left: Tensor
    right: Tensor
    products: Tensor | None
    trusted: Tensor
    gap: Tensor


class Effort(NamedTuple):
    """How hard a truncation tries: options of :class:`r2m_kernels.MergeConfig`; a backend may do without some."""

    iterations: int
    oversampling: int
    tolerance: float | None


class ShiftedTruncation(Protocol):
    """A backend's fast method for step 3 (README §4)."""

    def __call__(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        mixing: Tensor,
        keys: Tensor,
        energies: Tensor,
        rank: int,
        effort: Effort,
    ) -> ShiftedFactors:
        """Near-optimal rank-r approximations of X_li = Σ_j mixing[j, i] τ_lj; none depends on the rest of the group.

        Args:
            bases, experts: tensors of one shape with two dimensions or more, and a short side of more than ``rank``.
            mixing: (N, N).
            keys: (L,) int64, what the random numbers of each tensor are made from.
            energies: (L, N) float64, ‖X_li‖² from the task Gram.
            rank: r.
            effort: how hard to try.
        """
        ...


class Operators(Protocol):
    """A backend module: the heavy part of each step."""

    @property
    def traits(self) -> Traits:
        """What is particular about this backend."""
        ...

    def task_gram(self, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], precise: bool = False) -> Tensor:
        """⟨τ_li, τ_lj⟩, (L, N, N) float64 on the CPU, symmetric up to rounding; NaN and Inf show in it.

        Args:
            bases, experts: of any shapes, which may differ between the L tensors.
            precise: differences and sums in float64; else |error| ≤ 16·2⁻²⁴ · |A||A|ᵀ.
        """
        ...

    def gram_panel_elements(self, precise: bool) -> int:
        """Elements of a panel: the Gram of a flat tensor is the sum of its panels' in their order, to the bit."""
        ...

    def residual_matmul(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        mixing: Tensor,
        rhs: Tensor,
        transpose: bool = False,
        precision: str = "ieee",
    ) -> Tensor:
        """X_li · rhs_li, (L, N, m, k), or X_liᵀ · rhs_li, (L, N, n, k), in float32 (float64 if an input is).

        Args:
            bases, experts: tensors of one shape; no residual is stored.
            mixing: (N, N).
            rhs: (L, N, n, k), or (L, N, m, k) with ``transpose``; float32 or float64.
            transpose: multiply with X_liᵀ.
            precision: of the operands on matrix units, at least: one of :data:`r2m_kernels.ops.PRECISIONS`.
        """
        ...

    def orthonormalize(self, y: Tensor) -> Tensor:
        """Orthonormal columns with the range of each (…, m, k) block, k ≤ m; zeros for one that is all zero."""
        ...

    def truncation_width(self, rank: int, oversampling: int) -> int:
        """Columns or rows of the blocks that ``shifted_truncation`` works with."""
        ...

    @property
    def shifted_truncation(self) -> ShiftedTruncation:
        """The fast method for step 3."""
        ...

    def combine(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        core: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        scale: Tensor | None,
        outs: Sequence[Tensor],
    ) -> None:
        """θ₀ + Σ_j core_j τ_lj + Σ_i scale_i · left_li right_li into each out, rounded once to its dtype.

        An expert whose coefficient is 0 is not read.

        Args:
            bases, experts: tensors of one shape.
            core: (N,).
            left, right, scale: (L, N, m, r), (L, N, r, n) and (N,), or None all three.
            outs: L tensors of that shape, of any dtype and layout; one may be an input of its own tensor.
        """
        ...

    def combine_rows(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        core: Tensor,
        mixing: Tensor,
        weights: Tensor,
        scales: Tensor,
        eta: float,
        power: float,
        out: Tensor,
    ) -> None:
        """θ₀ + Σ_j core_j τ_j + eta Σ_i W_i ∘ X_i with row r's weights W_ri ∝ weights_i ‖row r of scales_i X_i‖^power.

        Σ_i W_ri = 1. The matching scales enter the weights alone: there they keep one generator from dominating, and
        residuals stay as long as they are.

        Args:
            base, experts: θ₀ and N θ_j of one shape (m, …); rows are slices of the first dimension.
            core: (N,) λ c.
            mixing: (N, N) M, X_i = Σ_j M_ji τ_j.
            weights: (N,) w, summing to 1.
            scales: (N,) s.
            eta: η.
            power: p > 0.
            out: where to write, contiguous; rounded once to its dtype.
        """
        ...

    def match_columns(
        self, base: Tensor, experts: Sequence[Tensor], merged: Tensor, counts: Tensor, out: Tensor
    ) -> None:
        """Every column of the merged change scaled to Σ_j counts_j ‖column of τ_j‖ / Σ_j counts_j.

        Args:
            base, experts: θ₀ and N θ_j of one shape (m, …); columns are indices of all dimensions but the first.
            merged: θ* in the dtype that θ₀ and θ_j are computed in, contiguous; overwritten.
            counts: (N,), none negative.
            out: where to write, contiguous. A factor is at most :data:`r2m_kernels.update_scale.MOST`; a column that
                did not change stays.
        """
        ...
