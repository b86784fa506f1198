"""What does this GPU give, and is every operator right on it? Small cases, each against float64 with a derived bound.

    python -m bench.gpu --only smoke

The bounds are derived in ``checks.py``. The cases that matter most come first, and the file is written after each:
seconds are enough for an answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.cost_model import Job
from bench.gpu import checks, roofs
from bench.gpu.cases import cases
from bench.gpu.groups import GroupOf
from bench.gpu.record import Record, Session, table
from r2m_kernels import MergeConfig, _triton
from r2m_kernels._triton import launch
from r2m_kernels._triton.orthonormalize import inner_products
from r2m_kernels.truncation import truncate_residuals

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# name, call → largest error / bound
Check = tuple[str, Callable[[], float]]


def checked(session: Session) -> Iterator[Check]:
    """float32 and three experts first; then what selects other kernels: 16 bits, odd rows, many experts, few."""
    even, odd = ((32, 24), (17, 21)) if session.rehearsal else ((384, 256), (257, 131))
    types = TYPES[:2] if session.rehearsal else TYPES
    for dtype in types:
        yield from _operators(session, even, dtype, 3)
        yield from _truncations(session, dtype)
    for dtype in types:
        yield from _operators(session, odd, dtype, 3, offset=1)
    for count in (8, 1, 2):
        for dtype in types[:1] if session.rehearsal and count < 3 else types[:2]:
            yield from _operators(session, even, dtype, count)
    if not session.rehearsal:  # half an hour in the interpreter
        yield f"combine {launch.MOST_TENSORS + 4} vectors", lambda: _many_vectors(session)


def _operators(
    session: Session, shape: tuple[int, int], dtype: torch.dtype, count: int, offset: int = 64
) -> Iterator[Check]:
    for case in cases(shape, dtype, count, session.device, offset):
        yield f"{case.operator} {case.what}", lambda case=case: case.judge(case.call())


def _truncations(session: Session, dtype: torch.dtype) -> Iterator[Check]:
    """Two tensors of a shape together; short sides beyond 64, which are truncated exactly."""
    shapes = ((96, 72), (71, 83)) if session.rehearsal else ((384, 256), (512, 384), (257, 391))
    for m, n in shapes[:1] if session.rehearsal and dtype != torch.float32 else shapes:

        def truncated(m: int = m, n: int = n) -> float:
            group = GroupOf.made(session, (m, n), Job(3, dtype, session.target), 2)
            truncation = (group.mixing, group.k, MergeConfig.r2m(), _triton)
            factors = truncate_residuals(["a", "b"], group.bases, group.experts, *truncation)

            def of_tensor(index: int) -> float:
                left, right = factors[index].left, factors[index].right
                products = inner_products(left.mT.unsqueeze(0), right.unsqueeze(0))[0]
                x = checks.residuals(*group.tensor(index), group.mixing)
                excess = checks.truncation_excess(left, right, x) / checks.TRUNCATION
                return max(excess, checks.judge_inner_products(products, left, right))

            return group.worst(of_tensor)

        yield f"truncate_residuals 2 x {m}x{n} {Job(3, dtype, session.target)}", truncated


def _many_vectors(session: Session) -> float:
    """More tensors than a grid's second dimension has programs, merged in one call."""
    size = launch.MOST_TENSORS + 4
    flat = torch.randn(3, size, 8, generator=checks.generator(session.device, seed=0), device=session.device)
    bases, *experts = [list(of_one) for of_one in flat]
    outs = [torch.empty_like(base) for base in bases]
    core = torch.tensor([0.5, 0.25], dtype=torch.float64)
    _triton.combine(bases, experts, core, None, None, None, outs)
    whole = [flat[0], list(flat[1:]), core]
    return checks.judge_combined(torch.stack(outs), *whole)  # type: ignore[arg-type]


def run(session: Session, record: Record) -> bool:
    try:
        record.content["roofs"] = roofs.measured(session)
    except Exception as failure:  # what is right is wanted all the same
        record.content["roofs"] = {"error": str(failure)[-500:]}
    table(["roof", "per second"], [[name, value] for name, value in record.content["roofs"].items()])
    for name, check in checked(session):
        if not record.time_for(name, 5):
            break

        def row(check: Callable[[], float] = check) -> dict[str, Any]:
            start = time.monotonic()
            worst = check()
            session.synchronize()
            # The first call of a kernel compiles it: these seconds are no measure of speed, and none in a rehearsal.
            seconds = None if session.rehearsal else round(time.monotonic() - start, 3)
            return {"error_over_bound": worst, "passed": worst <= 1, "first_call_seconds": seconds}

        record.attempt(row, case=name)
    highest: dict[str, list[float]] = {}
    for one in record.rows:
        highest.setdefault(one["case"].split()[0], []).append(one.get("error_over_bound", float("inf")))
    lines = [[operator, len(errors), max(errors)] for operator, errors in highest.items()]
    table(["operator", "cases", "worst error / bound"], lines)
    return record.close()
