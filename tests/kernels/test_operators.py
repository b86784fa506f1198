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
# Triton runs in its interpreter here, which is slow: no large shapes; test_triton_kernels.py has more of the small.
PAIRS = [(backend, shape) for backend in BACKENDS for shape in SHAPES if backend != "triton" or shape != (700, 900)]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24, torch.float64: 2.0**-53}


def inputs(shape, dtype, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    experts = [base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return padded(base.to(dtype)), [padded(expert.to(dtype)) for expert in experts]


def task_matrix(base, experts):
    return torch.stack([(expert.double() - base.double()).reshape(-1) for expert in experts])


@pytest.mark.parametrize(("backend", "shape"), PAIRS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize(("backend", "shape"), [pair for pair in PAIRS if pair[1]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.mark.parametrize(("backend", "shape"), PAIRS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
    sentinel = torch.full([size + 4 for size in shape] or [3], -77.0, dtype=dtype)
    out = sentinel[tuple(slice(2, 2 + size) for size in shape)] if shape else sentinel[1]
    assert ops.combine(base, experts, core, out=out, backend=backend, **factors) is out

    tau = task_matrix(base, experts)
    exact = base.double() + (core @ tau).reshape(shape) + low_rank
    magnitude = base.double().abs() + (core.abs() @ tau.abs()).reshape(shape) + magnitude
    # Half an ulp of a binary format with p bits is at most 2^-p of the value; float16 also has subnormals.
    half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
    bound = half_ulp[dtype] * exact.abs() * (1 + 1e-6) + (8 + 2 * math.sqrt(rank)) * UNIT[dtype] * magnitude
    if dtype == torch.float16:
        bound = bound + 2.0**-25
    assert ((out.double() - exact).abs() <= bound).all()
    outside = int((sentinel == -77.0).sum())
    assert outside == sentinel.numel() - out.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_matrices_keep_their_shapes(backend):
    base, mixing = torch.empty(0, 4), torch.eye(1)
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
        (lambda b, e: ops.task_gram([b], [e], backend="tritn"), "backend: .* got 'tritn'; did you mean 'triton'?"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, sentence):
    base = torch.randn(4, 3)
    with pytest.raises(InvalidInput, match=sentence):
        call(base, [base.clone()])
