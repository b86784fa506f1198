"""Operators of ``_interface.Operators`` that have no public function of their own, on groups, against float64.

``u`` is half an ulp of 1 in the compute dtype. A sum of k products of rounded operands is within (k + 2) u of the sum
of magnitudes: a rounding of each difference, product and addition at most.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import padded
from test_operators import BACKENDS, DTYPES, UNIT, UNIT_DTYPE, rounding, task_matrix

from r2m_kernels._backends import choose
from r2m_kernels.reference.others import splitmix64

SHAPES = [(1,), (5, 7), (129, 65), (1, 1000), (1000, 1), (33, 7, 3)]
# Triton's interpreter is slow. What another kernel is chosen by: rows of whole 16-byte vectors in every dtype, and of
# none; a block and several; rows of one element, and of several dimensions.
OF_TRITON = [
    *(((36, 72), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    ((23, 53), torch.float32),
    ((33, 7, 3), torch.float16),
    ((13,), torch.bfloat16),
    ((1,), torch.float64),
]
CASES = [(backend, shape, dtype) for backend in ("torch", "native") for shape in SHAPES for dtype in DTYPES]
CASES += [("triton", shape, dtype) for shape, dtype in OF_TRITON]
EVERYWHERE = pytest.mark.parametrize(("backend", "shape", "dtype"), CASES, ids=str)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
FACTORS = torch.tensor([0.7, 1.0, -1.9], dtype=torch.float64)


def operators(backend):
    return choose(backend, torch.device("cpu")).operators


def group(shape, dtype, size=2, count=3):
    """NaN all around each input."""
    generator = torch.Generator().manual_seed(len(shape))

    def randn():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    bases = [padded(randn().to(dtype)) for _ in range(size)]
    return bases, [[padded((base.double() + 0.1 * randn()).to(dtype)) for base in bases] for _ in range(count)]


def of_tensor(bases, experts, index):
    return bases[index], [expert[index] for expert in experts]


class Outputs:
    """Contiguous outputs in the middle of sentinels."""

    def __init__(self, shape, dtype, size=2):
        count = math.prod(shape)
        self._buffers = [torch.full((count + 8,), -77.0, dtype=dtype) for _ in range(size)]
        self.outs = [buffer[4 : 4 + count].view(shape) for buffer in self._buffers]

    def check(self, exact, bound, largest):
        """Whether values are right, the rest is untouched and the largest magnitude is that of what was written."""
        assert largest.shape == (len(self.outs),)
        for index, (buffer, out) in enumerate(zip(self._buffers, self.outs, strict=True)):
            error = (out.double() - exact[index].view(out.shape)).abs()
            assert (error <= rounding(exact[index].view(out.shape), out.dtype) + bound[index].view(out.shape)).all()
            assert torch.equal(buffer[:4], buffer[-4:])
            assert (buffer[:4] == -77.0).all()
            assert float(largest[index]) == float(out.double().abs().max())


def halves(shape, rank, strided, size=2, count=3):
    """Factors in bfloat16, (L, N, m, r) and (L, N, r, n): rows as truncations leave them, or amid NaN in any layout."""
    generator, (m, n) = torch.Generator().manual_seed(rank), (shape[0], math.prod(shape[1:]))
    left = torch.randn(size, count, rank, m, generator=generator).bfloat16().mT
    right = torch.randn(size, count, rank, n, generator=generator).bfloat16()
    return (padded(left.contiguous()), padded(right.mT.contiguous()).mT) if strided else (left, right)


@EVERYWHERE
@pytest.mark.parametrize("strided", [False, True])
def test_combine_multiplies_factors_in_bfloat16_exactly(backend, shape, dtype, strided):
    bases, experts = group(shape, dtype)
    rank, core = 5 if strided else 23, torch.tensor([0.5, 0.0, -0.2], dtype=torch.float64)
    left, right = halves(shape, rank, strided)
    outputs, squares = Outputs(shape, dtype), []
    largest = operators(backend).combine(bases, experts, core, left, right, None, outputs.outs, squares)
    products = (left.double() @ right.double()).sum(1)
    sizes = (left.double().abs() @ right.double().abs()).sum(1)
    exact, bound = [], []
    for index, product in enumerate(products):
        base, others = of_tensor(bases, experts, index)
        tau = task_matrix(base, others)
        exact.append(base.double() + (core @ tau).view(shape) + product.view(shape))
        changed = base.double().abs() + (core.abs() @ tau.abs()).view(shape)
        # Nothing is rounded of a product of two bfloat16 numbers: of K = N r of them the sum is, K times at most.
        bound.append(UNIT[dtype] * (8 * changed + (8 + 3 * rank) * sizes[index].view(shape)))
    outputs.check(exact, bound, largest)
    (found,) = squares
    # A float32 sum of squares is within their number's roundings; a few hundred at most are summed so.
    assert torch.allclose(found.flatten(1).sum(1).cpu(), products.square().sum((1, 2)), rtol=1e-4, atol=0)


@EVERYWHERE
def test_factors_without_a_scale_are_added_as_they_are(backend, shape, dtype):
    bases, experts = group(shape, dtype)
    left, right = (factor.to(UNIT_DTYPE[dtype]) for factor in halves(shape, 5, strided=False))
    core = torch.tensor([0.5, 0.0, -0.2], dtype=torch.float64)
    plain, ones = Outputs(shape, dtype), Outputs(shape, dtype)
    for outputs, scale in ((plain, None), (ones, torch.ones(3, dtype=torch.float64))):
        operators(backend).combine(bases, experts, core, left, right, scale, outputs.outs)
    assert all(torch.equal(one, other) for one, other in zip(plain.outs, ones.outs, strict=True))


@EVERYWHERE
def test_row_grams_are_the_products_of_rows_and_each_row_is_on_its_own(backend, shape, dtype):
    (bases, experts), backend = group(shape, dtype), operators(backend)
    grams = backend.row_grams(bases, experts)
    for index in range(2):
        base, others = of_tensor(bases, experts, index)
        tau = task_matrix(base, others).view(3, shape[0], -1)
        for i in range(3):
            for j in range(i + 1):
                pair, n = grams.rows[index, i * (i + 1) // 2 + j], tau.shape[2]
                bound = (n + 2) * 2.0**-53 * (tau[i] * tau[j]).abs().sum(1)
                assert ((pair - (tau[i] * tau[j]).sum(1)).abs() <= bound).all()
        squares = float(base.double().square().sum())
        assert abs(float(grams.base[index]) - squares) <= 1e-5 * squares
    half = (shape[0] + 1) // 2
    for rows in (slice(0, half), slice(half, shape[0])):
        if rows.start < rows.stop:
            part = [[tensor[rows] for tensor in tensors] for tensors in (bases, *experts)]
            assert torch.equal(backend.row_grams(part[0], part[1:]).rows, grams.rows[:, :, rows])
    alone = backend.row_grams(bases[1:], [expert[1:] for expert in experts])
    assert torch.equal(alone.rows[0], grams.rows[1])


@pytest.mark.parametrize("length", [1, 2, 3, 64, 1000, 1025])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_summed_in_an_order_of_their_own(backend, length):
    rows = torch.randn(5, 6, length, dtype=torch.float64)
    sums = operators(backend).sum_rows(rows)
    assert ((sums - rows.sum(2)).abs() <= length * 2.0**-53 * rows.abs().sum(2)).all()
    assert torch.equal(operators(backend).sum_rows(rows[3:4].clone())[0], sums[3])


@EVERYWHERE
@pytest.mark.parametrize("rank", [0, 3])
def test_combine_takes_a_coefficient_of_each_row(backend, shape, dtype, rank):
    bases, experts = group(shape, dtype)
    m, n, u = shape[0], math.prod(shape[1:]), UNIT[dtype]
    coefficients = torch.randn(2, m, 3, dtype=UNIT_DTYPE[dtype])
    wide = UNIT_DTYPE[dtype]
    left, right = torch.randn(2, 3, m, rank, dtype=wide), torch.randn(2, 3, rank, n, dtype=wide)
    factors = (left, right, WEIGHTS) if rank else (None, None, None)
    outputs, exact, bound = Outputs(shape, dtype), [], []
    largest = operators(backend).combine(bases, experts, coefficients, *factors, outputs.outs)
    for index in range(2):
        base, others = of_tensor(bases, experts, index)
        tau, theta = task_matrix(base, others).view(3, m, n), base.double().reshape(m, n)
        rows = coefficients[index].double().T.unsqueeze(2)
        change = WEIGHTS.view(3, 1, 1) * (left[index].double() @ right[index].double())
        size = WEIGHTS.view(3, 1, 1) * (left[index].double().abs() @ right[index].double().abs())
        exact.append(theta + (rows * tau).sum(0) + change.sum(0))
        # The bound of ops.combine.
        bound.append((8 + 2 * math.sqrt(rank)) * u * (theta.abs() + (rows * tau).abs().sum(0) + size.sum(0)))
    outputs.check(exact, bound, largest)


@pytest.mark.parametrize(
    "known", [(False, False), (True, False), (True, True)], ids=["any", "orthogonal", "orthonormal"]
)
@pytest.mark.parametrize("power", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_factors_are_weighed_by_their_residuals_lengths(backend, dtype, power, known):
    left, right = torch.randn(2, 3, 37, 5, dtype=dtype), torch.randn(2, 3, 5, 53, dtype=dtype)
    left[:, :, 4] = 0.0  # a row without residuals
    left[0, 1, 7] = 0.0
    scales = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    ordered, orthonormal = known
    if ordered:  # each component by itself
        right = torch.linalg.qr(right.mT).Q.mT * torch.linspace(3, 1, 5, dtype=dtype).view(5, 1) ** (not orthonormal)
    operators_of, exact = operators(backend), (left.double() @ right.double()).norm(dim=3)
    found = operators_of.row_lengths(left, right, *known)
    assert found.dtype == torch.float64
    # Sums of 53 and of 25 or 5 products; where rows are said to be orthogonal, float32 ones are so to 4 u only.
    assert ((found - exact).abs() <= (4 * UNIT[dtype] if ordered else 40 * 2.0**-53) * exact).all()
    weighed = operators_of.weigh_rows(left, found, WEIGHTS, scales, power, FACTORS, dtype)
    assert weighed.dtype == dtype
    lengths = exact * scales.view(1, 3, 1)
    shares = WEIGHTS.view(1, 3, 1) * lengths**power
    shares = (shares / shares.sum(1, keepdim=True)).nan_to_num(0.0) * FACTORS.view(1, 3, 1)
    expected = shares.unsqueeze(3) * left.double()
    # Squares of lengths are known to 30 roundings in what the Gram is summed in, which is no less than the dtype.
    bound = (30 * power + 6) * UNIT[dtype] * expected.abs()
    assert ((weighed.double() - expected).abs() <= bound).all()
    if dtype == torch.float32:  # rounded once, to what these numbers are in bfloat16
        rounded = operators_of.weigh_rows(left, found, WEIGHTS, scales, power, FACTORS, torch.bfloat16)
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(rounded, weighed.to(torch.bfloat16))
    some = slice(3, 20)
    of_some = operators_of.weigh_rows(left[:, :, some], found[:, :, some], WEIGHTS, scales, power, FACTORS, dtype)
    assert torch.equal(of_some, weighed[:, :, some])


@EVERYWHERE
def test_magnitudes_are_counted_by_their_halves(backend, shape, dtype):
    (bases, experts), backend = group(shape, dtype), operators(backend)
    upper, lower = torch.zeros(3, 2**16, dtype=torch.int64), torch.ones(3, 2**16, dtype=torch.int64)
    backend.count_magnitudes(bases, experts, None, upper)
    chosen = upper.argmax(dim=1)
    backend.count_magnitudes(bases, experts, chosen, lower)
    wide = UNIT_DTYPE[dtype]
    for j, expert in enumerate(experts):
        changes = [(one.to(wide) - base.to(wide)).abs().float() for one, base in zip(expert, bases, strict=True)]
        bits = torch.cat([change.reshape(-1) for change in changes]).view(torch.int32).long()
        assert torch.equal(upper[j], torch.bincount(bits >> 16, minlength=2**16))
        inside = bits[bits >> 16 == chosen[j]] & 2**16 - 1
        assert torch.equal(lower[j], torch.bincount(inside, minlength=2**16) + 1)


@EVERYWHERE
def test_ties_keeps_large_elements_that_agree(backend, shape, dtype):
    bases, experts = group(shape, dtype)
    thresholds, u = torch.tensor([0.02, 0.1, 0.0]), UNIT[dtype]
    outputs, exact, bound = Outputs(shape, dtype), [], []
    largest = operators(backend).combine_ties(bases, experts, WEIGHTS, 0.7, thresholds, outputs.outs)
    for index in range(2):
        base, others = of_tensor(bases, experts, index)
        tau, theta, w = task_matrix(base, others), base.double().reshape(-1), WEIGHTS.unsqueeze(1)
        kept = tau * (tau.abs().float() >= thresholds.unsqueeze(1))
        total = (w * kept).sum(0)
        agree = w * (kept * total > 0)
        mean = (agree * kept).sum(0) / torch.where(agree.sum(0) > 0, agree.sum(0), 1.0)
        size = theta.abs() + 0.7 * kept.abs().amax(0)
        exact.append(theta + 0.7 * mean)
        # Where the sum is rounding, or a magnitude within rounding of its threshold, either way is right.
        unsure = total.abs() <= 8 * u * (w * tau.abs()).sum(0)
        unsure |= ((tau.abs() - thresholds.unsqueeze(1)).abs() <= 4 * u * tau.abs().clamp_min(1.0)).any(0) & (
            tau.abs() > 0
        ).any(0)
        bound.append(torch.where(unsure, 2 * size, 12 * u * size))
    outputs.check(exact, bound, largest)


@EVERYWHERE
@pytest.mark.parametrize(("density", "first"), [(0.3, 0), (1.0, 0), (0.75, 2**40 + 12345)])
def test_dare_draws_the_same_everywhere(backend, shape, dtype, density, first):
    bases, experts = group(shape, dtype)
    keys = torch.tensor([[2**63 - 1, 12345, 2**61 + 7], [0, 5 * 10**17, 99]])
    outputs, exact, bound, u = Outputs(shape, dtype), [], [], UNIT[dtype]
    arguments = (WEIGHTS, 0.7, density, keys, first)
    largest = operators(backend).combine_dare(bases, experts, *arguments, outputs.outs)
    for index in range(2):
        base, others = of_tensor(bases, experts, index)
        tau, theta = task_matrix(base, others), base.double().reshape(-1)
        places = range(first + 1, first + 1 + tau.shape[1])
        numbers = [[splitmix64(key, place) >> 32 for place in places] for key in keys[index].tolist()]
        kept = torch.tensor([[number < int(density * 2**32) for number in row] for row in numbers])
        parts = WEIGHTS.unsqueeze(1) * kept * tau / density
        exact.append(theta + 0.7 * parts.sum(0))
        bound.append(10 * u * (theta.abs() + 0.7 * parts.abs().sum(0)))
    outputs.check(exact, bound, largest)


@EVERYWHERE
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_a_weighted_sum_is_added_to_the_base(backend, shape, dtype, wide):
    bases, experts = group(shape, dtype)
    backend, m, n = operators(backend), shape[0], math.prod(shape[1:])
    coefficients = torch.tensor([0.4, 0.0, -1.5], dtype=torch.float64)
    changes = backend.weighted_sum(bases, experts, coefficients, wide)
    assert changes.shape == (2, m, n)
    assert changes.dtype == wide
    outputs, exact, bound = Outputs(shape, dtype), [], []
    u = min(UNIT[wide], UNIT[dtype])
    largest = backend.add(bases, changes, outputs.outs)
    for index in range(2):
        base, others = of_tensor(bases, experts, index)
        parts = coefficients.unsqueeze(1) * task_matrix(base, others)
        size = parts.abs().sum(0) + (base.double().abs().reshape(-1) if wide != UNIT_DTYPE[dtype] else 0.0)
        assert ((changes[index].double().view(-1) - parts.sum(0)).abs() <= 5 * UNIT[wide] * size).all()
        exact.append(base.double().reshape(m, n) + changes[index].double())
        bound.append(2 * u * exact[-1].abs())
    outputs.check(exact, bound, largest)


@EVERYWHERE
def test_a_mean_is_summed_in_float64(backend, shape, dtype):
    _, experts = group(shape, dtype)
    outputs, exact, bound = Outputs(shape, dtype), [], []
    largest = operators(backend).mean(experts, WEIGHTS, outputs.outs)
    for index in range(2):
        parts = torch.stack([w * expert[index].double() for w, expert in zip(WEIGHTS, experts, strict=True)])
        exact.append(parts.sum(0))
        bound.append(5 * 2.0**-53 * parts.abs().sum(0))
    outputs.check(exact, bound, largest)


@pytest.mark.parametrize(("shape", "dtype"), [((300, 5), torch.float32), ((36, 72), torch.bfloat16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_tall_matrices_are_matched(backend, shape, dtype):
    bases, experts = group(shape, dtype)
    generator, wide = torch.Generator().manual_seed(1), UNIT_DTYPE[dtype]
    merged = [base.to(wide) + 0.05 * torch.randn(shape, generator=generator) for base in bases]
    changes = torch.stack([one.double() - base.double() for one, base in zip(merged, bases, strict=True)])
    outputs, exact, bound, u = Outputs(shape, dtype), [], [], UNIT[dtype]
    largest = operators(backend).match_columns(bases, experts, merged, WEIGHTS, outputs.outs)
    for index in range(2):
        base, others = of_tensor(bases, experts, index)
        wanted = WEIGHTS @ task_matrix(base, others).view(3, *shape).norm(dim=1)
        scaled = changes[index] * (wanted / changes[index].norm(dim=0)).clamp_max(4.0)
        exact.append(base.double() + scaled)
        bound.append(u * exact[-1].abs() + 8 * u * scaled.abs())  # of ops.match_columns
    outputs.check(exact, bound, largest)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source", ["base", "expert"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_magnitude_tells_what_is_not_finite(backend, source, bad):
    shape, backend = (9, 11), operators(backend)
    bases, experts = group(shape, torch.float32)
    tensors = bases if source == "base" else experts[2]
    tensors[1] = tensors[1].clone()
    tensors[1][8, 10] = bad  # of the expert an element that DARE drops
    rows, half = torch.full((2, 9, 3), 0.5), torch.full((3,), 0.5, dtype=torch.float64)
    keys, changes = torch.full((2, 3), 3, dtype=torch.int64), torch.zeros(2, 9, 11)
    assert splitmix64(3, 99) >> 32 >= 2**31

    def written(write):
        return write([torch.empty(shape) for _ in range(2)])

    thresholds = torch.zeros(3)
    several = [
        written(lambda outs: backend.combine(bases, experts, half, None, None, None, outs)),
        written(lambda outs: backend.combine(bases, experts, rows, None, None, None, outs)),
        written(lambda outs: backend.combine_dare(bases, experts, WEIGHTS, 1.0, 0.5, keys, 0, outs)),
        written(lambda outs: backend.combine_ties(bases, experts, WEIGHTS, 1.0, thresholds, outs)),
        written(lambda outs: backend.add(tensors, changes, outs)),
        written(lambda outs: backend.mean([bases, *experts[1:]], WEIGHTS, outs)),
        written(lambda outs: backend.match_columns(bases, experts, [base + 1 for base in tensors], WEIGHTS, outs)),
    ]
    for largest in several:
        assert torch.isfinite(largest).tolist() == [True, False]
    small = [torch.empty(shape, dtype=torch.float16) for _ in range(2)]
    far = backend.add([torch.full(shape, 6e4)] * 2, torch.stack([changes[0], changes[0] + 1e4]), small)
    assert torch.isfinite(far).tolist() == [True, False]  # as it was rounded
