"""What a merge should cost on a GPU: bytes, products, launches and the floor in time of every step. No GPU needed.

    python -m bench.cost_model [--model vit_l_14] [--experts 3] [--rank 0.4] [--dtype float32] [--chip H100]

Without options: the reference job on every chip, and the totals of the other models. Counts follow from shapes and the
launch plan (r2m_kernels/README.md §§2–6); a floor is the time of the slowest resource, memory, L2 cache, arithmetic or
host link, busy at its rate throughout. All of it is predicted, nothing measured.

``bytes_read`` is compulsory: every distinct byte once, as if caches were perfect. ``fetched_bytes`` is what programs
fetch of the inputs: each reads a byte once, but several may want the same one, which the L2 cache then usually has; the
table's "uncached" is the floor if every tile that a second program reads came from memory again. ``loaded_bytes`` is
what load instructions ask for, inputs, kept residuals and factors: it passes from the L2 cache to the multiprocessors.
Truncations are taken to go the road of residuals that are neither steep nor of few directions (README §4), and to cut
off so much that factors are rounded to bfloat16 (§6) before they are combined; arithmetic beside the loads (mixing,
differences) is not counted. What one step costs is in :mod:`bench.operator_costs`.

On an H200 (bench/results/gpu_operators.json) Gram matrices, products and inner products take what these roofs and
:data:`bench.operator_costs.START` say, within 15 per cent, and tests/kernels/test_cost_model.py holds the model to
that. Longer take what waits for something else: the sketch (its tiles are written to shared memory one after the
other), the combination (it loads nothing ahead), products of more than three experts (each address is read from memory
before what lies there), Gram matrices and tf32x3 products of 16-bit inputs (conversions).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from bench.chips import CHIPS as CHIPS
from bench.chips import Chip as Chip
from bench.chips import Kind as Kind
from bench.operator_costs import (
    HALF_BYTES,
    combine_matrix_cost,
    combine_rows_cost,
    combine_vector_cost,
    form_residuals_cost,
    inner_products_cost,
    orthonormalize_costs,
    quick_orthonormalize_costs,
    residual_gram_cost,
    residual_product_cost,
    round_factors_cost,
    row_coefficients_cost,
    row_grams_cost,
    shifts_cost,
    task_gram_cost,
    unit_rows_cost,
    weigh_rows_costs,
)
from bench.operator_costs import Job as Job
from bench.operator_costs import StepCost as StepCost
from bench.shapes import MODELS as MODELS
from bench.shapes import Shapes as Shapes
from r2m_kernels import MergeConfig
from r2m_kernels._interface import Effort
from r2m_kernels._stream.budget import DEVICE_GROUP_BYTES
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels._triton import residuals, truncate
from r2m_kernels._triton.residual_matmul import matrix_group

NOTE = "predicted, not measured"
REFERENCE = "vit_l_14"
RANK, BY_ROWS = float(MergeConfig().rank), MergeConfig().row_power > 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Road(NamedTuple):
    """How residuals of one shape are truncated.

    Attributes:
        vectors: rows and columns are whole vectors of operands.
        by_gram: from their Gram matrices.
        steps: of subspace iteration.
    """

    vectors: bool
    by_gram: bool
    steps: int


def road_of(m: int, n: int, k: int, job: Job, power_iterations: int) -> Road:
    """As the backend itself goes, of residuals that are neither steep nor of few directions."""
    tensor = torch.empty(m, n, dtype=job.dtype, device="meta")
    group = matrix_group([tensor], [[tensor]])
    vectors = job.aligned and residuals.fits(group)
    road = truncate.road_of(group, k, Effort(power_iterations, 0, None, carefully=not vectors))
    return Road(vectors, road.by_gram, road.steps)


def truncation_costs(m: int, n: int, tensors: int, k: int, job: Job, road: Road) -> list[StepCost]:
    """From forming residuals to the last product."""
    job, short, blocks = replace(job, aligned=road.vectors), min(m, n), job.experts * tensors
    product = functools.partial(residual_product_cost, tensors=tensors, k=k, job=job)
    form = form_residuals_cost(m, n, tensors, job)
    if not road.by_gram:
        passes = {"passes": 2 + road.steps, "halves": road.steps}
        return [
            form,
            product("sketch V = AᵀS", m, n, across=True, signs=True),
            product("steps Y = AV", m, n, across=False).times(road.steps),
            product("steps V = AᵀY − shift·V", m, n, across=True).times(road.steps),
            # Once after the sketch and every step, twice at the end.
            *orthonormalize_costs(k, short, blocks, job, **passes),
            product("final Y = AV", m, n, across=False, last=True),
        ]
    of_grams = functools.partial(product, m=short, n=short, by_gram=True)
    return [
        form,
        residual_gram_cost(m, n, tensors, job),
        of_grams("sketch V = KS", across=True, signs=True),
        of_grams("steps KV", across=False, paired=True).times(road.steps),
        shifts_cost(short, tensors, k, job).times(road.steps),
        unit_rows_cost(k, short, blocks, job, HALF_BYTES),
        unit_rows_cost(k, short, blocks, job, HALF_BYTES, subtracted=True).times(road.steps),
        # Once after the sketch and every step, and once more at the end.
        *quick_orthonormalize_costs(k, short, blocks, job, passes=2 + road.steps),
        product("final Y = AV", m, n, across=False, last=True, by_gram=True),
    ]


def merge_costs(
    model: Shapes,
    job: Job,
    rank: float = RANK,
    power_iterations: int = 2,
    group_bytes: int | None = None,
    by_rows: bool = BY_ROWS,
    rounded: bool = True,
) -> list[StepCost]:
    """The steps of a merge in their order, each over all tensors and repetitions.

    Args:
        model: what is merged.
        job: how.
        rank: a ratio of min(m, n), rounded up, or an integer ≥ 1; that many columns are sketched. Matrices that keep
            all are weighted by rows as they are.
        power_iterations: the least number of steps.
        group_bytes: inputs that one launch serves, at most; ``None``: all tensors of a shape.
        by_rows: rows are weighted, and no inner products wanted.
        rounded: factors are combined in bfloat16.
    """
    inputs = (job.experts + 1) * job.plane(model.elements)

    def groups(elements: int, count: int) -> list[int]:
        size = max(1, (group_bytes or inputs) // ((job.experts + 1) * job.plane(elements)))
        return [min(size, count - first) for first in range(0, count, size)]

    matrices = [(m, n, size) for m, n, count in model.matrices for size in groups(m * n, count)]
    vectors = [(elements, size) for elements, count in model.vectors for size in groups(elements, count)]
    costs = [StepCost("transfer", "fp32", bytes_written=inputs, link_bytes=inputs)]
    limit = taken = group_bytes or inputs
    served: set[Road] = set()
    costs += [task_gram_cost(*flat, job) for flat in vectors]
    for m, n, count in matrices:
        k = truncation_rank(rank, (m, n))
        if by_rows and k == min(m, n):
            costs += [row_grams_cost(m, n, count, job), row_coefficients_cost(m, count, job)]
            costs.append(combine_rows_cost(m, n, count, job))
            continue
        costs.append(task_gram_cost(m * n, count, job))
        road = road_of(m, n, k, job, power_iterations)
        truncation = truncation_costs(m, n, count, k, job, road)
        taken += (job.experts + 1) * job.plane(m * n * count)
        if taken > limit:  # another pass
            taken, served = (job.experts + 1) * job.plane(m * n * count), set()
        if road in served:  # one launch serves all shapes of a pass that go one road
            truncation = [replace(cost, launches=0) for cost in truncation]
        served.add(road)
        costs += [
            *truncation,
            *(
                weigh_rows_costs(m, n, count, k, job, rounded)
                if by_rows
                else [inner_products_cost(m, n, count, k, job)]
            ),
            *([round_factors_cost(n, count, k, job)] if rounded else []),
            combine_matrix_cost(m, n, count, k, job, rounded),
        ]
    costs += [combine_vector_cost(elements, count, job) for elements, count in vectors]
    merged: dict[str, StepCost] = {}
    for cost in costs:
        merged[cost.step] = merged[cost.step].plus(cost) if cost.step in merged else cost
    return [cost for cost in merged.values() if cost.launches or cost.link_bytes]


def floor_seconds(costs: Iterable[StepCost], chip: Chip, *, cached: bool = True) -> float:
    """The floors of all kernels, one after the other, without the transfer."""
    return sum(cost.floor_seconds(chip, cached=cached) for cost in costs if not cost.link_bytes)


def costs_on(chip: Chip, model: Shapes, experts: int, rank: float, dtype: str) -> list[StepCost]:
    """With groups as large as a merge on a GPU makes them."""
    return merge_costs(model, Job(experts, DTYPES[dtype], chip.target), rank, group_bytes=DEVICE_GROUP_BYTES)


def table_of(chip: Chip, model: Shapes, experts: int, rank: float, dtype: str) -> Iterator[str]:
    """One job on one chip, a line a step."""
    costs = costs_on(chip, model, experts, rank, dtype)
    yield f"{model.name}, N = {experts}, rank {rank}, {dtype}, on {chip.name} ({NOTE})"
    head = f"{'GB read':>9} {'GB written':>10} {'GB loaded':>9} {'GFLOP':>8} {'kind':>8} {'launches':>8} {'re-read':>7}"
    yield f"{'step':<33} {head} {'floor ms':>9} {'uncached':>8} {'predicted ms':>12}"

    def line(step: str, cost: StepCost, kind: str, reread: str, seconds: Sequence[float]) -> str:
        floor, uncached, predicted = (1e3 * one for one in seconds)
        return (
            f"{step:<33} {(cost.bytes_read or cost.link_bytes) / 1e9:>9.2f} {cost.bytes_written / 1e9:>10.2f} "
            f"{cost.loaded_bytes / 1e9:>9.2f} {cost.flops / 1e9:>8.1f} {kind:>8} {cost.launches:>8} {reread:>7} "
            f"{floor:>9.2f} {uncached:>8.2f} {predicted:>12.2f}"
        )

    def seconds_of(cost: StepCost) -> list[float]:
        floors = [cost.floor_seconds(chip, cached=cached) for cached in (True, False)]
        return [*floors, cost.predicted_seconds(chip)]

    for cost in costs:
        reread = f"{cost.reread_factor:.2f}"
        yield line(cost.step, cost, cost.kind if cost.flops else "-", reread, seconds_of(cost))
    kernels = [cost for cost in costs if not cost.link_bytes]
    total = functools.reduce(StepCost.plus, [replace(cost, step="kernels", kind="fp32") for cost in kernels])
    sums = [sum(of_all) for of_all in zip(*map(seconds_of, kernels), strict=True)]
    yield line(f"kernels, {NOTE}", total, "", "", sums)


def totals_of(chips: list[Chip], models: list[Shapes], experts: int, rank: float) -> Iterator[str]:
    """A line a model and dtype: kernels' floors on every chip, and the transfer's."""
    yield f"kernels' floors / transfer's floor in ms, N = {experts}, rank {rank} ({NOTE})"
    yield f"{'model':<10} {'dtype':<9}" + "".join(f"{chip.name:>18}" for chip in chips)
    for model in models:
        for dtype in ("float32", "bfloat16"):
            cells = []
            for chip in chips:
                costs = costs_on(chip, model, experts, rank, dtype)
                link = sum(cost.floor_seconds(chip) for cost in costs if cost.link_bytes)
                cells.append(f"{1e3 * floor_seconds(costs, chip):.1f} / {1e3 * link:.0f}")
            yield f"{model.name:<10} {dtype:<9}" + "".join(f"{cell:>18}" for cell in cells)


def report(
    model: str | None = None, experts: int = 3, rank: float = RANK, dtype: str = "float32", chip: str | None = None
) -> list[str]:
    """All lines: the model (default: the reference job) on the chip (default: all), then, by default, other models."""
    chips = list(CHIPS.values()) if chip is None else [CHIPS[chip]]
    lines = [line for one in chips for line in (*table_of(one, MODELS[model or REFERENCE], experts, rank, dtype), "")]
    return lines if model else [*lines, *totals_of(chips, list(MODELS.values()), experts, rank)]


def _rank(text: str) -> float | int:
    return float(text) if "." in text else int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="default: the reference job, then totals of all models")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rank", type=_rank, default=RANK, help="ratio such as 0.1, or an integer")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--chip", choices=CHIPS, help="default: all")
    print("\n".join(report(**vars(parser.parse_args()))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
