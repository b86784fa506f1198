"""The operators under the method, each callable on its own; ``backend`` chooses who computes it.

Notation (N experts, a tensor seen as m × n): θ₀ base, θ_j experts, τ_j = θ_j − θ₀ task vectors, residual
X_i = Σ_j mixing[j, i] τ_j. All of them take float32, bfloat16, float16 (computed in float32) and float64 (computed in
float64) tensors of any shape, mixed between experts. Results are bit-reproducible and do not depend on the number of
threads; they are on the base's device, by which ``"auto"`` picks. Every function raises ``InvalidInput`` for shapes,
dtypes and devices that do not fit and ``BackendUnavailable`` for a
backend that was asked for by name and cannot run here.

Each is an operator of ``torch.ops.r2m`` (:mod:`._operators`), which importing this module registers: ``torch.compile``,
``torch.export``, FakeTensor and meta tensors take it as one of PyTorch's own. :func:`combine` without ``out`` has
derivatives; asking for another's raises ``NotImplementedError``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from ._operators import CALLS, PRECISIONS

__all__ = ["PRECISIONS", "combine", "combine_rows", "match_columns", "orthonormalize", "residual_matmul", "task_gram"]

_task_gram, _residual_matmul, _orthonormalize = CALLS["task_gram"], CALLS["residual_matmul"], CALLS["orthonormalize"]
_combine, _combine_out = CALLS["combine"], CALLS["combine.out"]
_combine_rows, _combine_rows_out = CALLS["combine_rows"], CALLS["combine_rows.out"]
_match_columns, _match_columns_out = CALLS["match_columns"], CALLS["match_columns.out"]


def task_gram(base: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], backend: str = "auto") -> Tensor:
    """Gram matrices of the task vectors, one per tensor: G_l[i, j] = ⟨τ_il, τ_jl⟩.

    Args:
        base: L tensors of any shapes.
        experts: N sequences of L tensors, shaped as the base's.

    Returns:
        (L, N, N) float64 on the CPU, symmetric up to rounding; |error| ≤ 16·2⁻²⁴ · |A||A|ᵀ (2⁻⁵³ for float64 inputs).
        A NaN or Inf in an input makes its entries non-finite.

    The maths: r2m_kernels/README.md §2 and §12.

    Examples:
        >>> base = [torch.zeros(2, 2)]
        >>> task_gram(base, [[torch.eye(2)], [torch.ones(2, 2)]])[0]
        tensor([[2., 2.],
                [2., 4.]], dtype=torch.float64)
    """
    for j, expert in enumerate(experts):
        checks.same_length(f"tensors of expert {j}", expert, len(base))
    return _task_gram(list(base), [tensor for expert in experts for tensor in expert], backend)


def residual_matmul(
    base: Tensor,
    experts: Sequence[Tensor],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool = False,
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    """X_i · rhs_i for every expert i, or X_iᵀ · rhs_i; the residuals are formed on the fly and never stored.

    Args:
        base: θ₀, ndim ≥ 1, seen as (m, n) = (first dimension, the rest).
        experts: N tensors θ_j shaped as the base.
        mixing: (N, N); column i holds the weights of residual i. float64 recommended.
        rhs: (N, n, k), or (N, m, k) with ``transpose``.
        precision: of the matrix units' operands, ``"ieee"``, ``"tf32x3"``, ``"tf32"`` or ``"bf16"``, at least: a
            backend without such units, or without a kernel for this combination, computes more precisely.

    Returns:
        (N, m, k), or (N, n, k) with ``transpose``; float32 (float64 if an input is).

    The maths: r2m_kernels/README.md §4 and §12.

    Examples:
        >>> base, experts = torch.zeros(2, 3), [torch.ones(2, 3), 2 * torch.ones(2, 3)]
        >>> mixing = torch.eye(2, dtype=torch.float64) - 0.5  # each without the mean of both
        >>> residual_matmul(base, experts, mixing, torch.ones(2, 3, 1)).flatten(1)
        tensor([[-1.5000, -1.5000],
                [ 1.5000,  1.5000]])
    """
    return _residual_matmul(base, list(experts), mixing, rhs, transpose, precision, backend)


def orthonormalize(y: Tensor, backend: str = "auto") -> Tensor:
    """Orthonormal columns Q with the range of y, so that Q Qᵀ y = y up to rounding.

    Args:
        y: (…, m, k) with k ≤ m. A block that is all zero gives zeros; a rank-deficient one spans at least its range.

    Returns:
        (…, m, k), float32 (float64 for float64).

    The maths: r2m_kernels/README.md §4 and §12.

    Examples:
        >>> q = orthonormalize(torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
        >>> torch.allclose(q.mT @ q, torch.eye(2))
        True
    """
    return _orthonormalize(y, backend)


def combine(
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """θ₀ + Σ_j core_j (θ_j − θ₀) + Σ_i scale_i · left_i right_i, rounded once to the dtype of ``out``.

    An expert whose coefficient is 0 is not read. ``out`` may be ``base`` or one of the experts.

    Args:
        base: θ₀, any shape; seen as (m, n) = (first dimension, the rest) where factors are given.
        experts: N tensors θ_j shaped as the base.
        core: (N,) coefficients.
        left: (N, m, r), or None for no low-rank term.
        right: (N, r, n).
        scale: (N,).
        out: where to write, shaped as the base; by default a new tensor of the base's dtype.

    Returns:
        ``out``. |error| ≤ ½ ulp + (8 + 2√r)·2⁻²⁴ · (|θ₀| + Σ|core_j||τ_j| + Σ|scale_i||left_i||right_i|); on NVIDIA's
        matrix units 20 for 8.

    The maths: r2m_kernels/README.md §6 and §12.

    Examples:
        >>> base, experts = torch.zeros(2), [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])]
        >>> core = torch.tensor([0.5, 0.25], requires_grad=True)
        >>> merged = combine(base, experts, core)
        >>> merged
        tensor([1., 1.], grad_fn=<...>)
        >>> merged.sum().backward()
        >>> core.grad
        tensor([2., 4.])
    """
    if out is None:
        return _combine(base, list(experts), core, left, right, scale, backend)
    _combine_out(base, list(experts), core, out, left, right, scale, backend)
    return out


def combine_rows(
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    mixing: Tensor,
    weights: Tensor,
    scales: Tensor,
    eta: float,
    power: float,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """θ₀ + Σ_j core_j τ_j + eta Σ_i W_i ∘ X_i, residuals weighted row by row; rounded once to the dtype of ``out``.

    W_ri ∝ weights_i (scales_i ‖row r of X_i‖)^power, Σ_i W_ri = 1; W_ri = weights_i where nobody has a residual.
    ``out`` may be ``base`` or one of the experts.

    Args:
        base: θ₀, ndim ≥ 1; a row is a slice of the first dimension.
        experts: N tensors θ_j shaped as the base.
        core: (N,) coefficients.
        mixing: (N, N); column i holds the weights of residual i.
        weights: (N,), summing to 1.
        scales: (N,), none negative.
        eta: factor of the residual term.
        power: p ≥ 0.
        out: where to write, shaped as the base; by default a new tensor of the base's dtype.

    Returns:
        ``out``. With a_rj = core_j + eta Σ_i mixing_ji W_ri: |error| ≤ ½ ulp + (N + 4)·2⁻²⁴ · (|θ₀| + Σ|a_j||τ_j|)
        + |eta| Σ_j (|mixing| |δW|)_j |τ_j|, where δW = W ((1 + ε)^2p − 1) and ε ≤ (n + 2N + 8)·2⁻⁵³ · max_i (‖row of
        Σ_j |mixing_ji||τ_j|‖ / ‖row of X_i‖)² is how well the length of a row of n elements is known.

    The maths: r2m_kernels/README.md §6 and §12.

    Examples:
        >>> base, experts = torch.zeros(2, 2), [torch.eye(2), torch.tensor([[0.0, 3.0], [0.0, 0.0]])]
        >>> core, ones = torch.zeros(2), torch.ones(2)
        >>> combine_rows(base, experts, core, torch.eye(2), ones / 2, ones, eta=1.0, power=1.0)
        tensor([[0.2500, 2.2500],
                [0.0000, 1.0000]])
    """
    eta, power = checks.number("eta", eta), checks.number("power", power, minimum=0.0)
    if out is None:
        return _combine_rows(base, list(experts), core, mixing, weights, scales, eta, power, backend)
    _combine_rows_out(base, list(experts), core, mixing, weights, scales, eta, power, out, backend)
    return out


def match_columns(
    base: Tensor,
    experts: Sequence[Tensor],
    merged: Tensor,
    counts: Tensor,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """θ₀ + (θ* − θ₀) with every column scaled to Σ_j counts_j ‖column of τ_j‖ / Σ_j counts_j, by at most 4.

    A column that did not change stays. ``out`` may be any of the inputs.

    Args:
        base: θ₀, ndim ≥ 1; a column has one index of every dimension but the first.
        experts: N tensors θ_j shaped as the base.
        merged: θ*, shaped as the base.
        counts: (N,), none negative.
        out: where to write, shaped as the base; by default a new tensor of the base's dtype.

    Returns:
        ``out``. |error| ≤ ½ ulp + 2⁻²⁴ · |θ| + 8·2⁻²⁴ · |f (θ* − θ₀)|, f the factor of the column; θ* is rounded to
        what θ₀ and θ_j are computed in first.

    The maths: r2m_kernels/README.md §6 and §12.

    Examples:
        >>> base, merged = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> match_columns(base, [2 * merged], merged, torch.ones(1))
        tensor([[2., 0.],
                [0., 4.]])
    """
    if out is None:
        return _match_columns(base, list(experts), merged, counts, backend)
    _match_columns_out(base, list(experts), merged, counts, out, backend)
    return out
