"""Each operator of ``r2m_kernels.ops`` against float64, within bounds written beside the test."""

from __future__ import annotations

import math

import pytest
import torch
from cases import padded

from r2m_kernels import InvalidInput, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (13,), (5, 7), (129, 65), (1, 1000), (1000, 1), (33, 7, 3), (16, 3, 5, 5), (700, 900)]
BACKENDS = ["torch", "native", "triton"]
# Triton runs in its interpreter here, which is slow: no large shapes, and in `make test` two dtypes of each, half of
# the shapes of each dtype and not a thousand rows; test_triton_kernels.py has all dtypes on rows that are whole
# vectors and on others.
CASES = [
    pytest.param(backend, shape, dtype, marks=pytest.mark.slow if slow else ())
    for backend in BACKENDS
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate(DTYPES)
    for slow in [backend == "triton" and ((i + j) % 2 or shape == (1000, 1))]
    if backend != "triton" or shape != (700, 900)
]
EVERYWHERE = pytest.mark.parametrize(("backend", "shape", "dtype"), CASES, ids=str)
OF_MATRICES = pytest.mark.parametrize(("backend", "shape", "dtype"), [one for one in CASES if one.values[1]], ids=str)
UNIT_DTYPE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in DTYPES}  # what is computed in
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24, torch.float64: 2.0**-53}


def inputs(shape, dtype, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    experts = [base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return padded(base.to(dtype)), [padded(expert.to(dtype)) for expert in experts]


def task_matrix(base, experts):
    return torch.stack([(expert.double() - base.double()).reshape(-1) for expert in experts])


def strided_output(shape, dtype):
    """A view in the middle of a buffer of sentinels, and how many of those must stay."""
    sentinels = torch.full([size + 4 for size in shape] or [3], -77.0, dtype=dtype)
    out = sentinels[tuple(slice(2, 2 + size) for size in shape)] if shape else sentinels[1]
    return out, lambda: int((sentinels == -77.0).sum()) == sentinels.numel() - out.numel()


def rounding(exact, dtype):
    """Half an ulp of a binary format with p bits is at most 2^-p of the value; float16 also has subnormals."""
    half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
    return half_ulp[dtype] * exact.abs() * (1 + 1e-6) + (2.0**-25 if dtype == torch.float16 else 0.0)


@EVERYWHERE
def test_task_gram_is_within_its_bound(backend, shape, dtype):
    base, experts = inputs(shape, dtype)
    gram = ops.task_gram([base], [[expert] for expert in experts], backend=backend)
    tau = task_matrix(base, experts)
    assert gram.shape == (1, 3, 3)
    assert gram.dtype == torch.float64
    # Not tau @ tau.T: that sums 630,000 terms one after another, and is itself off by the bound.
    exact = torch.stack([(row * tau).sum(dim=1) for row in tau])
    bound = 16 * UNIT[dtype] * tau.abs() @ tau.abs().T
    assert ((gram[0] - exact).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_task_gram_is_within_its_bound_where_every_product_is_positive(backend):
    # The hardest case for a sum in float32: 4 M equal-signed terms.
    base = torch.zeros(2048, 2048)
    experts = [torch.rand(2048, 2048, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    gram = ops.task_gram([base], [[expert] for expert in experts], backend=backend)[0]
    exact = task_matrix(base, experts)
    assert ((gram - exact @ exact.T).abs() <= 16 * 2.0**-24 * exact @ exact.T).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_task_gram_takes_a_group_of_tensors_and_any_number_of_experts(backend):
    count = 5 if backend == "triton" else 13  # test_triton_kernels.py has 13
    pairs = [inputs((9, 11), torch.float32, count, seed) for seed in range(2)]
    pairs.append(inputs((5,), torch.bfloat16, count, seed=5))
    group = [[experts[j] for _, experts in pairs] for j in range(count)]
    grams = ops.task_gram([base for base, _ in pairs], group, backend=backend)
    for gram, (base, experts) in zip(grams, pairs, strict=True):
        assert torch.allclose(gram, task_matrix(base, experts) @ task_matrix(base, experts).T, rtol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["base", "expert"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_task_gram_cannot_hide_a_non_finite_input(bad, where, backend):
    base, experts = inputs((70, 3), torch.float32)
    (base if where == "base" else experts[1])[69, 2] = bad
    gram = ops.task_gram([base], [[expert] for expert in experts], backend=backend)[0]
    assert not torch.isfinite(gram[1]).all()
    assert torch.isfinite(gram[0, 0]) == (where == "expert")


@OF_MATRICES
@pytest.mark.parametrize("transpose", [False, True])
def test_residual_matmul_is_the_product_with_the_residual(backend, shape, dtype, transpose):
    base, experts = inputs(shape, dtype)
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(3, dtype=torch.float64) - torch.rand(3, 1, generator=generator, dtype=torch.float64)
    m, n = shape[0], math.prod(shape[1:])
    rhs = torch.randn(3, m if transpose else n, 6, generator=generator).to(torch.promote_types(dtype, torch.float32))
    result = ops.residual_matmul(base, experts, mixing, padded(rhs), transpose=transpose, backend=backend)
    residual = (mixing.T @ task_matrix(base, experts)).reshape(3, m, n)
    magnitude = (mixing.abs().T @ task_matrix(base, experts).abs()).reshape(3, m, n)
    if transpose:
        residual, magnitude = residual.transpose(1, 2), magnitude.transpose(1, 2)
    # Forming X costs N + 1 roundings an element, a sum of K terms about √K more.
    bound = (4 + 2 * math.sqrt(rhs.shape[1]) + 4) * UNIT[dtype] * magnitude @ rhs.double().abs()
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((result - residual @ rhs.double()).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(2300, 2000), (40, 120000)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_tensors_of_several_panels_are_summed_whole(shape, backend):
    # More than 2²² elements: blocks in several panels, which other shapes of these tests do not have.
    base, experts = inputs(shape, torch.float32, count=2)
    mixing = torch.tensor([[1.0, -0.3], [-0.7, 1.0]], dtype=torch.float64)
    tau = task_matrix(base, experts)
    gram = ops.task_gram([base], [[expert] for expert in experts], backend=backend)[0]
    assert ((gram - tau @ tau.T).abs() <= 16 * 2.0**-24 * tau.abs() @ tau.abs().T).all()
    residual = (mixing.T @ tau).reshape(2, *shape)
    generator = torch.Generator().manual_seed(1)
    for transpose in (False, True):
        x = residual.transpose(1, 2) if transpose else residual
        rhs = torch.randn(2, x.shape[2], 3, generator=generator)
        product = ops.residual_matmul(base, experts, mixing, rhs, transpose=transpose, backend=backend)
        exact = x @ rhs.double()
        assert (product - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("shape", [(5, 3), (3, 200, 40), (2, 2, 50, 7), (4, 6, 0)], ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("backend", BACKENDS)
def test_orthonormalize_spans_its_input(shape, scale, backend):
    y = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = ops.orthonormalize(padded(y), backend=backend)
    assert q.shape == y.shape
    unit = torch.eye(shape[-1]).expand(*shape[:-2], -1, -1)
    assert torch.allclose(q.transpose(-1, -2) @ q, unit, atol=1e-5)
    assert torch.allclose(q @ (q.transpose(-1, -2) @ (y / scale)), y / scale, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_orthonormalize_of_degenerate_blocks_is_finite(backend):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(60, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
    q = ops.orthonormalize(torch.stack([torch.zeros(60, 10), low]), backend=backend)
    assert torch.equal(q[0], torch.zeros(60, 10))
    assert torch.isfinite(q).all()
    assert torch.allclose(q[1] @ (q[1].T @ low), low, atol=1e-4)


@EVERYWHERE
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_combine_is_within_its_bound_and_rounded_once(backend, shape, dtype, rank):
    base, experts = inputs(shape, dtype)
    generator = torch.Generator().manual_seed(2)
    core = torch.rand(3, generator=generator, dtype=torch.float64) - 0.3
    factors = {}
    low_rank = magnitude = torch.zeros(1, dtype=torch.float64)
    if rank and shape:
        m, n = shape[0], math.prod(shape[1:])
        scale = torch.rand(3, generator=generator, dtype=torch.float64)
        left, right = torch.randn(3, m, rank, generator=generator), torch.randn(3, rank, n, generator=generator)
        factors = {"left": padded(left), "right": padded(right), "scale": scale}
        weights = scale.view(3, 1, 1)
        low_rank = (weights * (left.double() @ right.double())).sum(0).reshape(shape)
        magnitude = (weights * (left.double().abs() @ right.double().abs())).sum(0).reshape(shape)
    out, rest_is_untouched = strided_output(shape, dtype)
    assert ops.combine(base, experts, core, out=out, backend=backend, **factors) is out

    tau = task_matrix(base, experts)
    exact = base.double() + (core @ tau).reshape(shape) + low_rank
    magnitude = base.double().abs() + (core.abs() @ tau.abs()).reshape(shape) + magnitude
    bound = rounding(exact, dtype) + (8 + 2 * math.sqrt(rank)) * UNIT[dtype] * magnitude
    assert ((out.double() - exact).abs() <= bound).all()
    assert rest_is_untouched()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_of_16_bits_are_no_reason_to_round(backend, dtypes):
    """With a scale they are numbers like others, and only what a merge has rounded is multiplied in bfloat16."""
    base, experts = inputs((33, 40), torch.float32)
    generator, core = torch.Generator().manual_seed(2), torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64)
    scale = torch.tensor([0.37, 0.61, 1.2], dtype=torch.float64)
    left, right = (
        torch.randn(3, *size, generator=generator).to(torch.bfloat16).to(dtype)
        for size, dtype in zip(((33, 5), (5, 40)), dtypes, strict=True)
    )
    merged = ops.combine(base, experts, core, left, right, scale, backend=backend)
    tau, weights = task_matrix(base, experts), scale.view(3, 1, 1)
    exact = base.double() + (core @ tau).view(33, 40) + (weights * (left.double() @ right.double())).sum(0)
    magnitude = base.double().abs() + (core @ tau.abs()).view(33, 40)
    magnitude += (weights * (left.double().abs() @ right.double().abs())).sum(0)
    bound = rounding(exact, torch.float32) + (8 + 2 * math.sqrt(5)) * 2.0**-24 * magnitude
    assert ((merged.double() - exact).abs() <= bound).all()


@OF_MATRICES
def test_combine_rows_weights_residuals_by_their_lengths(backend, shape, dtype):
    base, experts = inputs(shape, dtype)
    for expert in experts:
        expert[0] = base[0]  # a row that nobody changed
    core = torch.tensor([0.5, 0.2, -0.1], dtype=torch.float64)
    mixing = torch.eye(3, dtype=torch.float64) - torch.tensor([[0.4], [0.3], [0.1]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    scales = torch.tensor([1.0, 2.5, 0.0], dtype=torch.float64)  # nothing of the last one counts
    eta, power = 0.8, 3.0
    out, rest_is_untouched = strided_output(shape, dtype)
    assert ops.combine_rows(base, experts, core, mixing, weights, scales, eta, power, out, backend) is out
    assert rest_is_untouched()

    tau = task_matrix(base, experts).reshape(3, shape[0], -1)
    unit, theta = UNIT[dtype], base.double().reshape(shape[0], -1)
    # Of experts and rows, (N, m); of all their elements, (N, m, n).
    residuals, magnitudes = torch.tensordot(mixing.T, tau, 1), torch.tensordot(mixing.abs().T, tau.abs(), 1)
    norms = residuals.norm(dim=2)
    lengths = weights[:, None] * (scales[:, None] * norms) ** power
    shares = torch.where(lengths.sum(0) > 0, lengths / lengths.sum(0), weights[:, None])
    coefficients = core[:, None] + eta * mixing @ shares
    # How well lengths are known, and what that makes of the shares; the rest is N + 4 roundings.
    known = (6 * unit * magnitudes.norm(dim=2) / norms).nan_to_num(0.0).amax(0)
    unsure = eta * mixing.abs() @ shares * ((1 + 1.001 * known) ** (2 * power) - 1)
    size = theta.abs() + (coefficients.abs()[..., None] * tau.abs()).sum(0)
    bound = 7 * unit * size + (unsure[..., None] * tau.abs()).sum(0)
    exact = (theta + (coefficients[..., None] * tau).sum(0)).reshape(shape)
    assert ((out.double() - exact).abs() <= rounding(exact, dtype) + bound.reshape(shape)).all()
    assert torch.equal(out[0], base[0])


@OF_MATRICES
def test_match_columns_has_the_specialists_lengths(backend, shape, dtype):
    base, experts = inputs(shape, dtype)
    merged = (base.double() + 0.03 * torch.sin(torch.arange(base.numel()).double()).reshape(shape)).to(
        UNIT_DTYPE[dtype]
    )
    columns = math.prod(shape[1:])
    merged.reshape(shape[0], -1)[:, columns // 2] = base.reshape(shape[0], -1)[:, columns // 2]  # did not change
    tiny = columns // 3
    if tiny != columns // 2:  # would have to grow by more than 4
        step = (merged.double() - base.double()).reshape(shape[0], -1)[:, tiny] / 64
        merged.view(shape[0], -1)[:, tiny] = (base.double().reshape(shape[0], -1)[:, tiny] + step).to(merged.dtype)
    counts = torch.tensor([0.5, 0.0, 1.5], dtype=torch.float64)
    out, rest_is_untouched = strided_output(shape, dtype)
    assert ops.match_columns(base, experts, padded(merged), counts, out, backend) is out
    assert rest_is_untouched()

    tau = task_matrix(base, experts).reshape(3, shape[0], -1)
    change = (merged.double() - base.double()).reshape(shape[0], -1)
    wanted, reached = torch.tensordot(counts, tau.norm(dim=1), 1) / counts.sum(), change.norm(dim=0)
    factors = torch.where(reached > 0, (wanted / reached).clamp_max(4.0), 1.0)
    scaled = change * factors
    exact = (base.double().reshape(shape[0], -1) + scaled).reshape(shape)
    bound = UNIT[dtype] * exact.abs() + 8 * UNIT[dtype] * scaled.abs().reshape(shape)
    assert ((out.double() - exact).abs() <= rounding(exact, dtype) + bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_may_be_an_input(backend):
    base, experts = inputs((40, 30), torch.float32)
    core, mixing, ones, untouched = torch.full((3,), 0.3), torch.eye(3) - 0.3, torch.ones(3), experts[1].clone()
    for index in range(4):
        copies = [tensor.clone() for tensor in (base, *experts)]
        expected = ops.combine_rows(base, experts, core, mixing, ones / 3, ones, 1.0, 2.0, backend=backend)
        arguments = (copies[0], copies[1:], core, mixing, ones / 3, ones, 1.0, 2.0)
        assert torch.equal(ops.combine_rows(*arguments, out=copies[index], backend=backend), expected)
        copies = [tensor.clone() for tensor in (base, *experts)]
        matched = ops.match_columns(base, experts, experts[1], ones, backend=backend)
        found = ops.match_columns(copies[0], copies[1:], copies[2], ones, out=copies[index], backend=backend)
        assert torch.equal(found, matched)
        assert index == 2 or torch.equal(copies[2], untouched)  # a change is worked on in a copy


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_matrices_keep_their_shapes(backend):
    base, mixing, one = torch.empty(0, 4), torch.eye(1), torch.ones(1)
    assert ops.combine_rows(base, [base], one, mixing, one, one, 1.0, 2.0, backend=backend).shape == (0, 4)
    assert ops.match_columns(base, [base], base, one, backend=backend).shape == (0, 4)
    assert ops.residual_matmul(base, [base], mixing, torch.ones(1, 4, 2), backend=backend).shape == (1, 0, 2)
    nothing = ops.residual_matmul(base, [base], mixing, torch.ones(1, 0, 2), transpose=True, backend=backend)
    assert torch.equal(nothing, torch.zeros(1, 4, 2))


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_orthonormalize_does_not_hide_a_nan(columns, backend):
    y = torch.ones(5, columns)
    y[3, columns - 1] = math.nan
    assert not torch.isfinite(ops.orthonormalize(y, backend=backend)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_combine_without_out_has_the_bases_dtype_and_shape(backend):
    base, experts = inputs((4, 3), torch.bfloat16)
    merged = ops.combine(base, experts, torch.full((3,), 1 / 3), backend=backend)
    assert merged.dtype == torch.bfloat16
    assert merged.shape == (4, 3)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_same_bits_on_any_number_of_threads(backend):
    base, experts = inputs((3000, 1500), torch.float32)  # several panels
    mixing, third = torch.eye(3, dtype=torch.float64) - 0.3, torch.ones(3) / 3
    tall, wide = torch.randn(3, 3000, 24), torch.randn(3, 1500, 24)
    left, right = torch.randn(3, 3000, 9), torch.randn(3, 9, 1500)
    calls = [
        lambda: ops.task_gram([base], [[expert] for expert in experts], backend=backend),
        lambda: ops.residual_matmul(base, experts, mixing, wide, backend=backend),
        lambda: ops.residual_matmul(base, experts, mixing, tall, transpose=True, backend=backend),
        lambda: ops.orthonormalize(tall, backend=backend),
        lambda: ops.combine(base, experts, third, left, right, torch.ones(3), backend=backend),
        lambda: ops.combine_rows(base, experts, third, mixing, third, third, 1.0, 3.0, backend=backend),
        lambda: ops.match_columns(base, experts, experts[0], third, backend=backend),
    ]
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found.append([call() for call in calls])
    for more in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], more, strict=True))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda b, e: ops.task_gram([], []), "base: expected at least one, got none"),
        (lambda b, e: ops.task_gram([b], [[b, b]]), "tensors of expert 0: expected 1, got 2"),
        (lambda b, e: ops.task_gram([b], [[b.T]]), r"tensor 0 of expert 0: expected shape \(4, 3\), got \(3, 4\)"),
        (
            lambda b, e: ops.task_gram([b.int()], [[b]]),
            "base tensor 0: expected one of torch.float64, .* got torch.int32",
        ),
        (lambda b, e: ops.residual_matmul(b, e, torch.eye(2), b), r"mixing: expected shape \(1, 1\), got \(2, 2\)"),
        (
            lambda b, e: ops.residual_matmul(b, e, torch.eye(1), torch.ones(1, 4, 2)),
            r"rhs: expected shape \(1, 3, 2\), got \(1, 4, 2\)",
        ),
        (
            lambda b, e: ops.residual_matmul(b, e, torch.eye(1), torch.ones(1, 3, 2), precision="tf23"),
            "precision: expected one of 'ieee', .* got 'tf23'; did you mean 'tf32'?",
        ),
        (lambda b, e: ops.orthonormalize(b.T), r"y: expected shape \(\.\.\., m, k\) with k <= m, got \(3, 4\)"),
        (lambda b, e: ops.combine(b, e, torch.ones(2)), r"core: expected shape \(1,\), got \(2,\)"),
        (lambda b, e: ops.combine(b, e, torch.ones(1), left=b), "left, right and scale: expected all of them or none"),
        (
            lambda b, e: ops.task_gram([b], [[b.to("meta")]]),
            "tensor 0 of expert 0: expected device cpu as the base, got",
        ),
        (
            lambda b, e: ops.combine(b, e, torch.ones(1), out=b.to("meta")),
            "out: expected device cpu as the base, got meta",
        ),
        (
            lambda b, e: ops.combine_rows(b, e, torch.ones(1), torch.eye(1), torch.ones(2), torch.ones(1), 1.0, 3.0),
            r"weights: expected shape \(1,\), got \(2,\)",
        ),
        (
            lambda b, e: ops.combine_rows(b, e, torch.ones(1), torch.eye(1), torch.ones(1), torch.ones(1), 1.0, -1),
            "power: expected a finite number of at least 0, got -1",
        ),
        (lambda b, e: ops.match_columns(b, e, b.T, torch.ones(1)), r"merged: expected shape \(4, 3\), got \(3, 4\)"),
        (lambda b, e: ops.match_columns(b, e, b, torch.ones(2)), r"counts: expected shape \(1,\), got \(2,\)"),
        (lambda b, e: ops.task_gram([b], [e], backend="tritn"), "backend: .* got 'tritn'; did you mean 'triton'?"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, sentence):
    base = torch.randn(4, 3)
    with pytest.raises(InvalidInput, match=sentence):
        call(base, [base.clone()])
