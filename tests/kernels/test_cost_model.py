"""The cost model against hand-worked numbers, and against what the kernels' loops move in Triton's interpreter."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from count_loads import FROM_GRAMS, KEPT, counted

from bench.cost_model import (
    CHIPS,
    MODELS,
    NOTE,
    RANK,
    Road,
    Shapes,
    floor_seconds,
    merge_costs,
    report,
    road_of,
    truncation_costs,
)
from bench.machine import ROOT
from bench.operator_costs import (
    Job,
    StepCost,
    combine_matrix_cost,
    combine_rows_cost,
    combine_vector_cost,
    form_residuals_cost,
    inner_products_cost,
    orthonormalize_costs,
    quick_orthonormalize_costs,
    residual_gram_cost,
    residual_matmul_cost,
    residual_product_cost,
    row_coefficients_cost,
    row_grams_cost,
    shifts_cost,
    task_gram_cost,
    unit_rows_cost,
    vectors_gram_cost,
    weigh_rows_costs,
)
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels._triton import launch

# ---- by hand ----

LAYERS = Shapes("layers", ((1024, 1024, 96), (4096, 1024, 24), (1024, 4096, 24)))
# By hand it was reckoned with the bandwidth and the link that others have measured, and caches as fast as wanted.
UNLIMITED_CACHE = replace(CHIPS["H100"], l2=None)
MEASURED_BY_OTHERS = replace(UNLIMITED_CACHE, bandwidth=3.0e12, host_link=55e9)


def by_step(costs):
    return {cost.step: cost for cost in costs}


def test_the_reference_job_costs_what_was_worked_out_by_hand():
    assert LAYERS.elements == 24 * (4 * 1024**2 + 2 * 4096 * 1024) == 301_989_888
    costs = by_step(merge_costs(LAYERS, Job(3), rank=111))  # 103 columns and 8 of oversampling
    inputs = 4 * LAYERS.elements * 4
    assert inputs == pytest.approx(4.8e9, rel=0.01)
    gram = costs["task Gram"]
    assert gram.input_bytes == inputs
    assert gram.flops == 2 * 6 * LAYERS.elements == pytest.approx(3.6e9, rel=0.01)
    assert gram.floor_seconds(MEASURED_BY_OTHERS) == pytest.approx(1.6e-3, rel=0.02)
    assert gram.launches == 2 * 3  # three shapes, and a kernel that sums
    sketch, final, combine = costs["sketch V = KS"], costs["final Y = AV"], costs["combine: matrices"]
    # Gram matrices have 1024² numbers, half as many as their residuals in the mean.
    assert 2 * sketch.flops == costs["steps KV"].flops == final.flops == combine.flops == 2 * LAYERS.elements * 111 * 3
    assert final.flops == pytest.approx(0.2e12, rel=0.01)
    assert sketch.launches == 1  # of all shapes
    assert (sketch.kind, final.kind) == ("fp16", "fp16")
    assert costs["form residuals"].reread_factor == 1.0
    # In rows of tiles of 128 × 256 there are 1, 1, 2, 2, 3, 3, 4, 4; half of 2 · long · short², a quarter of that more.
    grams, half = costs["Gram K = AᵀA"], 3 * LAYERS.elements * 1024
    assert grams.flops == 20 * 128 * 256 * 2 * 3 * 24 * (4 * 1024 + 2 * 4096) == 1.25 * half
    assert (grams.bytes_read, grams.bytes_written) == (3 * LAYERS.elements * 2, 3 * LAYERS.elements)
    assert sketch.bytes_read == 3 * LAYERS.elements < final.bytes_read
    # Arithmetic takes 0.2 T / 990 T/s: less than the 1.6 ms of one read.
    assert replace(final, bytes_read=0, bytes_written=0, loaded_bytes=0).floor_seconds(CHIPS["H100"]) == pytest.approx(
        0.2e-3, rel=0.02
    )
    assert combine.input_bytes + combine.bytes_written == pytest.approx(6.0e9, rel=0.01)
    factors = 3 * 111 * 2 * (96 * 2048 + 48 * 5120)
    assert combine.bytes_read == inputs + factors
    assert costs["round right factors"].bytes_read == 3 * 111 * 4 * (96 * 1024 + 24 * 1024 + 24 * 4096)
    whole = by_step(merge_costs(LAYERS, Job(3), rank=111, rounded=False))
    assert whole["combine: matrices"].bytes_read == inputs + 2 * factors
    assert whole["weigh rows"].bytes_written - costs["weigh rows"].bytes_written == 3 * 111 * 2 * 96 * 1024 + (
        3 * 111 * 2 * 24 * (4096 + 1024)
    )
    assert "round right factors" not in whole
    assert costs["transfer"].floor_seconds(MEASURED_BY_OTHERS) == pytest.approx(88e-3, rel=0.01)
    # Without weights 82 bytes an element, some of vectors, and Gram matrices' products, which wait for no memory.
    rest = [cost for step, cost in costs.items() if not step.startswith("weigh rows")]
    assert 8.2e-3 < floor_seconds(rest, MEASURED_BY_OTHERS) < 11e-3


def test_bytes_an_element_stay_below_the_bars():
    """Of a merge of three float32 experts: without what vectors and factors take, and with it at rank .1."""
    job, without = Job(3), 0
    for m, n, count in LAYERS.matrices:
        road = road_of(m, n, truncation_rank(RANK, (m, n)), job, 2)
        assert road == (True, True, 2)
        costs = [*truncation_costs(m, n, count, 0, job, road), combine_matrix_cost(m, n, count, 0, job, True)]
        without += sum(cost.bytes_read + cost.bytes_written for cost in costs)
        without += task_gram_cost(m * n, count, job).input_bytes
    # Gram 16, form 16 + 6, K 6 + 3, sketch and two steps 3 each, final product 6, combination 16 + 4.
    assert without / LAYERS.elements == pytest.approx(82, abs=1e-3)
    assert without < 85 * LAYERS.elements
    for model in (LAYERS, MODELS["vit_l_14"]):
        kernels = [cost for cost in merge_costs(model, job, rank=0.1) if not cost.link_bytes]
        assert sum(cost.bytes_read + cost.bytes_written for cost in kernels) < 98 * model.elements


def test_a_shifted_step_reads_and_writes_what_its_formula_names():
    costs = by_step(truncation_costs(64, 32, 1, 8, Job(2), Road(True, False, 2)))
    kept, per_vector = 2 * 64 * 32 * 2, 2 * 8 * 2  # two residuals; N · k numbers in float16
    down, back = costs["steps Y = AV"], costs["steps V = AᵀY − shift·V"]
    squares = 2 * 8  # one tile of the long side
    assert costs["form residuals"].bytes_read == 3 * 64 * 32 * 4
    assert costs["form residuals"].bytes_written == kept
    assert down.bytes_read == 2 * (kept + 32 * per_vector)
    assert back.bytes_read == 2 * (kept + 64 * per_vector + 32 * per_vector)
    assert down.bytes_written == 2 * (64 * per_vector + squares)
    assert back.bytes_written == 2 * 32 * 2 * per_vector  # in float32
    assert costs["orthonormalize: product"].launches == 4  # after the sketch and a step, and twice at the end
    assert costs["orthonormalize: Gram"].flops == 4 * 2 * (32 * 8 * 8)
    without = by_step(truncation_costs(64, 32, 1, 8, Job(2), Road(True, False, 0)))
    assert without["steps Y = AV"].launches == 0
    assert without["orthonormalize: Gram"].launches == 2


def test_a_step_with_a_gram_matrix_reads_and_writes_what_its_formula_names():
    costs = by_step(truncation_costs(64, 32, 1, 8, Job(2), Road(True, True, 2)))
    residuals, grams, vectors = 2 * 64 * 32 * 2, 2 * 32 * 32 * 2, 2 * 8 * 32 * 2  # in float16, of two experts
    squares = 2 * 8  # one tile
    assert (costs["Gram K = AᵀA"].bytes_read, costs["Gram K = AᵀA"].bytes_written) == (residuals, grams)
    assert (costs["sketch V = KS"].bytes_read, costs["sketch V = KS"].bytes_written) == (grams, vectors)
    assert costs["steps KV"].bytes_read == 2 * (grams + vectors)
    assert costs["steps KV"].loaded_bytes == 2 * (grams + 2 * vectors)  # once more for how much of K they have
    assert costs["steps KV"].bytes_written == 2 * (vectors + squares)
    assert costs["steps: shifts"].bytes_read == 2 * squares
    assert costs["final Y = AV"].bytes_read == residuals + vectors
    assert costs["final Y = AV"].bytes_written == 2 * 2 * vectors + squares  # of the long side, in float32


@pytest.mark.parametrize(
    ("shape", "k", "aligned", "dtype", "road"),
    [
        ((4096, 1024), 410, True, torch.float32, (True, True, 2)),
        ((1024, 4096), 103, True, torch.bfloat16, (True, True, 2)),
        ((1024, 1024), 85, True, torch.float32, (True, False, 2)),  # less than a twelfth
        ((1024, 1024), 154, True, torch.float32, (True, True, 3)),  # too few columns to do without a step
        ((1024, 588), 236, True, torch.float32, (False, False, 3)),  # rows of no whole vectors
        ((1024, 1024), 410, False, torch.float32, (False, False, 3)),
        ((1024, 1024), 410, True, torch.float64, (True, False, 3)),
        ((1024, 1024), 10, True, torch.float32, (True, False, 6)),
    ],
    ids=str,
)
def test_truncations_go_the_road_that_the_backend_takes(shape, k, aligned, dtype, road):
    assert road_of(*shape, k, Job(3, dtype, aligned=aligned), 2) == road


@pytest.mark.parametrize(("experts", "k", "factor"), [(1, 100, 1), (3, 100, 3), (3, 129, 6), (8, 410, 32)])
def test_a_pass_fetches_its_inputs_once_a_block_of_experts_and_tile_of_columns(experts, k, factor):
    cost = residual_matmul_cost("pass", 1024, 4096, 1, k, Job(experts), False)
    assert cost.reread_factor == factor
    assert cost.fetched_bytes == factor * (experts + 1) * 1024 * 4096 * 4
    # Compulsory traffic does not grow with it: inputs, and N · k vectors of 4096.
    assert cost.bytes_read == cost.input_bytes + experts * k * 4096 * 4


@pytest.mark.parametrize(("experts", "factor"), [(1, 1), (4, 1), (5, 2), (9, 3)])
def test_residuals_are_formed_from_one_read_of_their_inputs_four_at_a_time(experts, factor):
    cost = form_residuals_cost(1024, 4096, 1, Job(experts))
    assert cost.reread_factor == factor
    assert (cost.bytes_read, cost.bytes_written) == ((experts + 1) * 2**24, experts * 2**23)


def test_more_than_four_experts_meet_in_pairs_of_blocks():
    factor = {experts: task_gram_cost(10**6, 1, Job(experts)).reread_factor for experts in (1, 4, 5, 8, 12)}
    # N = 5: (base + 4) + (base + 4 + 1) + (base + 1) = 13 of 6. N = 8: 5 + 9 + 5 of 9. N = 12: 3 · 5 + 3 · 9 of 13.
    assert factor == pytest.approx({1: 1.0, 4: 1.0, 5: 13 / 6, 8: 19 / 9, 12: 42 / 13})


def test_a_floor_is_the_slowest_resource():
    chip = CHIPS["A100"]
    step = StepCost("step", "tf32x3", flops=10**12, bytes_read=10**9, bytes_written=10**9, launches=1)
    assert step.floor_seconds(chip) == pytest.approx(3 * 1e12 / 156e12)
    assert replace(step, kind="tf32", flops=10**9).floor_seconds(chip) == pytest.approx(2e9 / 2.039e12)
    assert replace(step, link_bytes=32 * 10**9).floor_seconds(chip) == pytest.approx(1.0)
    loaded = replace(step, kind="tf32", flops=0, loaded_bytes=51 * 10**9)
    assert loaded.floor_seconds(CHIPS["H200"]) == pytest.approx(1e-2)
    assert loaded.floor_seconds(chip) == pytest.approx(2e9 / 2.039e12)  # nobody measured its cache
    assert loaded.predicted_seconds(CHIPS["H200"]) == pytest.approx(1e-2 + 6e-6)
    reread = replace(step, kind="tf32", flops=0, input_bytes=10**9, fetched_bytes=3 * 10**9)
    assert reread.floor_seconds(chip, cached=False) == pytest.approx(2 * reread.floor_seconds(chip))
    with pytest.raises(ValueError, match="MI300X has no tf32x3 products"):
        step.floor_seconds(CHIPS["MI300X"])
    with pytest.raises(ValueError, match="different steps"):
        step.plus(replace(step, step="another"))


def test_a_chip_that_is_slow_in_float64_waits_for_it():
    slow = CHIPS["RTX 4090"]
    costs = by_step(merge_costs(LAYERS, Job(3, target=slow.target), rank=64))
    gram = costs["orthonormalize: Gram"]
    assert gram.floor_seconds(slow) == gram.flops / 1.29e12 > 10 * (gram.bytes_read + gram.bytes_written) / 1.008e12
    task = costs["task Gram"]  # 12 flops an element beside 16 bytes
    assert task.floor_seconds(slow) == (task.bytes_read + task.bytes_written) / 1.008e12


# The record of an H200: what the model is said to reproduce, of matrices of a ViT-L/14 with so many experts.
MEASURED = json.loads((ROOT / "bench" / "results" / "gpu_operators.json").read_text())
MATRICES_OF_A_LAYER = {(1024, 1024): 4, (4096, 1024): 1, (1024, 4096): 1}  # in 24 layers, as in the record
REPRODUCED = [
    *[("task_gram", experts, torch.float32) for experts in (3, 8)],
    *[(product, 3, dtype) for product in ("product", "shifted product") for dtype in (torch.float32, torch.bfloat16)],
    ("full product", 3, torch.float32),
    *[("inner_products", experts, dtype) for experts in (3, 8) for dtype in (torch.float32, torch.bfloat16)],
]


def costs_of(operator, m, n, job):
    """Of 24 matrices, as the record's commit launched the operator."""
    k = truncation_rank(MEASURED["rank"], (m, n))
    if operator == "task_gram":
        return [task_gram_cost(m * n, 24, job)]
    if operator == "inner_products":  # Gram matrices of all experts' components, of both sides; then a sum
        sides = [vectors_gram_cost("Gram", job.experts * k, side, 24, job) for side in (m, n)]
        return [*sides, StepCost("sum", "fp64", launches=1)]
    # Residuals were formed again for every product, of whatever precision; what was subtracted was float32.
    shifted = operator == "shifted product"
    pass_ = residual_matmul_cost(operator, m, n, 24, k, job, (m >= n) == shifted)
    more = 24 * job.experts * k * min(m, n) * 4 * shifted
    read, loaded = pass_.bytes_read + more, pass_.loaded_bytes + more
    return [replace(pass_, bytes_read=read, loaded_bytes=loaded, launches=2)]  # a sum of squares came after it


@pytest.mark.parametrize(("operator", "experts", "dtype"), REPRODUCED, ids=str)
def test_the_roofs_say_within_15_per_cent_what_an_h200_took(operator, experts, dtype, monkeypatch):
    chip = replace(CHIPS["H200"], bandwidth=MEASURED["copy_bytes_per_second"])
    measured = predicted = 0.0
    for (m, n), times in MATRICES_OF_A_LAYER.items():
        job = Job(experts, dtype)
        (row,) = [one for one in MEASURED["rows"] if (one["operator"], one["job"]) == (operator, f"24 x {m}x{n} {job}")]
        (tiles_of, config), names = launched(row["kernels"][0]), [kernel["kernel"] for kernel in row["kernels"]]
        monkeypatch.setattr(launch, tiles_of, lambda *_, config=config: config)
        costs = costs_of(operator, m, n, job)
        assert sum(cost.launches for cost in costs) == len(names)
        measured += times * row["milliseconds"] / 1e3
        predicted += times * sum(cost.predicted_seconds(chip) for cost in costs)
    assert predicted == pytest.approx(measured, rel=0.15)


def launched(kernel):
    """The function of `launch` that chose a kernel's tiles, and what it chose, as the record has it."""
    config = {name: value for name, value in kernel.items() if name not in ("kernel", "registers", "n_spills")}
    if config.get("precision") == "bf16":
        config["precision"] = "fp16"  # as fast
    make = launch.GramConfig if "steps" in config else launch.MatmulConfig
    return kernel["kernel"].removesuffix("_kernel"), make(**config)


def test_models_have_the_sizes_that_are_published():
    assert MODELS["vit_b_16"].elements == pytest.approx(86.2e6, rel=0.002)  # CLIP's towers with their projections
    assert MODELS["vit_l_14"].elements == pytest.approx(304.0e6, rel=0.002)
    assert MODELS["7b"].elements == 6_738_415_616
    assert [count for *_, count in MODELS["vit_l_14"].matrices[:3]] == [96, 24, 24]


def test_sixteen_bit_inputs_halve_the_traffic_of_a_pass_and_an_unread_expert_saves_its_share():
    wide, narrow = (by_step(merge_costs(LAYERS, Job(3, dtype))) for dtype in (torch.float32, torch.bfloat16))
    for step in ("task Gram", "form residuals"):
        assert narrow[step].input_bytes * 2 == wide[step].input_bytes
    assert narrow["final Y = AV"] == wide["final Y = AV"]  # residuals are float16 either way
    assert narrow["sketch V = KS"].kind == "fp16"
    fewer = by_step(merge_costs(LAYERS, Job(3, unread=1)))["combine: matrices"]
    assert wide["combine: matrices"].bytes_read - fewer.bytes_read == LAYERS.elements * 4


def test_groups_change_launches_and_nothing_else():
    whole, parts = (merge_costs(LAYERS, Job(3), group_bytes=size) for size in (None, 2**28))
    # 16 MiB a square matrix and its experts' together, 64 MiB another: 16 and 4 in a group.
    assert by_step(whole)["combine: matrices"].launches == 3
    assert by_step(parts)["combine: matrices"].launches == by_step(parts)["final Y = AV"].launches == 6 + 6 + 6
    assert by_step(whole)["final Y = AV"].launches == 1
    assert [replace(cost, launches=0) for cost in whole] == [replace(cost, launches=0) for cost in parts]


def test_inner_products_are_those_of_pairs_of_components():
    cost = inner_products_cost(100, 50, 1, 40, Job(3))
    assert cost.flops == 2 * 6 * 40 * 40 * 150  # six pairs of experts
    assert cost.bytes_read == 3 * 40 * 150 * 4 + 9 * 4 * 8  # four tiles of 32 components by as many
    assert cost.bytes_written == 9 * 4 * 8 + 9 * 8


def test_the_report_covers_every_chip_and_says_what_it_is():
    lines = report()
    for chip in CHIPS:
        assert any(line.endswith(f"on {chip} ({NOTE})") for line in lines)
    assert sum(NOTE in line for line in lines) == 2 * len(CHIPS) + 1
    assert all(any(line.startswith(f"{model} ") and "/" in line for line in lines) for model in MODELS)
    one = report(model="7b", experts=8, dtype="bfloat16", chip="MI300X")
    assert sum(line.startswith("kernels, " + NOTE) for line in one) == 1
    assert not any("tf32" in line for line in one)
    (gram,) = [line.split() for line in report(model="vit_l_14", chip="H100") if line.startswith("task Gram")]
    assert gram[2:6] == ["4.87", "0.01", "4.87", "3.6"]


# ---- against the loops ----

# Rows of whole 16-byte vectors, but whole tiles nowhere.
MATRIX = {"m": 76, "n": 136, "tensors": 1}
ODD = {"m": 75, "n": 133, "tensors": 2}
GRAMS = [
    {**MATRIX, "experts": 3, "dtype_bytes": 4, "tensors": 2},
    {**MATRIX, "experts": 3, "dtype_bytes": 2},
    {**MATRIX, "experts": 6, "dtype_bytes": 4},
    {**ODD, "experts": 3, "dtype_bytes": 4},
]
PASSES = [
    {**MATRIX, "experts": experts, "k": 20, "dtype_bytes": size, "transpose": transpose}
    for experts, size in [(2, 4), (5, 4), (2, 2)]
    for transpose in (False, True)
]
EVEN = {"m": 72, "n": 136, "tensors": 2}  # rows and columns are whole vectors of float16
SEVERAL, WIDE = {**EVEN, "m": 200}, {**EVEN, "m": 272}  # tiles, of either size
KEPT_CASES = [
    {**sides, "operator": operator, "experts": experts, "k": k, "dtype_bytes": size}
    for sides, experts, k, size in [(EVEN, 2, 20, 4), (SEVERAL, 5, 100, 2), (WIDE, 2, 132, 4), (ODD, 2, 20, 4)]
    for operator in KEPT
]
FROM_GRAM_CASES = [
    {**sides, "operator": operator, "experts": 2, "k": k, "dtype_bytes": size}
    for sides, k, size in [(EVEN, 20, 4), ({"m": 280, "n": 296, "tensors": 1}, 132, 2)]
    for operator in FROM_GRAMS
]
# Of the same matrices: few vectors from sketches of A, many from Gram matrices.
TRUNCATIONS = [{**EVEN, "m": 104, "operator": "truncate", "experts": 2, "k": k, "dtype_bytes": 4} for k in (4, 33)]
BY_ROWS = [
    {**MATRIX, "experts": 3, "dtype_bytes": 4, "tensors": 2},
    {**ODD, "experts": 3, "dtype_bytes": 4},
    {**MATRIX, "experts": 6, "dtype_bytes": 2},
]
COMBINES = [
    {**MATRIX, "experts": 3, "k": 20, "dtype_bytes": 4, "unread": 0},
    {**MATRIX, "experts": 3, "k": 40, "dtype_bytes": 2, "unread": 1},
    {**MATRIX, "experts": 3, "k": 0, "dtype_bytes": 4, "unread": 1},
    {**MATRIX, "experts": 3, "k": 30, "dtype_bytes": 4, "unread": 1, "rounded": True},
    {**MATRIX, "experts": 5, "k": 20, "dtype_bytes": 2, "unread": 0, "rounded": True},
    # Four tiles; what a second one reads again of a row beyond the 20 or 12 that are written is a whole vector.
    {"m": 132, "n": 268, "tensors": 2, "experts": 2, "k": 20, "dtype_bytes": 4, "unread": 0, "rounded": True},
]
BASES = [{"m": 136, "n": 8, "tensors": 1, "experts": 2, "k": 70, "dtype_bytes": 4}]
PRODUCTS = [{**MATRIX, "experts": 3, "k": 36, "dtype_bytes": 4, "tensors": 2}]
# One number each, or N × N of them: not worth a term in the model.
NOT_COUNTED = ("table", "runs", "sorts", "outputs", "mixing", "energies", "core", "scale", "amounts", "pivots")


def loads(count, *without):
    return sum(size for name, size in count["loads"].items() if name not in (*NOT_COUNTED, *without))


def job_of(case, aligned=True):
    return Job(
        case["experts"],
        {4: torch.float32, 2: torch.bfloat16}[case["dtype_bytes"]],
        "sm_90",
        aligned,
        case.get("unread", 0),
    )


def tiles(*sides):
    """How many tiles cover what is (length, tile) on every side."""
    return math.prod(-(-length // tile) for length, tile in sides)


def tile_flops(config):
    return 2 * config["rows"] * config["columns"] * config["inner"] * config["experts"]


@pytest.mark.parametrize("case", GRAMS, ids=str)
def test_the_task_gram_moves_what_is_predicted(case):
    count = counted({"operator": "task_gram", **case})
    config = count["launches"][0]["config"]
    cost = task_gram_cost(case["m"] * case["n"], case["tensors"], job_of(case, config["aligned"]))
    assert count["distinct_input_bytes"] == cost.fetched_bytes
    # Only the variant for one pair of blocks knows that the two are the same; the other loads them as two.
    twice = 0 if config["diagonal"] else case["experts"] * case["m"] * case["n"] * case["dtype_bytes"] * case["tensors"]
    assert count["loads"]["inputs"] == cost.fetched_bytes + twice
    assert loads(count, "inputs") == cost.bytes_read - cost.input_bytes
    assert loads(count) == cost.loaded_bytes
    assert sum(count["stores"].values()) == cost.bytes_written
    assert len(count["launches"]) == cost.launches


@pytest.mark.parametrize("case", PASSES, ids=str)
def test_a_pass_moves_and_multiplies_what_is_predicted(case):
    count = counted({**case, "operator": "residual_matmul"})
    config, job, transpose = count["launches"][0]["config"], job_of(case), case["transpose"]
    assert asdict(job.product()) == config
    outer, inner = (case["n"], case["m"]) if transpose else (case["m"], case["n"])
    cost = residual_matmul_cost("pass", case["m"], case["n"], case["tensors"], case["k"], job, transpose)
    assert count["loads"]["inputs"] == cost.fetched_bytes == count["distinct_input_bytes"]
    # Every tile of rows reads the vectors again.
    again = (tiles((outer, config["rows"])) - 1) * case["experts"] * case["k"] * inner * 4 * case["tensors"]
    assert loads(count, "inputs") == cost.bytes_read - cost.input_bytes + again
    assert loads(count) == cost.loaded_bytes
    assert sum(count["stores"].values()) == cost.bytes_written
    sides = [(outer, config["rows"]), (case["k"], config["columns"]), (inner, config["inner"])]
    programs = tiles(*sides, (case["experts"], config["experts"])) * case["tensors"]
    assert count["dot_flops"] == programs * tile_flops(config) > cost.flops
    assert len(count["launches"]) == cost.launches


@pytest.mark.parametrize("case", KEPT_CASES, ids=str)
def test_kept_residuals_move_and_multiply_what_is_predicted(case):
    count = counted(case)
    (only,) = count["launches"]
    config, job, operator = only["config"], job_of(case, case["m"] != ODD["m"]), case["operator"]
    sides = case["m"], case["n"], case["tensors"]
    if operator == "form":
        cost = form_residuals_cost(*sides, job)
        assert count["loads"]["inputs"] == cost.fetched_bytes
    else:
        across = operator in ("sketch", "across")
        options = {"across": across, "signs": operator == "sketch", "last": operator == "last"}
        cost = residual_product_cost("product", *sides, case["k"], job, **options)
        long, short = max(sides[:2]), min(sides[:2])
        outer, inner = (short, long) if across else (long, short)
        of_tiles = [(case["k"], config["rows"]), (outer, config["columns"]), (inner, config["inner"])]
        programs = tiles(*of_tiles) * case["tensors"] * case["experts"]
        assert count["dot_flops"] == programs * tile_flops(config) > cost.flops
    assert loads(count, "shapes", "squares", "lengths", *["vectors"] * (operator == "sketch")) == cost.loaded_bytes
    assert sum(count["stores"].values()) == cost.bytes_written
    assert cost.launches == 1


@pytest.mark.parametrize("case", FROM_GRAM_CASES, ids=str)
def test_gram_matrices_of_residuals_move_and_multiply_what_is_predicted(case):
    count = counted(case)
    (only,) = count["launches"]
    config, job, operator, k, size = only["config"], job_of(case), case["operator"], case["k"], case["tensors"]
    short, long = sorted((case["m"], case["n"]))
    product = partial(residual_product_cost, "product", tensors=size, k=k, job=job, by_gram=True)
    if operator == "gram":
        cost = residual_gram_cost(case["m"], case["n"], size, job)
        inner = tiles((long, config["inner"])) * config["inner"]
        assert count["dot_flops"] * long == cost.flops * inner
        # Of 128 × 256: one in each of the first two rows of tiles, two in the third.
        of_matrix = {72: 1, 280: 1 + 1 + 2}[short] * 2 * long * 128 * 256
        assert cost.flops == size * case["experts"] * of_matrix
    elif operator == "shifts":
        cost = shifts_cost(short, size, k, job)
    elif operator == "gram last":
        cost = product(case["m"], case["n"], across=False, last=True)
    else:
        cost = product(short, short, across=(sketch := operator == "gram sketch"), signs=sketch, paired=not sketch)
    keys = ["vectors"] * (operator == "gram sketch")
    assert loads(count, "shapes", "squares", "lengths", "grams", *keys) == cost.loaded_bytes
    assert sum(count["stores"].values()) == cost.bytes_written
    assert cost.launches == 1


@pytest.mark.parametrize("case", TRUNCATIONS, ids=str)
def test_a_truncation_launches_and_loads_what_its_road_is_said_to(case):
    count, job, sides = counted({**case, "iterations": 1}), job_of(case), (case["m"], case["n"])
    road = road_of(*sides, case["k"], job, 1)
    assert road.by_gram == (case["k"] == 33)
    costs = truncation_costs(*sides, case["tensors"], case["k"], job, road)
    kernels = [one["kernel"] for one in count["launches"]]
    assert kernels.pop() == "judge_kernel"
    assert len(kernels) == sum(cost.launches for cost in costs)
    assert kernels.count("residual_product_kernel") == road.steps * (1 if road.by_gram else 2) + 2
    assert kernels.count("residual_gram_kernel") == road.by_gram
    # Keys of signs and numbers of whole residuals are not in the model.
    small = ("shapes", "steps", "grams", "squares", "lengths", "energies", "pivots", "final", "before", "last")
    predicted = sum(cost.loaded_bytes for cost in costs)
    assert predicted <= loads(count, *small) < 1.001 * predicted


@pytest.mark.parametrize("case", BY_ROWS, ids=str)
def test_a_merge_by_rows_moves_what_is_predicted(case):
    count, m, n, size = counted({"operator": "by_rows", **case}), case["m"], case["n"], case["tensors"]
    job = job_of(case, count["launches"][0]["config"]["aligned"])
    grams, combined = row_grams_cost(m, n, size, job), combine_rows_cost(m, n, size, job)
    costs = [grams, row_coefficients_cost(m, size, job), combined]
    assert count["distinct_input_bytes"] == grams.fetched_bytes + combined.fetched_bytes
    numbers = count["loads"]["core"] - count["loads"]["numbers"]  # a row's coefficients, and those of all
    assert loads(count) + numbers == sum(cost.loaded_bytes for cost in costs)
    assert sum(count["stores"].values()) - count["stores"]["largest"] == sum(cost.bytes_written for cost in costs)
    assert len(count["launches"]) == sum(cost.launches for cost in costs)


@pytest.mark.parametrize("case", COMBINES, ids=str)
def test_the_combination_moves_and_multiplies_what_is_predicted(case):
    count, job, m, n, k = counted({"operator": "combine", **case}), job_of(case), case["m"], case["n"], case["k"]
    config, again, rounded = count["launches"][0]["config"], 0, case.get("rounded", False)
    if k:
        cost = combine_matrix_cost(m, n, case["tensors"], k, job, rounded)
        rows, columns = tiles((m, config["rows"])), tiles((n, config["columns"]))
        # Components of all experts are those of one product where factors are rounded.
        depths = (
            tiles((case["experts"] * k, config["inner"])) if rounded else case["experts"] * tiles((k, config["inner"]))
        )
        programs = rows * columns
        assert count["dot_flops"] == depths * programs * case["tensors"] * tile_flops(config) > cost.flops
        width, (lefts, rights) = (2, (-(-side // 8) * 8 for side in (m, n))) if rounded else (4, (m, n))
        again = case["tensors"] * case["experts"] * k * width * (lefts * columns - m + rights * rows - n)
    else:
        cost, programs = combine_vector_cost(m * n, case["tensors"], job), tiles((m * n, config["block"]))
    assert count["loads"]["inputs"] == cost.fetched_bytes == count["distinct_input_bytes"]
    assert loads(count) == cost.bytes_read + again == cost.loaded_bytes
    assert count["stores"].pop("largest") == 4 * programs * case["tensors"]  # a number a tile
    assert count["stores"].pop("squares", 0) == (8 * programs * case["tensors"] if k else 0)
    assert sum(count["stores"].values()) == cost.bytes_written
    assert len(count["launches"]) == cost.launches


@pytest.mark.parametrize("case", BASES, ids=str)
def test_orthonormalization_moves_and_multiplies_what_is_predicted(case):
    count, job, k, length = counted({"operator": "orthonormalize", **case}), job_of(case), case["k"], case["m"]
    grams, factors, products = (count["launches"][i]["config"] for i in (0, 1, 2))
    gram, factor, product = orthonormalize_costs(k, length, case["experts"], job)
    across, depths = tiles((k, grams["rows"])), [16, 32, 48, 64, 70]  # of the triangle: one for each tile of 16 rows
    assert products["rows"] == products["inner"] == 16
    assert gram.loaded_bytes == gram.bytes_read * (across + 1)
    assert count["loads"]["vectors"] == gram.loaded_bytes + product.bytes_written * sum(depths) // k
    assert count["loads"]["triangle"] == product.bytes_read - product.bytes_written  # one tile of columns
    assert count["loads"]["vectors"] + count["loads"]["triangle"] == gram.loaded_bytes + product.loaded_bytes
    assert count["loads"]["gram"] + count["loads"]["out"] == factor.loaded_bytes
    blocks = 2 * case["experts"]
    lower = across * (across + 1) // 2 * tiles((length, grams["inner"])) * tile_flops(grams)
    steps = sum(tiles((depth, 16)) for depth in depths) * tiles((length, products["columns"]))
    # Of the elimination, by blocks of 32: three on the diagonal with a row each of the inverse, and what is below them.
    eliminated = (1 + 2 + 3) + (2 + 1) + (2 + 3 + 3)
    assert across == 3
    assert count["dot_flops"] == blocks * (
        lower + steps * tile_flops(products) + eliminated * 2 * factors["block"] ** 3
    )
    assert len(count["launches"]) == gram.launches + factor.launches + product.launches
    # Tiles on the diagonal are written twice, once as their own transpose; the factor is made in place.
    assert count["stores"]["gram"] > gram.bytes_written + factor.bytes_written / 2
    assert count["stores"]["out"] > product.bytes_written + factor.bytes_written


@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("length", [37, 2500])  # within what a program holds, and beyond
def test_unit_rows_move_what_is_predicted(length, subtracted):
    case = {"m": length, "n": 8, "tensors": 1, "experts": 2, "k": 5, "dtype_bytes": 4}
    count = counted({"operator": "unit_rows", **case, "subtracted": subtracted})
    cost = unit_rows_cost(5, length, 2, job_of(case, aligned=False), subtracted=subtracted)
    assert loads(count) == cost.loaded_bytes
    assert sum(count["stores"].values()) == cost.bytes_written
    assert len(count["launches"]) == cost.launches


@pytest.mark.parametrize(("k", "length", "last"), [(20, 40, False), (170, 201, True), (230, 264, False)])
def test_a_quick_pass_moves_and_multiplies_what_is_predicted(k, length, last):
    case = {"m": length, "n": 8, "tensors": 1, "experts": 2, "k": k, "dtype_bytes": 4}
    count, job = counted({"operator": "quick_pass", **case, "last": last}), job_of(case)
    grams, factors, products = (one["config"] for one in count["launches"])
    gram, factor, product = quick_orthonormalize_costs(k, length, 2, job, 1, int(last))
    assert loads(count) == gram.loaded_bytes + factor.loaded_bytes + product.loaded_bytes
    assert count["loads"]["gram"] == factor.loaded_bytes
    stores = sum(size for name, size in count["stores"].items() if name != "pivots")
    assert stores == gram.bytes_written + factor.bytes_written + product.bytes_written
    across = tiles((k, grams["rows"]))
    flops = across * (across + 1) // 2 * tiles((length, grams["inner"])) * tile_flops(grams)
    for first in range(0, k, products["rows"]):
        depth = min(k, first + products["rows"])
        flops += tiles((length, products["columns"]), (depth, products["inner"])) * tile_flops(products)
    side, rows = factors["columns"], factors["rows"]
    for made in range(0, k, side):
        flops += made // side * 2 * side**3
        steps = sum(1 + (made - top) // side for top in range(0, made, rows))
        steps += sum(1 + made // side for _ in range(made + side, k, rows))
        flops += steps * 2 * rows * side**2
    assert count["dot_flops"] == 2 * flops > gram.flops + factor.flops + product.flops
    assert [cost.launches for cost in (gram, factor, product)] == [1, 1, 1]


@pytest.mark.parametrize(
    "case",
    [
        {**MATRIX, "experts": 2, "k": 36, "dtype_bytes": 4, "m": m, "n": 40, "rounded": rounded}
        for m in (76, 36)
        for rounded in (False, True)
    ],
    ids=str,
)
def test_weighing_rows_moves_what_is_predicted(case):
    count, job = counted({"operator": "weigh_rows", **case}), job_of(case)
    costs = weigh_rows_costs(case["m"], case["n"], case["tensors"], case["k"], job, case["rounded"])
    assert loads(count) - count["loads"]["numbers"] == sum(cost.loaded_bytes for cost in costs)
    written = sum(cost.bytes_written for cost in costs)
    if case["n"] <= case["m"]:
        assert sum(count["stores"].values()) == written
    else:  # tiles on the diagonal of a Gram are written twice
        assert sum(count["stores"].values()) > written
    assert len(count["launches"]) == sum(cost.launches for cost in costs)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_inner_products_move_and_multiply_what_is_predicted(case):
    count, job = counted({"operator": "inner_products", **case}), job_of(case)
    cost = inner_products_cost(case["m"], case["n"], case["tensors"], case["k"], job)
    config = count["launches"][0]["config"]
    pairs, across = case["experts"] * (case["experts"] + 1) // 2, tiles((case["k"], config["rows"]))
    vectors = case["tensors"] * case["experts"] * case["k"] * (case["m"] + case["n"]) * 4
    # An expert meets every one, itself twice, in as many tiles of components as there are.
    assert count["loads"]["left"] + count["loads"]["right"] == (case["experts"] + 1) * across * vectors
    assert loads(count) == cost.loaded_bytes
    assert count["loads"]["partial"] == cost.bytes_read - vectors
    assert sum(count["stores"].values()) > cost.bytes_written  # a pair of one expert twice
    steps = sum(tiles((case[side], config["inner"])) for side in ("m", "n")) * case["tensors"]
    assert count["dot_flops"] == pairs * across**2 * steps * tile_flops(config) > cost.flops
    assert len(count["launches"]) == cost.launches
