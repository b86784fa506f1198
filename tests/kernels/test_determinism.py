"""The same bits: again, in any order of tensors, on any number of threads, in any batching, spilled or not."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import ROWS, TRUNCATED, checkpoints, same_bits

from r2m_kernels import MergeConfig, analyze, merge
from r2m_kernels._stream import parallel
from r2m_kernels._stream.plan import Plan, PlannedTensor
from r2m_kernels._stream.tensors import TensorSpec
from r2m_kernels.findings import Findings
from r2m_kernels.gram import ordered_sum
from r2m_kernels.real_subspace import real_subspace

# Large enough that every tensor has several panels of blocks and one exceeds a thread's share.
SHAPES = {"big": (5000, 900), "medium": (700, 300), "flat": (5,), "conv": (64, 32, 3, 3), "small": (80, 90)}
CONFIGS = {
    "default": MergeConfig(),
    "rows": ROWS,
    "truncated": TRUNCATED,
    "centred": TRUNCATED.replace(center=True, residual="own", layer_weight="frobenius"),
    "full rank": TRUNCATED.replace(rank=1.0),
    "rows truncated": ROWS.replace(rank=0.1, scale="column"),
}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = [
        {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for _ in range(3)
    ]
    return base, experts


@pytest.fixture(scope="module")
def expected(inputs):
    """The merge of R²M with a relative eta, whatever threads the others have."""
    return merge(*inputs, TRUNCATED)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_on_any_number_of_threads(inputs, config):
    base, experts = inputs
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(merge(base, experts, config))
        assert torch.get_num_threads() == threads
    assert all(same_bits(results[0], other) for other in results[1:])


def test_in_any_order_of_tensors(inputs, expected):
    base, experts = inputs
    names = list(base)
    order = [*names[:1:-1], *names[:2]]
    turned = merge({n: base[n] for n in order}, [{n: e[n] for n in names} for e in experts], TRUNCATED)
    assert list(turned) == order
    assert same_bits(expected, {n: turned[n] for n in names})


def test_sums_over_tensors_do_not_depend_on_their_order():
    # Rounding to float32 would hide a float64 sum in another order: the Gram shows it.
    shapes = {f"layer.{i}": (20 + i, 30) for i in range(40)} | {f"norm.{i}": (20 + i,) for i in range(40)}
    base, experts = checkpoints(3, shapes=shapes, dtype=torch.float64)  # sums of float32 products are often exact
    turned = {name: base[name] for name in reversed(base)}
    first, second = analyze(base, experts, TRUNCATED), analyze(turned, experts, TRUNCATED)
    assert torch.equal(first.gram, second.gram)
    assert torch.equal(first.vector_gram, second.vector_gram)
    assert torch.equal(first.residuals().norms, second.residuals().norms)
    assert first.residuals().strength == second.residuals().strength


def test_spilled_factors_and_small_budgets_change_nothing(inputs, expected, tmp_path):
    base, experts = inputs
    torch.set_num_threads(2)
    analysis = analyze(base, experts, TRUNCATED, memory_budget="64KiB", spill_directory=tmp_path)
    assert analysis.spilled_bytes > 1e6
    assert same_bits(expected, analysis.merge())
    assert list(tmp_path.iterdir()) == []  # the file has no name: it goes with the process


def test_one_tensor_does_not_depend_on_the_others(inputs):
    base, experts = inputs
    config = MergeConfig.cart(rank=0.1, scale=1.0)  # no number of this configuration joins tensors
    whole = merge(base, experts, config)
    alone = merge({"medium": base["medium"]}, [{"medium": e["medium"]} for e in experts], config)
    assert torch.equal(whole["medium"], alone["medium"])


def test_the_merge_of_an_analysis_is_the_merge(inputs, expected):
    base, experts = inputs
    analysis = analyze(base, experts, TRUNCATED)
    assert same_bits(analysis.merge(), expected)
    for options in ({"eta": 0.2, "core_scale": 1.4, "norm_match": False}, {"eta_mode": "constant", "eta": 1.0}):
        assert same_bits(analysis.merge(**options), merge(base, experts, TRUNCATED, **options))
    assert same_bits(analysis.merge(rank=0.05), analysis.merge(rank=0.05))


def test_merges_side_by_side_leave_torchs_threads_as_they_were():
    torch.set_num_threads(3)
    first, second = threading.Event(), threading.Event()

    def short():
        with parallel.one_thread_per_product():
            first.set()
            second.wait(10)

    def long():
        first.wait(10)
        with parallel.one_thread_per_product():
            assert parallel.workers() == 3  # not the 1 that the other merge set
            second.set()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(short), pool.submit(long)]:
            future.result()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def test_for_each_keeps_order_nests_and_passes_errors_on():
    torch.set_num_threads(3)
    with parallel.one_thread_per_product():
        assert torch.get_num_threads() == 1
        nested = parallel.for_each(lambda i: sum(parallel.for_each(lambda j: i * j, range(4))), range(9))
        assert list(nested) == [6 * i for i in range(9)]
        assert list(parallel.for_each(lambda i: i, range(9), limit=2)) == list(range(9))
        with pytest.raises(ZeroDivisionError):
            list(parallel.for_each(lambda i: 1 // (i - 5), range(9)))
    assert torch.get_num_threads() == 3


def test_items_that_take_memory_run_side_by_side_as_far_as_they_fit():
    torch.set_num_threads(3)
    sizes, at_work, most, lock = [5, 4, 4, 9, 1, 2, 1, 1], [], [], threading.Lock()

    def function(place):
        with lock:
            at_work.append(sizes[place])
            most.append(tuple(at_work))
        time.sleep(0.01)
        with lock:
            at_work.remove(sizes[place])
        return 1 // (place - 6) if place >= 6 else place

    with parallel.one_thread_per_product():
        found = parallel.for_each_within(function, range(6), sizes[:6], room=8)
        assert list(found) == list(range(6))  # in their order, whoever was first
        assert all(sum(some) <= 8 or some == (9,) for some in most)
        # What comes first in the list does not fit beside the 5: the 1 and the 2 went before.
        assert (5, 1) in most
        assert max(map(len, most)) == 3
        with pytest.raises(ZeroDivisionError):
            list(parallel.for_each_within(function, range(8), sizes, room=8))
        left = parallel.for_each_within(function, range(6), sizes[:6], room=8)
        assert next(left) == 0
        most.clear()
        left.close()  # what is at work is awaited, and nothing else is begun
        assert not at_work
        assert len(most) < 5
    assert torch.get_num_threads() == 3


def test_deterministic_algorithms_are_not_asked_for_within_and_again_afterwards():
    within = parallel.deterministic(torch.are_deterministic_algorithms_enabled)
    assert not within()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert not within()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_a_training_script_has_switched_on_does_not_reach_a_merge(inputs, expected):
    base, experts = inputs
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bf16 inside float32 products, on CPUs that can
        torch.set_default_device("meta")
        torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then refuses cuBLAS's products
        with torch.autocast("cpu", dtype=torch.bfloat16):
            merged = merge(base, experts, TRUNCATED)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_default_device().type == "meta"
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision(before)
    assert same_bits(expected, merged)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("method", ["r2m_centred", "weight_average", "ties"])
def test_in_inference_mode_bits_are_the_same_on_several_threads(backend, method):
    base, experts = checkpoints(3)
    config = getattr(MergeConfig, method)()
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        expected = merge(base, experts, config, backend=backend)
        with torch.inference_mode():
            inside = {name: tensor.clone() for name, tensor in base.items()}
            merged = analyze(inside, experts, config, backend=backend, memory_budget="1MiB").merge()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert not any(tensor.is_inference() for tensor in merged.values())


def test_one_piece_of_work_starts_no_thread():
    torch.set_num_threads(3)
    with parallel.one_thread_per_product():
        before = threading.active_count()
        assert [*parallel.for_each(lambda item: (item, parallel.workers()), iter([7]))] == [(7, 1)]
        assert [*parallel.for_each(print, [])] == []
        assert (threading.active_count(), parallel.workers()) == (before, 3)
        assert [*parallel.for_each(lambda item: item, iter([7, 8, 9]))] == [7, 8, 9]
        assert threading.active_count() > before


def grams_of(count, experts):
    """Gram matrices of many sizes."""
    generator = torch.Generator().manual_seed(experts)
    rows = torch.randn(count, experts, 50, generator=generator, dtype=torch.float64)
    return rows @ rows.mT * torch.logspace(-3, 3, count, dtype=torch.float64)[torch.randperm(count)].view(-1, 1, 1)


@pytest.mark.parametrize("experts", [2, 3, 19])
def test_grams_are_summed_one_after_the_other(experts):
    grams, total = grams_of(400, experts), torch.zeros(experts, experts, dtype=torch.float64)
    for gram in grams:
        total += gram
    assert torch.equal(ordered_sum([*grams], experts, experts), total)
    assert torch.equal(ordered_sum([*grams.diagonal(dim1=1, dim2=2)], experts), total.diag())
    assert torch.equal(ordered_sum([], experts), torch.zeros(experts, dtype=torch.float64))


@pytest.mark.parametrize("experts", [2, 3, 8, 33])
def test_gram_matrices_of_residuals_in_any_order_of_tensors(experts):
    """On them hang scales, and which factors are rounded."""
    names = list(map(str, range(147)))
    grams, config = dict(zip(names, grams_of(len(names), experts), strict=True)), MergeConfig()
    real = real_subspace(sum(grams.values()), config)

    def found(some):  # the larger ones come first
        specs = [TensorSpec((size, 9), torch.float32) for size in range(len(some), 0, -1)]
        tensors = tuple(PlannedTensor(name, spec, "matrix") for name, spec in zip(some, specs, strict=True))
        return Findings(config, ["expert"] * experts, Plan(tensors, {}, {}, ()), grams, {}, real, {}, None)

    forth, back = found(names), found(names[::-1])
    assert [*forth.residual_grams] == names == [*back.residual_grams][::-1]
    assert same_bits(dict(sorted(forth.residual_grams.items())), dict(sorted(back.residual_grams.items())))
    for name, gram in forth.residual_grams.items():
        assert torch.equal(forth.residual_energies[name], gram.diag())
        expected = real.mixing.T @ grams[name] @ real.mixing
        scale = real.mixing.abs().T @ grams[name].abs() @ real.mixing.abs()
        # Sums of N products twice, each way of adding within N roundings of the exact one.
        assert ((gram - expected).abs() <= 4 * experts * 2.0**-53 * scale).all()
    assert found([]).residual_grams == found([]).residual_energies == {}
