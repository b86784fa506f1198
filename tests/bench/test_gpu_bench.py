"""What `make gpu` looks at and predicts is what merges launch: it runs on machines that nobody has at hand."""

from __future__ import annotations

import inspect
import re
import time
from pathlib import Path

import pytest
import torch

from bench import cost_model, operator_costs, tune
from bench.cost_model import CHIPS, Job, Shapes
from bench.gpu import default_operators, record, tools, usual
from bench.gpu.groups import GroupOf
from bench.gpu.record import Session, caught_launches
from bench.host_cost import SKETCHED, counted
from bench.host_cost import Job as Counted
from r2m_kernels import MergeConfig
from r2m_kernels._stream.budget import DEVICE_GROUP_BYTES
from r2m_kernels._triton import launch

# What takes no time: sums of partial results, and numbers of whole tensors.
SMALL = {"sum_tiles_kernel", "sum_runs_kernel", "shift_kernel", "judge_kernel", "row_coefficients_kernel"}


@pytest.mark.parametrize("config", [MergeConfig.r2m(), MergeConfig.r2m(rank=1.0)], ids=["default", "rows"])
def test_the_profiler_looks_at_every_kernel_of_a_merge(config):
    tall = SKETCHED + 8, SKETCHED
    shapes = {"tall.weight": tall, "wide.weight": tall[::-1], "tall.bias": (SKETCHED,)}
    counts, _ = counted(Counted(shapes, config, noise=0.45))
    launched = {line.split()[-1] for line in counts.lines["triton_launches"]}
    assert {kernel for kernel in launched - SMALL if not re.search(tools.KERNELS, kernel)} == set()
    assert launched & SMALL < launched


def group_of(shape, size=1, rank=cost_model.RANK, job=None):
    session = Session(Path(), time.monotonic(), rehearsal=True)
    return GroupOf.made(session, shape, job or Job(3, torch.float32, session.target), size, rank)


def test_all_kernels_of_a_default_merge_are_timed_at_its_rank():
    tall, timed = (SKETCHED + 8, SKETCHED), set()
    counts, _ = counted(Counted({"tall.weight": tall, "wide.weight": tall[::-1]}, MergeConfig.r2m(), noise=0.45))
    launched = {line.split()[-1] for line in counts.lines["triton_launches"]}
    for shape in ((80, 72), (72, 80)):
        for case in default_operators.operators(group_of(shape)):
            with caught_launches() as caught:
                case.call()
            assert len(caught) == sum(cost.launches for cost in case.costs)
            timed |= {one.kernel.__name__ for one in caught}
    assert launched - timed - SMALL == {"task_gram_kernel"}  # which no rank changes


def changed(result, caught):
    """What a call made, each number 1.6 per cent larger."""
    made = [result] if isinstance(result, torch.Tensor) else [one for one in result or () if one is not None]
    if not made:  # what is kept elsewhere
        made = [caught[-1].arguments[list(inspect.signature(caught[-1].kernel.fn).parameters).index("out")]]
    for one in made:
        one.mul_(1 + 2.0**-6)


@pytest.mark.parametrize("shape", [(80, 72), (72, 80)])
def test_a_wrong_result_at_the_default_rank_is_seen(shape):
    for case in default_operators.operators(group_of(shape, size=2)):
        with caught_launches() as caught:
            result = case.call()
        assert case.judge(result) <= 1, case.operator
        # Signs are judged by the mean of what they make.
        for _ in range(45 if case.operator == "sketch of a Gram" else 1):
            changed(result, caught)
        assert case.judge(result) > 1, case.operator
        case.call()  # others read what is kept


def test_the_tuner_times_the_kernels_whose_tiles_it_changes():
    for knob in tune.knobs("sm_90"):
        tiles = launch.table()[knob.operator]["sm_90"][knob.variant]
        cases = knob.cases(group_of((72, 80), job=knob.job))
        assert [case.operator for case in cases] == list(knob.timed)
        kernels = set()
        for case in cases:
            with caught_launches() as caught:
                case.call()
            kernels |= {one.kernel.__name__ for one in caught}
        assert f"{knob.operator}_kernel" in kernels
        tried = list(tune.neighbours(knob, tiles))
        assert tried
        assert tiles not in tried
        for larger, smaller in [tune.WHOLE[knob.operator]] if knob.operator in tune.WHOLE else []:
            further = [one for tiles in tried for one in tune.neighbours(knob, tiles)]
            assert not any(one[larger] % one[smaller] for one in tried + further)


def test_of_each_kernel_and_grid_the_first_launch_is_counted():
    def line(launch, kernel, grid, value):
        return f'"{launch}","{kernel}","{grid}","gpu__time_duration.sum","{value}"\n'

    head = '==PROF== connected\n"ID","Kernel Name","Grid Size","Metric Name","Metric Value"\n'
    lines = line(0, "a", "(1, 1, 1)", "1,500") + line(1, "a", "(2, 1, 1)", "7") + line(2, "a", "(1, 1, 1)", "9")
    assert tools.counted_by_ncu(head + lines) == [
        {"kernel": "a", "grid": "(1, 1, 1)", "nanoseconds": 1500.0},
        {"kernel": "a", "grid": "(2, 1, 1)", "nanoseconds": 7.0},
    ]


@pytest.mark.parametrize("row_power", [0.0, 3.0])
def test_a_merge_is_predicted_as_its_rows_are_weighed(row_power):
    session, shapes = Session(Path(), time.monotonic(), rehearsal=True), [(256, 128)] * 3
    job = usual.Usual("rank 0.1", "ViT-B/16", MergeConfig.r2m(rank=0.1, row_power=row_power))
    costs = cost_model.merge_costs(
        *(Shapes.of("ViT-B/16", shapes), Job(3, torch.float32), 0.1),
        group_bytes=DEVICE_GROUP_BYTES,
        by_rows=row_power > 0,
    )
    expected = sum(cost.predicted_seconds(CHIPS["H200"]) for cost in costs if not cost.link_bytes)
    assert usual.predicted_seconds(session, job, shapes) == pytest.approx(expected)


def test_merges_of_whole_rows_are_predicted():
    session, shapes = Session(Path(), time.monotonic(), rehearsal=True), [(256, 128)] * 3 + [(128,)]
    job, costs = Job(3, torch.float32), operator_costs
    expected = [
        costs.row_grams_cost(256, 128, 3, job),
        costs.row_coefficients_cost(256, 3, job),
        costs.combine_rows_cost(256, 128, 3, job),
        costs.task_gram_cost(128, 1, job),
        costs.combine_vector_cost(128, 1, job),
    ]
    rows, alike = (MergeConfig.r2m(rank=1.0, row_power=power) for power in (3.0, 0.0))
    predicted = usual.predicted_seconds(session, usual.Usual("rows", "ViT-B/16", rows), shapes)
    assert predicted == pytest.approx(sum(cost.predicted_seconds(CHIPS["H200"]) for cost in expected))
    assert usual.predicted_seconds(session, usual.Usual("alike", "ViT-B/16", alike), shapes) is None


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H200", "H200"),
    ],
)
def test_only_chips_of_the_datasheets_are_predicted(name, chip):
    assert next((known for known, pattern in record.CHIP_NAMES.items() if re.search(pattern, name)), None) == chip
    assert set(record.CHIP_NAMES) == set(CHIPS)
