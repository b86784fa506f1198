"""A call of every public operator on one small tensor, in all its ways, and what is right about its result.

The compile gate takes the launches of these calls, ``tests/gpu`` their results: a new operator is added here for both.
What a merge launches on groups of tensors, with its cost, is in :mod:`bench.gpu.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu import checks
from r2m_kernels import ops
from r2m_kernels._triton import launch
from r2m_kernels._triton.addresses import VECTOR_BYTES, vectors_fit


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        operator: its name in :mod:`r2m_kernels.ops`.
        what: which of its ways, and on what.
        call: runs it on the Triton backend.
        judge: the largest error of a result over its bound; at most 1 is right.
    """

    operator: str
    what: str
    call: Callable[[], Tensor]
    judge: Callable[[Tensor], float]


def cases(
    shape: tuple[int, int], dtype: torch.dtype, count: int, device: torch.device, offset: int = 64
) -> Iterator[Case]:
    """Every operator on tensors of one shape, ``offset`` elements off a 128-byte boundary."""
    source = checks.generator(device, seed=count)

    def random(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return checks.framed(torch.randn(*size, generator=source, device=device).to(of), offset)

    base, experts = checks.inputs(shape, dtype, count, source, offset)
    mixing, core = checks.mixing_of(count), torch.linspace(-0.2, 0.7, count, dtype=torch.float64)
    (m, n), inputs = shape, (base, experts)
    what = f"{str(dtype).removeprefix('torch.')} {m}x{n} N={count}"
    wide = torch.promote_types(dtype, torch.float32)

    yield Case(
        "task_gram",
        what,
        lambda: ops.task_gram([base], [[expert] for expert in experts], backend="triton")[0],
        lambda gram: checks.judge_gram(gram.to(device), *inputs),
    )
    for precision in ops.PRECISIONS[::-1]:
        for transpose in (False, True):
            rhs = random(count, m if transpose else n, 24)
            yield Case(
                "residual_matmul",
                f"{precision}{' transposed' if transpose else ''} {what}",
                partial(ops.residual_matmul, *inputs, mixing, rhs, transpose, precision, backend="triton"),
                partial(_judge_product, *inputs, mixing, rhs, transpose, precision),
            )
    if dtype == wide:
        y = random(2, m, 16, of=dtype)
        yield Case(
            "orthonormalize",
            what,
            lambda: ops.orthonormalize(y, backend="triton"),
            lambda basis: checks.judge_basis(basis, y),
        )
    factors = (random(count, m, 20), random(count, 20, n), torch.linspace(0.3, 1.1, count, dtype=torch.float64))
    for kind, given in (("with factors", factors), ("without factors", ())):
        for written in dict.fromkeys((dtype, wide)):
            out = torch.empty(shape, dtype=written, device=device)
            into = "" if written == dtype else f" into {str(written).removeprefix('torch.')}"
            yield Case(
                "combine",
                f"{kind}{into} {what}",
                lambda given=given, out=out: ops.combine(*inputs, core, *given, out=out, backend="triton").clone(),
                lambda merged, given=given: checks.judge_combined(merged, *inputs, core, *given),
            )
    uneven = torch.linspace(1.0, 2.0, count, dtype=torch.float64)
    for written in dict.fromkeys((dtype, wide)):
        rule = (core, mixing, uneven / uneven.sum(), uneven.flip(0), 0.8, 3.0)
        out = torch.empty(shape, dtype=written, device=device)
        yield Case(
            "combine_rows",
            f"{'' if written == dtype else 'into ' + str(written).removeprefix('torch.') + ' '}{what}",
            partial(_cloned, ops.combine_rows, *inputs, *rule, out),
            lambda merged, rule=rule: checks.judge_rows(merged, *inputs, *rule),
        )


def _cloned(operator: Callable[..., Tensor], *arguments: object) -> Tensor:
    return operator(*arguments, backend="triton").clone()


def _judge_product(
    base: Tensor,
    experts: list[Tensor],
    mixing: Tensor,
    rhs: Tensor,
    transpose: bool,
    precision: str,
    result: Tensor,
) -> float:
    """In the precision that was run."""
    m, n = base.shape
    aligned = vectors_fit(m) and n * base.dtype.itemsize % VECTOR_BYTES == 0
    compute = torch.promote_types(base.dtype, torch.float32)
    target = launch.target_of(base.device)
    chosen = launch.residual_matmul(target, base.dtype, compute, precision, aligned, len(experts))
    return checks.judge_product(result, base, experts, mixing, rhs, transpose, chosen.precision)
