"""What a merge makes the host do on the Triton path is held to bars; what counts it computes, and refuses, as a GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import host_cost
from bench.host_cost import JOBS, NARROW, SKETCHED, Job, counted, vit
from bench.pretended_gpu import CUDA, DeviceTensor, host, pretended_gpu
from r2m_kernels import MergeConfig
from r2m_kernels._triton import launch, sums
from r2m_kernels._triton.addresses import Group, send
from r2m_kernels.config import OFFERED

# Of waits, Triton launches, ATen kernels and copies that nobody waits for. Two waits fetch what the steps found and one
# what was written; merged LoRA is truncated twice: what can be relied on and the second time's numbers are two more.
BARS = {
    "ViT-L default": (3, 80, 24, 31),
    "ViT-L rows": (2, 29, 14, 21),
    "ViT-L average": (2, 17, 12, 10),
    "ViT-L lora": (5, 104, 42, 57),
    "ViT-B default": (3, 80, 24, 31),
    "CNN rows": (2, 18, 13, 12),
    "CNN default": (3, 43, 19, 19),
}
KINDS = ("waits", "triton_launches", "aten_kernels", "async_copies")
# Calls of the host on its own tensors and on views, a tensor of the model: those of a group or merge, shared out.
SMALL_CALLS = {"ViT-L rows": 1.7, "ViT-L average": 1.1, "ViT-B default": 4.9}


def small_calls(counts):
    """Each a microsecond or two, but of every tensor they add up."""
    return counts.kinds["cpu_ops"] + counts.kinds["views"]


def held_to(bars, job, small=None):
    """Whether the counts of a job are within its bars, small calls a tensor among them, its result within its bound."""
    counts, error = counted(job)
    reached = tuple(counts.kinds[kind] for kind in KINDS)
    assert all(count <= bar for count, bar in zip(reached, bars, strict=True)), (reached, counts.lines)
    assert small is None or small_calls(counts) <= small * len(job.shapes), (small_calls(counts), counts.lines)
    assert error <= job.bound
    return reached


def test_a_merge_by_rows_costs_as_much_with_any_number_of_blocks():
    job = JOBS["ViT-L rows"]
    one, two = (held_to(BARS["ViT-L rows"], replace(job, shapes=vit(blocks, NARROW))) for blocks in (1, 2))
    assert one == two


def test_the_default_on_the_matrices_of_half_a_block():
    shapes = {name: shape for name, shape in vit(1, SKETCHED).items() if name.split(".")[-2] in ("q_proj", "fc1")}
    job = replace(JOBS["ViT-L default"], shapes=shapes)
    # Two shapes of matrices and two of vectors, of the six and two: what makes vectors orthonormal is as much. Of each
    # shape of matrices right factors are rounded by a call.
    held_to((3, 38, 16, 16), job)


@pytest.mark.parametrize(("noise", "kernel"), [(0.2, "combine_matrix_kernel"), (0.45, "combine_rounded_kernel")])
def test_factors_are_rounded_where_far_more_is_cut_off(noise, kernel):
    """1/64 and more of every residual, as of the default's jobs; else they are not, and cost no call."""
    shapes = {name: shape for name, shape in vit(1, SKETCHED).items() if name.endswith("q_proj.weight")}
    counts, error = counted(replace(JOBS["ViT-L default"], shapes=shapes, noise=noise))
    assert error <= JOBS["ViT-L default"].bound
    found = {
        name
        for name in ("combine_matrix_kernel", "combine_rounded_kernel")
        for line in counts.lines["triton_launches"]
        if name in line
    }
    assert found == {kernel}


GROUP_BAR = 60  # ATen kernels of a group of equal shapes
# Small calls of each of its matrices: a view or two, and as many more where spectra are mapped one at a time.
EACH = dict.fromkeys(("star", "mono_soup"), 6)
VARIANTS = {"rows alike": {"row_power": 0.0}, "column": {"scale": "column"}, "textbook": {"svd": "textbook"}}
QUICK = {"weight_average", "ties", "dare", "iso_c"}
METHODS = {
    **{name: method.configure({}) for name, method in OFFERED.items()},
    **{name: MergeConfig.r2m(**options) for name, options in VARIANTS.items()},
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_group_costs_as_much_with_any_number_of_matrices(name):
    of_sizes = []
    for size in (4, 5):
        shapes = {f"{place}.weight": (SKETCHED + 8, SKETCHED) for place in range(size)}
        # Enough noise that no spectrum is steep, since such a residual is truncated once more, and that all factors are
        # rounded: a group of which some are not takes another launch.
        counts, _ = counted(Job(shapes, METHODS[name], noise=0.45))
        of_sizes.append(({kind: counts.kinds[kind] for kind in KINDS}, small_calls(counts)))
    (fewer, calls), (more, more_calls) = of_sizes
    assert fewer == more
    assert fewer["aten_kernels"] <= GROUP_BAR, counts.lines
    assert more_calls - calls <= EACH.get(name, 2), counts.lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-L rows", "ViT-L average", "ViT-B default"])
def test_whole_models(name):
    """ViT-L by default has ViT-B's groups, each of twice as many matrices: that is left to the program."""
    held_to(BARS[name], JOBS[name], SMALL_CALLS[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("CNN rows", (2, 4)), ("CNN default", (4,))])
def test_convolutions_cost_as_much_with_any_number_of_layers(name, layers):
    """Tensors that are only copied, counters of batches, among them."""
    job = JOBS[name]
    parts = [dict(list(job.shapes.items())[: 6 * count]) for count in layers]
    assert len({held_to(BARS[name], replace(job, shapes=part)) for part in parts}) == 1


@pytest.mark.slow
def test_merged_lora_on_a_part_of_the_model_that_has_all_shapes():
    """Of many layers the groups are the same."""
    job = JOBS["ViT-L lora"]
    held_to(BARS["ViT-L lora"], replace(job, shapes=dict(list(job.shapes.items())[:16])))


@pytest.mark.slow
def test_the_program_writes_what_it_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.host_cost", "--json", str(tmp_path / "host.json"), "--job", "CNN rows"])
    assert host_cost.main() == 0
    (row,) = json.loads((tmp_path / "host.json").read_text())["jobs"]
    assert row["job"] == "CNN rows"
    assert row["passed"]


def kinds(call):
    """What is counted of a call, without what is not."""
    with pretended_gpu() as counts:
        call()
    return {kind: count for kind, count in counts.kinds.items() if count}


def test_calls_are_counted_by_what_they_make_the_host_do():
    numbers, there = torch.arange(6.0), DeviceTensor(torch.arange(6.0))
    assert kinds(lambda: there + 1) == {"aten_kernels": 1, "allocations": 1}
    assert kinds(lambda: there[2:].view(2, 2)) == {"views": 2}
    assert kinds(lambda: there.to("cuda:0")) == {}
    assert kinds(lambda: torch.empty(3, device=CUDA)) == {"allocations": 1}
    assert kinds(lambda: numbers.to(CUDA)) == {"waits": 1, "allocations": 1}
    assert kinds(lambda: numbers.to(CUDA, non_blocking=True)) == {"async_copies": 1, "allocations": 1}
    assert kinds(there.cpu) == {"waits": 1}
    assert kinds(lambda: float(there[0])) == {"waits": 1, "views": 1}
    assert kinds(lambda: there[there > 2]) == {"waits": 1, "aten_kernels": 2, "allocations": 2}
    assert kinds(lambda: numbers + 1) == {"cpu_ops": 1}


def test_tables_and_small_numbers_go_to_the_device_together():
    there, numbers = DeviceTensor(torch.arange(6.0)), torch.arange(3.0)
    groups = [Group([there, there], [[there, there]] * experts, 6) for experts in (1, 2)]
    found = []
    counts = kinds(lambda: found.extend(send(groups, CUDA, numbers, 5, there, numbers.double()[:1])))
    assert (counts["async_copies"], counts["allocations"]) == (1, 1)
    assert [host(one).tolist() for one in found[::3]] == [[0, 1, 2], [0]]
    assert found[1:3] == [5, there]
    assert {one.device for one in (found[0], *(group.table for group in groups))} == {CUDA}
    for group, experts in zip(groups, (1, 2), strict=True):
        assert host(group.table).tolist() == [[there.data_ptr()] * (experts + 1)] * 2
    assert kinds(lambda: groups[0].table) == {}


def test_results_are_those_of_real_memory():
    there = DeviceTensor(torch.arange(6.0))
    with pretended_gpu():
        there.view(2, 3)[1].mul_(2)
        total = sums.sum_tiles(there.double().view(2, 3))
    assert there.device == CUDA == total.device
    assert host(there).tolist() == [0, 1, 2, 6, 8, 10]
    assert host(total).tolist() == [3, 24]


def test_what_a_gpu_refuses_is_refused():
    there = DeviceTensor(torch.ones(2))
    with pytest.raises(RuntimeError, match="expected all tensors on the GPU"), pretended_gpu():
        there + torch.ones(2)
    with pytest.raises(RuntimeError, match="expected tensors of the GPU, got one of the host"), pretended_gpu():
        launch.start(sums.sum_tiles_kernel, (1,), launch.sums(), torch.ones(2), there, 1, BLOCK=32)
