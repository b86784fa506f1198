"""How close do operators come to their floors? Groups of a ViT-L/14's matrices; right results first, then times.

    python -m bench.gpu --only operators

A time is the median over repeats between two CUDA events, with a cold L2 cache. Where all the work is in Triton kernels
these are launched again as they were caught, so that it is the kernels' time; where library calls take part it is the
whole operator's. Compiling happens before, in the call whose result is checked. The floor is the cost model's, with the
datasheet's bandwidth and, beside it, with that of a plain copy measured in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import cost_model, operator_costs
from bench.chips import Chip
from bench.gpu import checks, default_operators
from bench.gpu.groups import RANK, GroupOf, Timed, laid
from bench.gpu.record import Record, Session, Stopwatch, caught_launches, copy_bandwidth, predicting_chip, table
from bench.operator_costs import Job, StepCost
from r2m_kernels import _triton
from r2m_kernels._triton.addresses import SCALE
from r2m_kernels._triton.orthonormalize import inner_products, orthonormal_rows
from r2m_kernels._triton.residual_matmul import matrix_group
from r2m_kernels._triton.residuals import Residuals


def operators(group: GroupOf) -> Iterator[Timed]:
    """Every operator of a merge, on one group."""
    size, job, k = len(group.bases), group.job, group.k
    m, n = group.bases[0].shape
    yield Timed(
        "task_gram",
        lambda: _triton.task_gram(group.bases, group.experts),
        lambda grams: group.worst(lambda i: checks.judge_gram(grams.tasks[i], *group.tensor(i))),
        [operator_costs.task_gram_cost(m * n, size, job)],
    )
    yield from products(group)
    rows = group.product[..., : min(m, n)].contiguous().flatten(0, 1) * max(m, n) ** 0.5
    yield Timed(
        "orthonormalize",
        lambda: orthonormal_rows(rows),
        lambda basis: checks.judge_basis(basis[:: len(basis) - 1].mT, rows[:: len(rows) - 1].mT),
        operator_costs.orthonormalize_costs(k, min(m, n), size * job.experts, job),
    )
    left, right = group.factors
    yield Timed(
        "inner_products",
        lambda: inner_products(left, right),
        lambda products: group.worst(lambda i: checks.judge_inner_products(products[i], left[i].mT, right[i])),
        [operator_costs.inner_products_cost(m, n, size, k, job)],
    )
    core = torch.linspace(0.2, 0.5, job.experts, dtype=torch.float64)
    scale = torch.linspace(0.01, 0.02, job.experts, dtype=torch.float64)
    outs = [torch.full_like(base, torch.nan) for base in group.bases]

    def combined() -> list[Tensor]:
        _triton.combine(group.bases, group.experts, core, left.mT, right, scale, outs)
        return outs

    def judge_combined(i: int) -> float:
        return checks.judge_combined(outs[i], *group.tensor(i), core, left[i].mT, right[i], scale)

    costs = [operator_costs.combine_matrix_cost(m, n, size, k, job)]
    yield Timed("combine", combined, lambda outs: group.worst(judge_combined), costs)
    yield default_operators.combination(group)


def products(group: GroupOf) -> Iterator[Timed]:
    """With residuals: formed and kept, as a truncation by steps multiplies them, and once, in full precision."""
    size, job, k, tall = len(group.bases), group.job, group.k, group.tall
    (m, n), (basis, product) = group.bases[0].shape, (group.basis, group.product)
    inputs = matrix_group(group.bases, group.experts)
    kept = Residuals([inputs], [k])
    unit = group.mixing.to(kept.device, kept.dtype).expand(size, -1, -1).contiguous()
    kept.form(unit)
    halves = [(basis * SCALE).half(), (product * SCALE).half()]
    vectors = [
        laid(blocks.vectors(torch.float16), blocks, rows)
        for blocks, rows in zip((kept.short, kept.long), halves, strict=True)
    ]
    whole = laid(kept.short.vectors(kept.dtype), kept.short, basis)
    basis, product = (half.double() / SCALE for half in halves)
    shape = size, job.experts

    def judged(
        of: Callable[[Tensor], Tensor], rhs: Tensor, transpose: bool, precision: str = "fp16"
    ) -> Callable[[Any], float]:
        def judge(result: Any) -> float:
            rows = of(result).double()
            return group.worst(
                lambda i: checks.judge_product(
                    rows[i].mT, *group.tensor(i), group.mixing, rhs[i].double().mT, transpose, precision
                )
            )

        return judge

    def on_the_long_side(result: tuple[Tensor, Tensor]) -> Tensor:
        return kept.long.of_sorts(result[0])[0].unflatten(0, shape)

    def on_the_short_side(result: Tensor) -> Tensor:
        return kept.short.of_sorts(result)[0].unflatten(0, shape)

    cost = functools.partial(operator_costs.residual_product_cost, m=m, n=n, tensors=size, k=k, job=job)
    yield Timed(
        "form residuals",
        lambda: kept.form(unit),
        lambda _: group.worst(
            lambda i: checks.judge_residuals(kept.matrices()[0][i], *group.tensor(i), group.mixing, tall)
        ),
        [operator_costs.form_residuals_cost(m, n, size, job)],
    )
    keys = torch.arange(1, size + 1, device=kept.device) * 0x9E3779B97F4A7
    yield Timed(
        "sketch",
        lambda: on_the_short_side(kept.sketch(keys)),
        lambda rows: group.worst(lambda i: checks.judge_sketch(rows[i], *group.tensor(i), group.mixing, tall)),
        [cost("sketch", across=True, signs=True)],
    )
    yield Timed(
        "product",
        lambda: kept.along(vectors[0]),
        judged(lambda result: on_the_long_side(result) / SCALE, basis, not tall),
        [cost("product", across=False)],
    )
    # By a quarter of the basis: half of what is left beside a half.
    squares = torch.zeros_like(kept.along(vectors[0])[1])
    squares.view(*shape, -1)[..., 0] = 0.5
    damping = 0.5 * (min(m, n) - k)
    yield Timed(
        "shifted product",
        lambda: kept.across(vectors[1], vectors[0], squares, damping),
        judged(lambda result: on_the_short_side(result) + 0.25 * basis, product, tall),
        [cost("shifted product", across=True)],
    )
    ones = torch.ones(shape, dtype=kept.dtype, device=kept.device)
    yield Timed(
        "final product",
        lambda: kept.along(whole, ones),
        judged(on_the_long_side, group.basis, not tall),
        [cost("final product", across=False, last=True)],
    )
    precision = job.product().precision
    yield Timed(
        "full product",
        lambda: _triton.residual_matmul(group.bases, group.experts, group.mixing, group.basis.mT, not tall, precision),
        judged(lambda result: result.mT, group.basis, not tall, precision),
        [operator_costs.residual_matmul_cost("full product", m, n, size, k, job, not tall)],
    )


def measured(case: Timed, stopwatch: Stopwatch, session: Session) -> dict[str, Any]:
    """Error first; a time only where that is within its bound."""
    start = time.monotonic()
    with caught_launches() as caught:
        worst = case.judge(case.call())
    session.synchronize()
    first = None if session.rehearsal else round(time.monotonic() - start, 2)
    row: dict[str, Any] = {"error_over_bound": worst, "passed": worst <= 1, "first_call_seconds": first}
    row["kernels"] = [one.described() for one in caught]
    if not row["passed"]:
        return row
    if case.kernels_only:
        row["timed"], times = "kernels", stopwatch.milliseconds(lambda: [one.again() for one in caught])
        row["call_milliseconds"] = stopwatch.median(case.call, repeats=5, warmups=1)
    else:
        row["timed"], times = "call", stopwatch.milliseconds(case.call)
    if times is not None:
        row |= {"milliseconds": times[len(times) // 2], "fastest": times[0], "slowest": times[-1]}
    return row


def floors(
    costs: list[StepCost], chip: Chip | None, bandwidth: float | None, milliseconds: float | None
) -> dict[str, Any]:
    """The time beside what was predicted and the floors of the same work, of memory, cache and arithmetic.

    Without a known chip beside the copy's bandwidth alone.
    """
    moved = sum(cost.bytes_read + cost.bytes_written for cost in costs)
    row: dict[str, Any] = {"bytes": moved, "flops": sum(cost.flops for cost in costs)}
    if chip is not None:
        row["predicted_milliseconds"] = sum(cost.predicted_seconds(chip) for cost in costs) * 1e3
        # Each of the roofs alone.
        row["memory_milliseconds"] = moved / chip.bandwidth * 1e3
        row["l2_milliseconds"] = sum(cost.loaded_bytes for cost in costs) / chip.l2 * 1e3 if chip.l2 else None
        row["arithmetic_milliseconds"] = sum(cost.flops / chip.rate(cost.kind) for cost in costs if cost.flops) * 1e3
    if milliseconds is None or bandwidth is None:
        return row
    row["gb_per_s"] = moved / milliseconds / 1e6
    row["share_of_copy_bandwidth"] = row["gb_per_s"] * 1e9 / bandwidth
    if chip is not None:
        sheet = cost_model.floor_seconds(costs, chip) * 1e3
        copy = cost_model.floor_seconds(costs, dataclasses.replace(chip, bandwidth=bandwidth)) * 1e3
        row |= {"floor_milliseconds": sheet}
        row |= {"over_floor": milliseconds / sheet, "over_copy_floor": milliseconds / copy}
    return row


Listed = Callable[[GroupOf], Iterator[Timed]]


def jobs(session: Session) -> Iterator[tuple[tuple[int, int], Job, int, float, Listed]]:
    """Shape, how it is launched, tensors, rank, and what is timed.

    The default's rank first, float32 and three experts; then smaller ranks, 16 bits and more experts.
    """
    single, half = Job(3, torch.float32, session.target), Job(2, torch.bfloat16, session.target)
    if session.rehearsal:
        yield (80, 72), single, 2, cost_model.RANK, default_operators.operators
        yield (72, 80), half, 1, cost_model.RANK, default_operators.operators
        yield (80, 72), single, 2, RANK, operators
        yield (72, 80), half, 1, RANK, operators
        return
    shapes = ((1024, 1024), (4096, 1024), (1024, 4096))
    for shape in shapes:
        yield shape, single, 24, cost_model.RANK, default_operators.operators
    for count, dtype in ((3, torch.float32), (3, torch.bfloat16), (8, torch.float32), (8, torch.bfloat16)):
        for shape in shapes:
            yield shape, Job(count, dtype, session.target), 24, RANK, operators


def run(session: Session, record: Record) -> bool:
    stopwatch, chip = Stopwatch(session), predicting_chip(session)
    bandwidth = copy_bandwidth(session, stopwatch)
    record.content |= {"chip": chip.name if chip else None, "copy_bytes_per_second": bandwidth, "rank": RANK}
    record.content["default_rank"] = cost_model.RANK
    record.save()
    done: set[tuple[str, str]] = set()
    for shape, job, size, rank, listed in jobs(session):
        what = f"{size} x {shape[0]}x{shape[1]} {job}"
        if not record.time_for(f"{what} rank {rank}", 8):
            continue
        group = GroupOf.made(session, shape, job, size, rank)
        for case in listed(group):
            if (case.operator, what) in done:  # the same at any rank
                continue
            done.add((case.operator, what))

            def row(case: Timed = case) -> dict[str, Any]:
                numbers = measured(case, stopwatch, session)
                return numbers | floors(case.costs, chip, bandwidth, numbers.get("milliseconds"))

            record.attempt(row, operator=case.operator, job=what, rank=rank)
        del group
        session.free_cache()
    roofs = [f"{roof}_milliseconds" for roof in ("predicted", "memory", "l2", "arithmetic")]
    keys = ("error_over_bound", "milliseconds", *roofs, "gb_per_s", "over_floor", "over_copy_floor")
    lines = [[row["operator"], row["job"], *[row.get(key) for key in keys]] for row in record.rows]
    head = [
        "operator",
        "group",
        "error/bound",
        "ms",
        "predicted ms",
        "memory ms",
        "L2 ms",
        "FLOP ms",
        "GB/s",
        "x floor",
        "x copy floor",
    ]
    table(head, lines)
    return record.close()
