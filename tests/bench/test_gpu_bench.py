"""What `make gpu` looks at and predicts is what merges launch: it runs on machines that nobody has at hand."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from bench import cost_model
from bench.cost_model import CHIPS, Job, Shapes
from bench.gpu import record, tools, usual
from bench.gpu.record import Session
from bench.host_cost import SKETCHED, counted
from bench.host_cost import Job as Counted
from r2m_kernels import MergeConfig
from r2m_kernels._stream.budget import DEVICE_GROUP_BYTES

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
