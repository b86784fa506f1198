"""Inputs for GPU cases and what is right about their results: float64 on the inputs' device, bounds with derivations.

Each ``judge_…`` returns the largest error over its bound: at most 1 is right. NaN is infinitely wrong.
u = 2⁻²⁴ is half a unit in the last place of float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.cases import decaying, optimum
from r2m_kernels._triton import launch
from r2m_kernels._triton.addresses import SCALE

U = 2.0**-24
# What rounding both operands adds to |error| / (|X||rhs|). fp16 keeps 11 bits: 2⁻¹¹ each at most. tf32x3 multiplies two
# rounded pieces of each: the pieces miss 2⁻²² of an operand (2⁻¹¹ · 2⁻¹¹) and the product of the small pieces, as much
# again, is left out.
OPERANDS = {"ieee": 0.0, "tf32x3": 12 * U, "fp16": 2.0**-10 + 2.0**-20}
# Of a value, by storage type. Triton's interpreter (3.6, 3.9) cuts float32 down to bfloat16, where a GPU rounds.
HALF_ULP = {
    torch.float32: U,
    torch.bfloat16: 2.0 ** (-7 if launch.INTERPRETED else -8),
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}
TRUNCATION = 1.02  # of the optimum on decaying spectra, README §4


def generator(device: torch.device, seed: int) -> torch.Generator:
    made = torch.Generator(device=device)
    made.manual_seed(seed)
    return made


def framed(tensor: Tensor, offset: int = 64) -> Tensor:
    """The same values, contiguous, inside a flat buffer of NaN: what reads outside shows. Aligned for offset 64."""
    buffer = torch.full((tensor.numel() + 128 + offset,), math.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer[offset : offset + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def inputs(
    shape: tuple[int, int], dtype: torch.dtype, count: int, source: torch.Generator, offset: int = 64
) -> tuple[Tensor, list[Tensor]]:
    """A base and ``count`` experts: a common part, and a part of each one's own."""
    base = torch.randn(*shape, generator=source, device=source.device)
    common = decaying(*shape, source)
    experts = [base + 0.6 * common + decaying(*shape, source) for _ in range(count)]
    return framed(base.to(dtype), offset), [framed(expert.to(dtype), offset) for expert in experts]


def mixing_of(count: int) -> Tensor:
    """I − c1ᵀ with unequal c, as the method has it: float64."""
    core = torch.linspace(0.5, 1.5, count, dtype=torch.float64) / count
    return torch.eye(count, dtype=torch.float64) - core.unsqueeze(1)


def task_matrix(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """(N, numel) float64."""
    return torch.stack([(expert.double() - base.double()).reshape(-1) for expert in experts])


def residuals(base: Tensor, experts: Sequence[Tensor], mixing: Tensor) -> Tensor:
    """X: (N, m, n) float64."""
    tau = task_matrix(base, experts)
    return (mixing.to(tau).T @ tau).reshape(len(experts), base.shape[0], -1)


def worst(error: Tensor, bound: Tensor) -> float:
    """The largest error / bound; infinite where anything is NaN."""
    quotient = torch.where(error == 0, torch.zeros_like(error), error / bound)
    value = float(quotient.max())
    return value if math.isfinite(value) else math.inf


def judge_gram(gram: Tensor, base: Tensor, experts: Sequence[Tensor]) -> float:
    """Against README §2: |error| ≤ 16u · |A||A|ᵀ."""
    tau = task_matrix(base, experts)
    return worst((gram.to(tau) - tau @ tau.T).abs(), 16 * U * tau.abs() @ tau.abs().T)


def judge_product(
    result: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool,
    precision: str,
) -> float:
    """Forming X costs N + 1 roundings an element, a sum of K terms about √K more; operands are rounded besides."""
    x = residuals(base, experts, mixing)
    magnitude = (mixing.abs().to(x).T @ task_matrix(base, experts).abs()).reshape(x.shape)
    if transpose:
        x, magnitude = x.transpose(1, 2), magnitude.transpose(1, 2)
    double = rhs.double()
    count = len(experts)
    forming = (count + 5 + 2 * math.sqrt(rhs.shape[1])) * U * magnitude @ double.abs()
    rounding = (1 + 2.0**-8) * OPERANDS[precision] * (x.abs() + forming.new_tensor(count * U) * magnitude)
    return worst((result.double() - x @ double).abs(), forming + rounding @ double.abs())


def judge_residuals(kept: Tensor, base: Tensor, experts: Sequence[Tensor], mixing: Tensor, tall: bool) -> float:
    """Residuals as float16 operands: formed with N + 1 roundings, and rounded to 11 bits, or to the least numbers."""
    x = residuals(base, experts, mixing)
    magnitude = (mixing.abs().to(x).T @ task_matrix(base, experts).abs()).reshape(x.shape)
    bound = (len(experts) + 5) * U * magnitude + (2.0**-11 + 2.0**-20) * x.abs() + 2.0**-25 / SCALE
    return worst(((kept if tall else kept.mT).double() / SCALE - x).abs(), bound)


def judge_sketch(rows: Tensor, base: Tensor, experts: Sequence[Tensor], mixing: Tensor, transpose: bool) -> float:
    """Random signs s (tests/gpu looks at them): ‖Xs‖² is ‖X‖² on average, and its variance 2(‖G‖² − Σ G_ii²), G = XᵀX.

    The mean over the k rows of a result stays within six of its standard deviations.
    """
    x = residuals(base, experts, mixing)
    return judge_signs(rows, x if transpose else x.mT)


def judge_signs(rows: Tensor, x: Tensor) -> float:
    """The same of matrices that are known, (N, s, ·), of which every row is a sum with random signs."""
    gram = x @ x.mT
    diagonal = gram.diagonal(dim1=1, dim2=2)
    variance = 2 * (gram.square().sum((1, 2)) - diagonal.square().sum(1))
    mean = rows.double().square().mean(1).sum(1)
    return worst((mean - diagonal.sum(1)).abs(), 6 * (variance / rows.shape[1]).sqrt())


def _of_operands(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A product of operands as they are stored, and what it may miss: sums of K terms cost about √K roundings."""
    return left @ right, (5 + 2 * math.sqrt(left.shape[-1])) * U * (left.abs() @ right.abs())


def _as_float16(exact: Tensor) -> Tensor:
    """Half a unit in the last place of operands, which are stored times SCALE."""
    return (2.0**-11 + 2.0**-20) * exact.abs() + 2.0**-25 / SCALE


def judge_residual_gram(gram: Tensor, kept: Tensor) -> float:
    """K = AᵀA, float16 times SCALE, of A as it was kept: (N, long, short) float64."""
    exact, bound = _of_operands(kept.mT, kept)
    return worst((gram.double() / SCALE - exact).abs(), bound + _as_float16(exact))


def judge_paired(product: Tensor, shares: Tensor, basis: Tensor, gram: Tensor) -> float:
    """V K of float16 operands V (N, k, s) and K (N, s, s) as they are stored, and Σ V K ∘ V: (N,).

    That is summed in float32 along a row of a tile, of 256 numbers at most.
    """
    exact, bound = _of_operands(basis, gram)
    wanted, size = (exact * basis).sum((1, 2)), (exact.abs() * basis.abs()).sum((1, 2))
    missed = (bound * basis.abs()).sum((1, 2)) + (5 + 2 * math.sqrt(256)) * U * size
    return max(
        worst((product - exact).abs(), bound + _as_float16(exact)), worst((shares.to(exact) - wanted).abs(), missed)
    )


def judge_unit_rows(rows: Tensor, product: Tensor, subtracted: Tensor) -> float:
    """W / ‖w‖, w = product − subtracted, (N, k, s): w has three roundings, its length those of a sum, and one more."""
    w = product - subtracted
    length = w.norm(dim=-1, keepdim=True)
    exact, size = w / length, (product.abs() + subtracted.abs()) / length
    # What w misses, its length misses too.
    missed = 3 * U * (size + exact.abs() * (exact.abs() * size).sum(-1, keepdim=True))
    bound = missed + (4 + 2 * math.sqrt(w.shape[-1])) * U * exact.abs() + _as_float16(exact)
    return worst((rows - exact).abs(), bound)


def judge_units(basis: Tensor, rows: Tensor, dtype: torch.dtype) -> float:
    """V = U + (T − I) U, T U Uᵀ Tᵀ = I, (N, k, s): how far V Vᵀ is from I, and V from the span of U.

    T − I = D is rounded to 11 bits: |V Vᵀ − I| ≤ u₁₁ (|D||L| + (|D||L|)ᵀ) to first order, U Uᵀ = L Lᵀ. The Gram matrix
    has the roundings of its sums, and the factor and T about 2√k each, of entries that |T| multiplies from both sides.
    Every number of V is rounded to ``dtype`` and comes from a sum of k terms: by Cauchy and Schwarz twice that of I.
    """
    identity = torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
    half, terms = 2.0**-11 if dtype == torch.float16 else U, (10 + 4 * math.sqrt(rows.shape[1])) * U
    exact, missed = _of_operands(rows, rows.mT)
    lower = torch.linalg.cholesky(exact)
    inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
    rounding = 2.0**-11 * (inverse - identity).abs() @ lower.abs()
    amplified = inverse.abs() @ (missed + terms * lower.abs() @ lower.abs().mT) @ inverse.abs().mT
    bound = (1 + 2.0**-8) * (rounding + rounding.mT + amplified) + 2 * (half + terms)
    unit = worst((basis @ basis.mT - identity).abs(), bound)
    # A rounding of every number, relative to rows of length 1.
    outside = basis - torch.cholesky_solve(rows @ basis.mT, lower).mT @ rows
    return max(unit, worst(outside.norm(dim=-1), (half + terms * inverse.abs().sum(-1)) * (1 + 2.0**-8)))


def judge_lengths(lengths: Tensor, left: Tensor, right: Tensor, orthonormal: bool) -> float:
    """‖row of leftᵀ right‖, (N, m) float64, of rows (N, r, m) and (N, r, n); ``orthonormal`` ones do not count.

    A square misses n + 2r roundings of the terms' magnitudes, and its root half of that over itself.
    """
    lefts, rights = left.double(), right.double()
    if orthonormal:
        exact = magnitude = lefts.norm(dim=1)
    else:
        exact = (lefts.mT @ rights).norm(dim=2)
        magnitude = (lefts.mT.abs() @ rights.abs()).norm(dim=2)
    bound = (right.shape[2] + 2 * right.shape[1] + 8) * 2.0**-53 * magnitude.square() / exact
    return worst((lengths - exact).abs(), bound)


def judge_weighed(
    out: Tensor, left: Tensor, lengths: Tensor, weights: Tensor, scales: Tensor, power: float, factors: Tensor
) -> float:
    """Rows of left factors (N, m, r) times their shares: float64's, rounded, times a factor; and once to its dtype."""
    weights, scales, factors = (one.to(lengths).unsqueeze(1) for one in (weights, scales, factors))
    shares = weights * (scales * lengths) ** power
    exact = left.double() * (shares / shares.sum(0) * factors).unsqueeze(2)
    return worst((out.double() - exact).abs(), (HALF_ULP[out.dtype] * (1 + 2.0**-8) + 6 * U) * exact.abs())


def judge_basis(q: Tensor, y: Tensor) -> float:
    """Entries of Q come from one product of k terms in tf32x3: (12 + 8 + 2√k)u; QᵀQ doubles that, QQᵀy once more.

    The second holds relative to ‖y‖, for the well-conditioned y given here.
    """
    q, y = q.double(), y.double()
    k = y.shape[-1]
    bound = q.new_tensor((20 + 2 * math.sqrt(k)) * U)
    unit = (q.mT @ q - torch.eye(k, dtype=torch.float64, device=q.device)).abs()
    missed = (y - q @ (q.mT @ y)).norm(dim=(-2, -1)) / y.norm(dim=(-2, -1))
    return max(worst(unit, (2 * bound).expand_as(unit)), worst(missed, (4 * bound).expand_as(missed)))


def judge_combined(
    out: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    scale: Tensor | None = None,
) -> float:
    """Against README §6: ½ ulp + (20 + 2√r)u of the terms' magnitudes: products in tf32x3.

    Products of bfloat16 factors are exact; a sum of K = N·r of them costs a rounding each at most, whatever its order.
    """
    tau = task_matrix(base, experts)
    weights = core.to(tau)
    exact = base.double() + (weights @ tau).reshape(base.shape)
    magnitude = base.double().abs() + (weights.abs() @ tau.abs()).reshape(base.shape)
    roundings = 20.0
    if left is not None and right is not None:
        count, _, rank = left.shape
        roundings = 8.0 + count * rank if left.dtype == torch.bfloat16 else 20 + 2 * math.sqrt(rank)
        each = (torch.ones(count) if scale is None else scale).to(tau).view(-1, 1, 1)
        exact += (each * (left.double() @ right.double())).sum(0)
        magnitude += (each.abs() * (left.double().abs() @ right.double().abs())).sum(0)
    bound = HALF_ULP[out.dtype] * exact.abs() * (1 + 1e-6) + roundings * U * magnitude
    if out.dtype == torch.float16:
        bound = bound + 2.0**-25  # half a subnormal
    return worst((out.double() - exact).abs(), bound)


def judge_rows(
    out: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    core: Tensor,
    mixing: Tensor,
    weights: Tensor,
    scales: Tensor,
    eta: float,
    power: float,
) -> float:
    """Against README §6: ½ ulp + (N + 4)u of the terms' magnitudes; coefficients are float64's to a rounding."""
    tau = task_matrix(base, experts).reshape(len(experts), base.shape[0], -1)
    core, mixing, weights, scales = (one.to(tau) for one in (core, mixing, weights, scales))
    lengths = scales.unsqueeze(1) * torch.einsum("ji,jrk->irk", mixing, tau).norm(dim=2)
    shares = weights.unsqueeze(1) * (lengths / lengths.amax(0)) ** power
    coefficients = core.unsqueeze(1) + eta * mixing @ (shares / shares.sum(0))
    return judge_by_rows(out, base, experts, coefficients.T)


def judge_by_rows(out: Tensor, base: Tensor, experts: Sequence[Tensor], coefficients: Tensor) -> float:
    """The same with coefficients that are known, (m, N)."""
    tau = task_matrix(base, experts).reshape(len(experts), base.shape[0], -1)
    coefficients = coefficients.to(tau).T
    exact = base.double().flatten(1) + torch.einsum("jr,jrk->rk", coefficients, tau)
    magnitude = base.double().flatten(1).abs() + torch.einsum("jr,jrk->rk", coefficients.abs(), tau.abs())
    bound = HALF_ULP[out.dtype] * exact.abs() * (1 + 1e-6) + (len(experts) + 4) * U * magnitude
    if out.dtype == torch.float16:
        bound = bound + 2.0**-25  # half a subnormal
    return worst((out.double().flatten(1) - exact).abs(), bound)


def judge_row_grams(rows: Tensor, base: Tensor, experts: Sequence[Tensor]) -> float:
    """As :func:`judge_gram`, row by row: rows (N(N + 1)/2, m)."""
    tau = task_matrix(base, experts).reshape(len(experts), base.shape[0], -1)
    i, j = torch.tril_indices(len(experts), len(experts))
    exact = (tau[i] * tau[j]).sum(2)
    return worst((rows.to(tau) - exact).abs(), 16 * U * (tau[i].abs() * tau[j].abs()).sum(2))


def judge_alike(result: Tensor, expected: Tensor, size: Tensor, count: int, wide: torch.dtype) -> float:
    """Against what another backend makes of the same N = ``count`` tensors, computed in ``wide``.

    Both round what they write once and some 2N + 8 times before, relative to ``size``; infinite: anything is right.
    """
    unit = 2.0**-53 if wide == torch.float64 else U
    bound = 2 * (2 * count + 8) * unit * size
    if result.is_floating_point():
        bound = bound + 2 * HALF_ULP[result.dtype] * expected.double().abs() * (1 + 1e-6)
        bound = bound + (2.0**-24 if result.dtype == torch.float16 else 0.0)  # two halves of a subnormal
    return worst((result.double() - expected.double()).abs(), bound.expand(result.shape))


def truncation_excess(left: Tensor, right: Tensor, x: Tensor) -> float:
    """‖X − F‖ / optimum, the worst of the experts; X is (N, m, n) float64."""
    pairs = zip(x, left.double() @ right.double(), strict=True)
    excess = [float((residual - kept).norm()) / optimum(residual, left.shape[2]) for residual, kept in pairs]
    return max(excess) if all(map(math.isfinite, excess)) else math.inf


def judge_inner_products(products: Tensor, left: Tensor, right: Tensor) -> float:
    """⟨F_i, F_j⟩ from float32 factors in float64: a hundredth of float32's rounding of ‖F_i‖‖F_j‖ is ample."""
    lefts, rights = left.double().mT.flatten(0, 1), right.double().flatten(0, 1)  # (N·r, m) and (N·r, n)
    count, rank = len(left), left.shape[2]
    exact = ((lefts @ lefts.T) * (rights @ rights.T)).view(count, rank, count, rank).sum((1, 3))
    lengths = exact.diagonal().clamp_min(0).sqrt()
    return worst((products.to(exact) - exact).abs(), 0.01 * U * torch.outer(lengths, lengths))
