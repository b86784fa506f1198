"""How close do operators come to their floors? Groups of a ViT-L/14's matrices; right results first, then times.

    python -m bench.gpu --only operators

A time is the median over repeats between two CUDA events, with a cold L2 cache. Where all the work is in Triton kernels
these are launched again as they were caught, so that it is the kernels' time; where library calls take part it is the
whole operator's. Compiling happens before, in the call whose result is checked. The floor is the cost model's, with the
datasheet's bandwidth and, beside it, with that of a plain copy measured in the same run.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import cost_model
from bench.cost_model import Chip, Job, StepCost
from bench.gpu import checks
from bench.gpu.record import Record, Session, Stopwatch, caught_launches, chip_of, copy_bandwidth, table
from r2m_kernels import _triton
from r2m_kernels._triton import launch
from r2m_kernels._triton.orthonormalize import inner_products, orthonormal_rows
from r2m_kernels._triton.residual_matmul import matrix_group, multiply, sketch
from r2m_kernels.truncation import truncation_rank

RANK = 0.1


@dataclasses.dataclass
class GroupOf:
    """Tensors of one shape on the device, and everything the operators take beside them."""

    bases: list[Tensor]
    experts: list[list[Tensor]]
    mixing: Tensor
    k: int
    basis: Tensor  # rows: (L, N, k, short side), of length about 1
    product: Tensor  # rows: (L, N, k, long side)

    @classmethod
    def made(cls, session: Session, shape: tuple[int, int], dtype: torch.dtype, count: int, size: int) -> GroupOf:
        source = checks.generator(session.device, seed=shape[0] + count)
        pairs = [checks.inputs(shape, dtype, count, source) for _ in range(size)]
        k = truncation_rank(RANK, shape)
        basis, product = (
            torch.randn(size, count, k, side, generator=source, device=session.device)
            for side in (min(shape), max(shape))
        )
        basis /= min(shape) ** 0.5
        bases, experts = [base for base, _ in pairs], [[others[j] for _, others in pairs] for j in range(count)]
        return cls(bases, experts, checks.mixing_of(count), k, basis, product)

    def tensor(self, index: int) -> tuple[Tensor, list[Tensor]]:
        return self.bases[index], [expert[index] for expert in self.experts]

    def checked(self) -> list[int]:
        """Tensors whose results are compared with float64: the first and the last."""
        return sorted({0, len(self.bases) - 1})


@dataclasses.dataclass
class Case:
    """One operator on one group."""

    operator: str
    call: Callable[[], Any]
    judge: Callable[[Any], float]  # largest error / bound
    costs: Callable[[Job], list[StepCost]]
    kernels_only: bool = True  # whether Triton kernels do all the work


def cases(group: GroupOf, target: str) -> Iterator[Case]:
    """Every operator of a merge, on one group."""
    size, count, k = len(group.bases), len(group.experts), group.k
    m, n = group.bases[0].shape
    dtype, tall = group.bases[0].dtype, m >= n
    fast, full = launch.fast_precision(target, dtype), launch.full_precision(target)
    inputs = matrix_group(group.bases, group.experts)
    mixing = group.mixing.to(inputs.device, torch.float32)

    def each(judge: Callable[[int], float]) -> float:
        return max(judge(index) for index in group.checked())

    def products(step: str, transpose: bool, precision: str, shifted: bool, variant: cost_model.Variant) -> Case:
        rhs = group.product if transpose == tall else group.basis
        other = group.basis if transpose == tall else group.product
        shift = torch.full((size, count), 0.25, device=inputs.device) if shifted else None

        def judge(found: tuple[Tensor, Tensor]) -> float:
            rows, squares = found
            rows = rows.double()
            if shift is not None:
                rows = rows + 0.25 * other.double()
            highest = 0.0
            for index in group.checked():
                columns = rhs[index].mT
                result = rows[index].mT
                arguments = (*group.tensor(index), group.mixing, columns, transpose, precision)
                # Subtracting a shift rounds once more: nothing beside the rounding of the fast product's operands.
                highest = max(highest, checks.judge_product(result, *arguments))
                total = rows[index].square().sum((1, 2))
                highest = max(highest, checks.worst((squares[index] - total).abs(), 1e-5 * total))
            return highest

        return Case(
            step,
            lambda: multiply(inputs, mixing, rhs, transpose, precision, shift, other if shifted else None),
            judge,
            lambda job: [cost_model.residual_matmul_cost(step, m, n, size, k, job, transpose, variant)],
        )

    yield Case(
        "task_gram",
        lambda: _triton.task_gram(group.bases, group.experts),
        lambda found: each(lambda i: checks.judge_gram(found[i], *group.tensor(i))),
        lambda job: [cost_model.task_gram_cost(m * n, size, job)],
    )
    keys = torch.arange(1, size + 1, device=inputs.device) * 0x9E3779B97F4A7

    def judge_sketch(rows: Tensor) -> float:
        # The signs are the kernel's own (tests/gpu looks at them): on average a column's square is ‖X‖², and with k of
        # them the standard deviation is at most √(2/k) of that, 0.14 for k = 103.
        highest = 0.0
        for index in group.checked():
            whole = checks.residuals(*group.tensor(index), group.mixing).square().sum((1, 2))
            found = rows[index].double().square().mean(1).sum(1)
            highest = max(highest, checks.worst((found - whole).abs(), 0.5 * whole))
        return highest

    yield Case(
        "sketch",
        lambda: sketch(inputs, mixing, keys, k, tall),
        judge_sketch,
        lambda job: [cost_model.residual_matmul_cost("sketch", m, n, size, k, job, tall, "signs")],
    )
    yield products("product", not tall, fast, False, "fast")
    yield products("shifted product", tall, fast, True, "shifted")
    yield products("full product", not tall, full, False, "full")
    rows = group.product[..., : min(m, n)].contiguous().flatten(0, 1)
    yield Case(
        "orthonormalize",
        lambda: orthonormal_rows(rows),
        lambda found: checks.judge_basis(found[:: len(found) - 1].mT, rows[:: len(rows) - 1].mT),
        lambda job: cost_model.orthonormalize_costs(k, min(m, n), size * count, job),
        kernels_only=False,
    )
    left, right = (group.product, group.basis) if tall else (group.basis, group.product)
    yield Case(
        "inner_products",
        lambda: inner_products(left, right),
        lambda found: each(lambda i: checks.judge_inner_products(found[i], left[i].mT, right[i])),
        lambda job: [cost_model.inner_products_cost(m, n, size, k, job)],
        kernels_only=False,
    )
    core = torch.linspace(0.2, 0.5, count, dtype=torch.float64)
    scale = torch.linspace(0.01, 0.02, count, dtype=torch.float64)
    outs = [torch.full_like(base, torch.nan) for base in group.bases]

    def combined() -> list[Tensor]:
        _triton.combine(group.bases, group.experts, core, left.mT, right, scale, outs)
        return outs

    def judge_combined(found: list[Tensor]) -> float:
        return each(lambda i: checks.judge_combined(found[i], *group.tensor(i), core, left[i].mT, right[i], scale))

    yield Case(
        "combine",
        combined,
        judge_combined,
        lambda job: [cost_model.combine_matrix_cost(m, n, size, k, job)],
    )


def measured(case: Case, stopwatch: Stopwatch, session: Session) -> dict[str, Any]:
    """Error first; a time only where that is within its bound."""
    start = time.monotonic()
    with caught_launches() as found:
        worst = case.judge(case.call())
    session.synchronize()
    first = None if session.rehearsal else round(time.monotonic() - start, 2)
    row: dict[str, Any] = {"error_over_bound": worst, "passed": worst <= 1, "first_call_seconds": first}
    row["kernels"] = [
        {
            "kernel": one.kernel.__name__,
            **dataclasses.asdict(one.config),
            "registers": one.registers,
            "n_spills": one.spills,
        }
        for one in found
    ]
    if not row["passed"]:
        return row
    if case.kernels_only:

        def again() -> None:
            for one in found:
                one.again()

        row["timed"], times = "kernels", stopwatch.milliseconds(again)
        row["call_milliseconds"] = stopwatch.median(case.call, repeats=5, warmups=1)
    else:
        row["timed"], times = "call", stopwatch.milliseconds(case.call)
    if times is not None:
        times.sort()
        row |= {"milliseconds": times[len(times) // 2], "fastest": times[0], "slowest": times[-1]}
    return row


def floors(
    costs: list[StepCost], chip: Chip | None, bandwidth: float | None, milliseconds: float | None
) -> dict[str, Any]:
    """The time beside the floors of the same work; without a known chip beside the copy's bandwidth alone."""
    moved = sum(cost.bytes_read + cost.bytes_written for cost in costs)
    found: dict[str, Any] = {"bytes": moved, "flops": sum(cost.flops for cost in costs)}
    if milliseconds is None or bandwidth is None:
        return found
    found["gb_per_s"] = moved / milliseconds / 1e6
    found["share_of_copy_bandwidth"] = found["gb_per_s"] * 1e9 / bandwidth
    if chip is not None:
        sheet = cost_model.floor_seconds(costs, chip) * 1e3
        copy = cost_model.floor_seconds(costs, dataclasses.replace(chip, bandwidth=bandwidth)) * 1e3
        found |= {
            "floor_milliseconds": sheet,
            "over_floor": milliseconds / sheet,
            "over_copy_floor": milliseconds / copy,
        }
    return found


def jobs(session: Session) -> Iterator[tuple[tuple[int, int], torch.dtype, int, int]]:
    """Shape, dtype, experts, tensors: float32 and three experts first."""
    if session.rehearsal:
        yield (80, 72), torch.float32, 3, 2
        yield (72, 80), torch.bfloat16, 2, 1
        return
    shapes = [(1024, 1024), (4096, 1024), (1024, 4096)]
    for count, dtype in ((3, torch.float32), (3, torch.bfloat16), (8, torch.float32), (8, torch.bfloat16)):
        for shape in shapes:
            yield shape, dtype, count, 24


def run(session: Session, record: Record) -> bool:
    stopwatch, chip = Stopwatch(session), chip_of(session)
    bandwidth = copy_bandwidth(session, stopwatch)
    record.content |= {"chip": chip.name if chip else None, "copy_bytes_per_second": bandwidth, "rank": RANK}
    record.save()
    passed, left_out, lines = True, [], []
    for shape, dtype, count, size in jobs(session):
        what = f"{size} x {shape[0]}x{shape[1]} N={count} {str(dtype).removeprefix('torch.')}"
        if session.left() < 8:
            left_out.append(what)
            continue
        job = Job(count, dtype, session.target)
        group = GroupOf.made(session, shape, dtype, count, size)
        for case in cases(group, session.target):
            try:
                row = measured(case, stopwatch, session)
                row |= floors(case.costs(job), chip, bandwidth, row.get("milliseconds"))
            except Exception as failure:  # the other operators' rows are wanted all the same
                text = "".join(traceback.format_exception(failure)).strip()[-800:]
                row = {"passed": False, "error": text}
                print(f"FAILED: {case.operator} {what}: {text}", flush=True)
            passed = passed and row["passed"]
            record.add(operator=case.operator, job=what, **row)
            keys = ("error_over_bound", "milliseconds", "gb_per_s", "over_floor", "over_copy_floor")
            lines.append([case.operator, what, *[row.get(key) for key in keys]])
        del group
        if not session.rehearsal:
            torch.cuda.empty_cache()
    table(["operator", "group", "error/bound", "ms", "GB/s", "x floor", "x copy floor"], lines)
    if left_out:
        record.content["left_out"] = left_out
    return record.close(passed, finished=not left_out)
