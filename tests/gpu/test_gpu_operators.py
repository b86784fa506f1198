"""Operators on the GPU: inputs framed in NaN, aligned and off by one; outputs in sentinels; twice the same bits."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import SENTINEL, framed, mixing_of, residuals, same_bits, tensors, untouched, worst_excess

from bench.gpu.cases import cases
from r2m_kernels import MergeConfig, _triton, ops
from r2m_kernels._triton import launch
from r2m_kernels._triton.residual_matmul import matrix_group
from r2m_kernels._triton.residuals import Residuals
from r2m_kernels.truncation import truncate_residuals

OFFSETS = [pytest.param(0, id="aligned"), pytest.param(1, id="off by one")]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operator_is_within_its_bound_twice_with_the_same_bits(device, shapes, tiny, dtype, offset):
    for shape in shapes[: 1 if tiny else None]:
        for count in (3,) if tiny else (1, 2, 3, 5):
            for case in cases(shape, dtype, count, device, 64 + offset):
                first, second = case.call(), case.call()
                assert case.judge(first) <= 1, f"{case.operator} {case.what}"
                assert same_bits(first, second), f"{case.operator} {case.what}"


def test_more_tensors_than_a_grid_takes(device, tiny, monkeypatch):
    if tiny:
        monkeypatch.setattr(launch, "MOST_TENSORS", 3)
    size = launch.MOST_TENSORS + 4
    flat = torch.randn(3, size, 8, generator=torch.Generator().manual_seed(0))
    bases, *experts = [list(of_one.to(device)) for of_one in flat]
    outs = [torch.empty_like(base) for base in bases]
    _triton.combine(bases, experts, torch.full((2,), 0.5, dtype=torch.float64), None, None, None, outs)
    theta, tau = flat[0].double(), flat[1:].double() - flat[0].double()
    size_of = theta.abs() + tau.abs().sum(0)
    assert ((torch.stack(outs).cpu().double() - theta - tau.mean(0)).abs() <= 6 * 2.0**-24 * size_of).all()
    grams = _triton.task_gram(bases, experts).tasks.cpu()
    exact = torch.einsum("ilk,jlk->lij", tau, tau)
    assert ((grams - exact).abs() <= 16 * 2.0**-24 * torch.einsum("ilk,jlk->lij", tau.abs(), tau.abs())).all()


@pytest.mark.parametrize("offset", OFFSETS)
def test_sketch_multiplies_with_signs(device, offset):
    # X is the identity: what comes back is the signs themselves, exact in every precision.
    side = 80
    base, eye = framed(torch.zeros(side, side, device=device), offset), framed(torch.eye(side, device=device), offset)
    kept = Residuals([matrix_group([base], [[eye]])], [32])
    kept.form(torch.ones(1, 1, 1, device=device))
    keys = [torch.tensor([key], device=device) for key in (5, 5, 2**62 + 5)]
    found = [kept.short.of_sorts(kept.sketch(key))[0].cpu() for key in keys]
    assert found[0].shape == (1, 32, side)
    assert (found[0].abs() == 1).all()
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])
    # 2560 fair signs: their sum stays within four standard deviations, the rows' products within five of √80.
    assert abs(float(found[0].sum())) <= 4 * (32 * side) ** 0.5
    products = found[0][0] @ found[0][0].T - side * torch.eye(32)
    assert float(products.abs().max()) <= 5 * side**0.5


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 20])
def test_combine_writes_its_output_and_nothing_else(device, shapes, tiny, dtype, offset, rank):
    for shape in shapes[: 1 if tiny else None]:
        base, experts = tensors(shape, dtype, 3, device, offset=offset)
        core, scale = torch.tensor([0.5, 0.0, -0.25]), torch.tensor([0.1, 0.2, 0.3])
        source = torch.Generator().manual_seed(3)
        left, right = torch.randn(3, shape[0], rank, generator=source), torch.randn(3, rank, shape[1], generator=source)
        factors = (framed(left.to(device), offset), framed(right.to(device), offset), scale) if rank else ()
        outs = [framed(torch.full_like(base, SENTINEL), offset, SENTINEL) for _ in range(2)]
        for out in outs:
            assert ops.combine(base, experts, core, *factors, out=out, backend="triton") is out
            assert untouched(out)
        assert same_bits(*outs)
        tau = residuals(base, experts, torch.eye(3, dtype=torch.float64))
        exact = base.cpu().double() + torch.einsum("i,imn->mn", core.double(), tau)
        size = base.cpu().double().abs() + torch.einsum("i,imn->mn", core.double().abs(), tau.abs())
        if rank:
            exact += torch.einsum("i,imr,irn->mn", scale.double(), left.double(), right.double())
            size += torch.einsum("i,imr,irn->mn", scale.double(), left.double().abs(), right.double().abs())
        # Half an ulp; Triton's interpreter cuts down to bfloat16 where a GPU rounds.
        half_ulp = 2.0**-24 if dtype == torch.float32 else 2.0 ** (-7 if tiny else -8)
        bound = half_ulp * exact.abs() * (1 + 1e-6) + (20 + 2 * rank**0.5) * 2.0**-24 * size
        assert ((outs[0].cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncation_is_near_its_optimum_and_does_not_depend_on_the_group(device, shapes, tiny, dtype):
    # Eight tensors of three experts: more matrices than the batch that smaller groups are padded to.
    mixing, names = mixing_of(3), list("abc" if tiny else "abcdefgh")
    for shape in shapes[:1] if tiny else shapes:
        of_tensor = [tensors(shape, dtype, 3, device, seed=seed) for seed in range(len(names))]
        bases, experts = [base for base, _ in of_tensor], [[others[j] for _, others in of_tensor] for j in range(3)]
        rank = min(shape) // 10
        together = truncate_residuals(names, bases, experts, mixing, rank, MergeConfig(), _triton)
        alone = truncate_residuals(
            names[1:2], bases[1:2], [e[1:2] for e in experts], mixing, rank, MergeConfig(), _triton
        )
        for side in ("left", "right", "gap"):
            assert same_bits(getattr(together[1], side), getattr(alone[0], side))
        for factors, (base, others) in list(zip(together, of_tensor, strict=True))[: 1 if tiny else 3]:
            assert worst_excess(factors.left, factors.right, residuals(base, others, mixing)) <= 1.02
