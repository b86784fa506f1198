"""The operators under the method, each callable on its own; ``backend`` chooses who computes it.

Notation (N experts, a tensor seen as m × n): θ₀ base, θ_j experts, τ_j = θ_j − θ₀ task vectors, residual
X_i = Σ_j mixing[j, i] τ_j. All of them take float32, bfloat16, float16 (computed in float32) and float64 (computed in
float64) tensors of any shape, mixed between experts. Results are bit-reproducible and do not depend on the number of
threads; they are on the base's device, by which ``"auto"`` picks. Every function raises ``InvalidInput`` for shapes,
dtypes and devices that do not fit and ``BackendUnavailable`` for a
backend that was asked for by name and cannot run here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _backends, checks, tensor_checks
from ._stream.parallel import deterministic
from ._stream.tensors import compute_dtype

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")


@deterministic
def task_gram(base: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], backend: str = "auto") -> Tensor:
    """Gram matrices of the task vectors, one per tensor: G_l[i, j] = ⟨τ_il, τ_jl⟩.

    Args:
        base: L tensors of any shapes.
        experts: N sequences of L tensors, shaped as the base's.

    Returns:
        (L, N, N) float64 on the CPU, symmetric up to rounding; |error| ≤ 16·2⁻²⁴ · |A||A|ᵀ (2⁻⁵³ for float64 inputs).
        A NaN or Inf in an input makes its entries non-finite.
    """
    checks.not_empty("base", base)
    for j, expert in enumerate(experts):
        checks.same_length(f"tensors of expert {j}", expert, len(base))
    for index, tensor in enumerate(base):
        _check_inputs(tensor, [expert[index] for expert in experts], f" {index}")
        tensor_checks.same_device(f"base tensor {index}", tensor, base[0].device)
    return _backends.choose(backend, base[0].device).operators.task_gram(base, experts).tasks.cpu()


@deterministic
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
    """
    _check_inputs(base, experts)
    tensor_checks.matrix_like("base", base)
    checks.choice("precision", precision, PRECISIONS)
    count = len(experts)
    tensor_checks.same_shape("mixing", mixing, (count, count))
    inner = base.shape[0] if transpose else math.prod(base.shape[1:])
    tensor_checks.ndim("rhs", rhs, 3)
    tensor_checks.same_shape("rhs", rhs, (count, inner, rhs.shape[2]))
    tensor_checks.floating("rhs", rhs)
    operators = _backends.choose(backend, base.device).operators
    group = [[expert] for expert in experts]
    return operators.residual_matmul([base], group, mixing, rhs.unsqueeze(0), transpose, precision)[0]


@deterministic
def orthonormalize(y: Tensor, backend: str = "auto") -> Tensor:
    """Orthonormal columns Q with the range of y, so that Q Qᵀ y = y up to rounding.

    Args:
        y: (…, m, k) with k ≤ m. A block that is all zero gives zeros; a rank-deficient one spans at least its range.

    Returns:
        (…, m, k), float32 (float64 for float64).
    """
    tensor_checks.floating("y", y)
    tensor_checks.tall("y", y)
    return _backends.choose(backend, y.device).operators.orthonormalize(y)


@deterministic
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
    """
    _check_inputs(base, experts)
    count = len(experts)
    tensor_checks.same_shape("core", core, (count,))
    given = [tensor is not None for tensor in (left, right, scale)]
    checks.all_or_none("left, right and scale", given)
    if left is not None and right is not None and scale is not None:
        tensor_checks.matrix_like("base", base)
        tensor_checks.ndim("left", left, 3)
        rows, rank = base.shape[0], left.shape[2]
        tensor_checks.same_shape("left", left, (count, rows, rank))
        tensor_checks.same_shape("right", right, (count, rank, math.prod(base.shape[1:])))
        tensor_checks.same_shape("scale", scale, (count,))
    out = _output(base, out)
    operators = _backends.choose(backend, base.device).operators
    left, right = (None if factor is None else factor.unsqueeze(0) for factor in (left, right))
    operators.combine([base], [[expert] for expert in experts], core, left, right, scale, [out])
    return out


@deterministic
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
    """
    _check_inputs(base, experts)
    tensor_checks.matrix_like("base", base)
    count = len(experts)
    tensor_checks.same_shape("core", core, (count,))
    tensor_checks.same_shape("mixing", mixing, (count, count))
    tensor_checks.same_shape("weights", weights, (count,))
    tensor_checks.same_shape("scales", scales, (count,))
    power = checks.number("power", power, minimum=0.0)
    numbers = (core.double(), mixing.double(), weights.double(), scales.double(), checks.number("eta", eta), power)
    operators = _backends.choose(backend, base.device).operators
    bases, group, dtype = [base], [[expert] for expert in experts], compute_dtype([base, *experts])

    def write(target: Tensor) -> None:
        coefficients = operators.row_coefficients(operators.row_grams(bases, group).rows, *numbers, dtype)
        operators.combine(bases, group, coefficients, None, None, None, [target])

    return _written(_output(base, out), write)


@deterministic
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
    """
    _check_inputs(base, experts)
    tensor_checks.matrix_like("base", base)
    tensor_checks.floating("merged", merged)
    tensor_checks.same_shape("merged", merged, base.shape)
    tensor_checks.same_device("merged", merged, base.device)
    tensor_checks.same_shape("counts", counts, (len(experts),))
    change = merged.to(compute_dtype([base, *experts]), copy=True, memory_format=torch.contiguous_format)
    operators = _backends.choose(backend, base.device).operators
    group, counts = [[expert] for expert in experts], counts.double()

    def write(target: Tensor) -> None:
        operators.match_columns([base], group, [change], counts, [target])

    return _written(_output(base, out), write)


def _output(base: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(base.shape, dtype=base.dtype, device=base.device)
    tensor_checks.floating("out", out)
    tensor_checks.same_shape("out", out, base.shape)
    tensor_checks.same_device("out", out, base.device)
    return out


def _written(out: Tensor, write: Callable[[Tensor], None]) -> Tensor:
    """``out`` after ``write``, which wants a contiguous tensor with elements."""
    if out.numel():
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        write(target)
        if target is not out:
            out.copy_(target)
    return out


def _check_inputs(base: Tensor, experts: Sequence[Tensor], index: str = "") -> None:
    checks.not_empty("experts", experts)
    tensor_checks.floating(f"base tensor{index}", base)
    for j, expert in enumerate(experts):
        what = f"tensor{index} of expert {j}"
        tensor_checks.floating(what, expert)
        tensor_checks.same_shape(what, expert, base.shape)
        tensor_checks.same_device(what, expert, base.device)
