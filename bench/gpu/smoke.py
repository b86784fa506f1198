"""Is every operator right on this GPU? One case each, against float64, with a bound derived in ``checks.py``.

    python -m bench.gpu --only smoke

The cases that matter most come first, and the file is written after each: seconds are enough for an answer.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator

import torch

from bench.gpu import checks
from bench.gpu.record import Record, Session, table
from r2m_kernels import MergeConfig, _triton, ops
from r2m_kernels._triton import launch
from r2m_kernels._triton.addresses import VECTOR_BYTES, vectors_fit
from r2m_kernels.truncation import truncate_residuals

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# name, call → largest error / bound
Case = tuple[str, Callable[[], float]]


def cases(session: Session) -> Iterator[Case]:
    """float32 and three experts first; then what selects other kernels: 16 bits, odd rows, many experts."""
    even, odd = ((32, 24), (17, 21)) if session.rehearsal else ((384, 256), (257, 131))
    types = TYPES[:2] if session.rehearsal else TYPES
    for dtype in types:
        yield from _operators(session, even, dtype, 3)
        yield from _truncations(session, dtype)
    for dtype in types:
        yield from _operators(session, odd, dtype, 3, offset=1)
    for dtype in types[:2]:
        yield from _operators(session, even, dtype, 8)


def _operators(
    session: Session, shape: tuple[int, int], dtype: torch.dtype, count: int, offset: int = 64
) -> Iterator[Case]:
    device = session.device
    source = checks.generator(device, seed=count)
    base, experts = checks.inputs(shape, dtype, count, source, offset)
    mixing = checks.mixing_of(count)
    m, n = shape
    what = f"{str(dtype).removeprefix('torch.')} {m}x{n} N={count}"

    def gram() -> float:
        found = ops.task_gram([base], [[expert] for expert in experts], backend="triton")
        return checks.judge_gram(found[0].to(device), base, experts)

    yield f"task_gram {what}", gram
    aligned = vectors_fit(m) and n * dtype.itemsize % VECTOR_BYTES == 0 and offset * dtype.itemsize % VECTOR_BYTES == 0
    for precision in ops.PRECISIONS[::-1]:
        for transpose in (False, True):
            rhs = checks.framed(torch.randn(count, m if transpose else n, 24, generator=source, device=device), offset)

            def product(rhs=rhs, transpose=transpose, precision=precision) -> float:
                found = ops.residual_matmul(base, experts, mixing, rhs, transpose, precision, backend="triton")
                chosen = launch.residual_matmul(session.target, dtype, torch.float32, precision, aligned, count)
                return checks.judge_product(found, base, experts, mixing, rhs, transpose, chosen.precision)

            yield f"residual_matmul {precision}{' transposed' if transpose else ''} {what}", product
    y = checks.framed(torch.randn(2, m, 16, generator=source, device=device), offset)
    if dtype == torch.float32:
        yield f"orthonormalize {what}", lambda: checks.judge_basis(ops.orthonormalize(y, backend="triton"), y)
    core = torch.linspace(-0.2, 0.7, count, dtype=torch.float64)
    scale = torch.linspace(0.3, 1.1, count, dtype=torch.float64)
    left = checks.framed(torch.randn(count, m, 20, generator=source, device=device), offset)
    right = checks.framed(torch.randn(count, 20, n, generator=source, device=device), offset)

    def combined(factors=(left, right, scale)) -> float:
        return checks.judge_combined(
            ops.combine(base, experts, core, *factors, backend="triton"), base, experts, core, *factors
        )

    yield f"combine with factors {what}", combined
    yield f"combine without factors {what}", lambda: combined(())


def _truncations(session: Session, dtype: torch.dtype) -> Iterator[Case]:
    """Two tensors of a shape together; short sides beyond 64, which are truncated exactly."""
    shapes = ((96, 72), (71, 83)) if session.rehearsal else ((384, 256), (257, 391))
    for m, n in shapes[:1] if session.rehearsal and dtype != torch.float32 else shapes:
        rank = min(m, n) // 10
        source = checks.generator(session.device, seed=m)
        pair = [checks.inputs((m, n), dtype, 3, source) for _ in range(2)]
        mixing = checks.mixing_of(3)

        def truncated(pair=pair, mixing=mixing, rank=rank) -> float:
            bases, experts = [base for base, _ in pair], [[others[j] for _, others in pair] for j in range(3)]
            found = truncate_residuals(["a", "b"], bases, experts, mixing, rank, MergeConfig.r2m_truncated(), _triton)
            highest = 0.0
            for factors, (base, others) in zip(found, pair, strict=True):
                x = checks.residuals(base, others, mixing)
                highest = max(highest, checks.truncation_excess(factors.left, factors.right, x) / checks.TRUNCATION)
                products = factors.inner_products().to(x)
                highest = max(highest, checks.judge_inner_products(products, factors.left, factors.right))
            return highest

        yield f"truncate_residuals {str(dtype).removeprefix('torch.')} 2 x {m}x{n} N=3", truncated


def run(session: Session, record: Record) -> bool:
    passed, out_of_time = True, False
    for name, call in cases(session):
        if session.left() < 5:
            out_of_time = True
            break
        start = time.monotonic()
        try:
            worst, error = call(), None
            session.synchronize()
        except Exception as failure:  # whatever it is: the other operators' answers are wanted all the same
            worst, error = float("inf"), "".join(traceback.format_exception(failure)).strip()[-800:]
        right = worst <= 1
        passed = passed and right
        # The first call of a kernel compiles it: these seconds are no measure of speed, and none in a rehearsal.
        seconds = None if session.rehearsal else round(time.monotonic() - start, 3)
        record.add(case=name, error_over_bound=worst, passed=right, first_call_seconds=seconds, error=error)
        if not right:
            print(f"FAILED: {name}: error is {worst:.3g} x its bound {error or ''}", flush=True)
    highest: dict[str, list[float]] = {}
    for row in record.content["rows"]:
        highest.setdefault(row["case"].split()[0], []).append(row["error_over_bound"])
    table(
        ["operator", "cases", "worst error / bound"], [[name, len(all_), max(all_)] for name, all_ in highest.items()]
    )
    return record.close(passed, finished=not out_of_time)
