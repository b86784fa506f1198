"""Whole merges on the GPU: near the torch backend's, the same bits wherever inputs lie and whatever the budget."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from gpu_cases import all_same_bits, checkpoints, residuals

from r2m_kernels import InvalidInput, MergeConfig, analyze, merge
from r2m_kernels._stream.plan import truncation_rank

# By rows, and with a relative eta, merges may differ by more than their truncations: weights differ with them, or what
# nearly cancels is scaled up. Here the residual term is the mean of the truncated residuals as they are.
ALIKE = {"rank": 0.1, "row_power": 0.0, "whole_up_to": 0}
PLAIN = MergeConfig.r2m(**ALIKE, core_mode="mean", norm_match=False, head="merge").to_dict()


def truncation_allowance(base, experts, rank, excess):
    """Per matrix, how far two merges with PLAIN may lie apart whose truncations are within ``excess`` of the optimum.

    ‖F − F'‖ ≤ ‖X − F‖ + ‖X − F'‖, and the term is the mean over experts; a percent more is for float32's rounding.
    """
    mixing = analyze(base, experts, backend="torch", eta=0).real_subspace.mixing
    allowed = {}
    for name, tensor in base.items():
        if tensor.ndim == 2:
            x = residuals(tensor, [expert[name] for expert in experts], mixing)
            r = truncation_rank(rank, tensor.shape)
            tails = [float(torch.linalg.svdvals(residual)[r:].norm()) for residual in x]
            storage = 2.0**-7 * float(tensor.double().norm()) if tensor.dtype == torch.bfloat16 else 0.0
            allowed[name] = 1.01 * (2 * excess * sum(tails) / len(tails) + storage)
    return allowed


@pytest.fixture(scope="module")
def job(device, shapes, tiny):
    """Checkpoints and their merge; tests do not write to them."""
    base, experts = checkpoints(shapes[:1] if tiny else shapes, torch.float32, 2 if tiny else 3, device)
    return base, experts, merge(base, experts, backend="triton", **PLAIN)


def test_twice_the_same_bits_and_the_kinds_of_the_base(job, device):
    base, experts, merged = job
    assert all_same_bits(merged, merge(base, experts, backend="triton", **PLAIN))
    assert all(merged[name].shape == tensor.shape for name, tensor in base.items())
    assert all(merged[name].dtype == tensor.dtype for name, tensor in base.items())
    assert all(tensor.device.type == device.type for tensor in merged.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_near_the_torch_backend_on_the_cpu(job, device, shapes, tiny, dtype):
    base, experts, merged = job
    if dtype != torch.float32:
        if tiny:
            pytest.skip("one dtype is enough for a rehearsal")
        base, experts = checkpoints(shapes, dtype, 3, device)
        merged = merge(base, experts, backend="triton", **PLAIN)
    host = [{name: tensor.cpu() for name, tensor in state.items()} for state in (base, *experts)]
    other = merge(host[0], host[1:], backend="torch", **PLAIN)
    for name, allowed in truncation_allowance(host[0], host[1:], 0.1, 1.02).items():
        assert float((other[name].double() - merged[name].cpu().double()).norm()) <= allowed
    # The rest must agree to rounding, and whole residuals by rows with it.
    for options in ({"eta": 0}, {"rank": 1.0}):
        exact = [
            merge(base, experts, backend="triton", **options),
            merge(host[0], host[1:], backend="torch", **options),
        ]
        _assert_close(exact, dtype, tiny)


def _assert_close(exact, dtype, tiny):
    step = 2.0**-22 if dtype == torch.float32 else 2.0**-6 if tiny else 2.0**-7  # two roundings to the storage dtype
    for name in exact[1]:
        one, two = (found[name].cpu().double() for found in exact)
        assert ((one - two).abs() <= step * two.abs() + 1e-5).all()


def test_nan_in_an_expert_is_named(job):
    base, experts, _ = job
    name = next(name for name in base if name.endswith("1.weight"))
    broken = dict(experts[1])
    broken[name] = broken[name].clone()
    broken[name][3, 5] = math.nan
    with pytest.raises(InvalidInput, match=f"expert 'expert1': tensor '{name}' holds NaN or Inf in 1 of"):
        merge(base, [experts[0], broken, *experts[2:]], backend="triton")


@pytest.mark.parametrize(
    "options", [PLAIN, {}, {"rank": 0.1}, {"rank": 1.0}], ids=["plain", "default", "rank 0.1", "rows"]
)
def test_a_small_budget_gives_the_same_bits(job, options):
    base, experts, _ = job
    whole, parts = (
        merge(base, experts, backend="triton", memory_budget=budget, **options) for budget in (None, 200_000)
    )
    assert all_same_bits(whole, parts)


def test_where_deterministic_algorithms_are_asked_for(job):
    base, experts, _ = job
    expected = merge(base, experts, backend="triton")
    torch.use_deterministic_algorithms(True)
    try:
        assert all_same_bits(expected, merge(base, experts, backend="triton"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("count", [1, 2])
def test_few_experts(device, shapes, tiny, count):
    base, experts = checkpoints(shapes[:1] if tiny else shapes, torch.float32, count, device, copies=1)
    host = [{name: tensor.cpu() for name, tensor in state.items()} for state in (base, *experts)]
    for options in ({"eta": 0}, {"rank": 1.0}):
        merged = merge(base, experts, backend="triton", **options)
        _assert_close([merged, merge(host[0], host[1:], backend="torch", **options)], torch.float32, tiny)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merge(base, experts, backend="triton").values())


def test_an_analysis_is_merged_on_another_stream(job, device):
    base, experts, merged = job
    analysis = analyze(base, experts, backend="triton", **PLAIN)
    with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext():
        found = analysis.merge()
    assert all_same_bits(merged, found)


def test_inputs_in_the_cpus_memory_give_the_same_bits(job, device):
    base, experts, merged = job
    host = [{name: tensor.cpu() for name, tensor in state.items()} for state in (base, *experts)]
    found = merge(host[0], host[1:], device=device, backend="triton", **PLAIN)
    assert all(tensor.device.type == "cpu" for tensor in found.values())
    assert all_same_bits({name: tensor.cpu() for name, tensor in merged.items()}, found)


def test_an_analysis_merges_at_a_smaller_rank(job):
    base, experts, merged = job
    analysis = analyze(base, experts, backend="triton", **PLAIN)
    assert analysis.backend.name == "triton"
    assert all_same_bits(merged, analysis.merge())
    smaller = analysis.merge(analysis.config.replace(rank=0.05))
    direct = merge(base, experts, backend="triton", **{**PLAIN, "rank": 0.05})
    host = [{name: tensor.cpu() for name, tensor in state.items()} for state in (base, *experts)]
    # Leading components of a truncation to a larger rank: near-optimal too, but not the same bits.
    for name, allowed in truncation_allowance(host[0], host[1:], 0.05, 1.03).items():
        assert float((smaller[name].double() - direct[name].double()).norm()) <= allowed


def test_auto_chooses_triton_on_a_gpu(job, device):
    base, experts, _ = job
    analysis = analyze(base, experts, eta=0)
    assert (analysis.backend.name == "triton") == (device.type == "cuda")
    assert analysis.device.type == device.type
