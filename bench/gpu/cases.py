"""A call of every operator on one small tensor, in all its ways, and what is right about its result.

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
from r2m_kernels import _torch, _triton, ops
from r2m_kernels._interface import Operators
from r2m_kernels._triton import launch
from r2m_kernels._triton.addresses import VECTOR_BYTES, vectors_fit


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        operator: its name in :class:`r2m_kernels._interface.Operators`, or in :mod:`r2m_kernels.ops`.
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
    group = _Group(base, experts, what)
    yield from group.with_factors(*factors)
    yield from group.sums()
    yield from group.rules()


class _Group:
    """One tensor as a group, for operators without a public function: they are held to the portable backend."""

    def __init__(self, base: Tensor, experts: list[Tensor], what: str) -> None:
        self.bases, self.experts, self.what = [base], [[expert] for expert in experts], what
        self.dtype, self.wide = base.dtype, torch.promote_types(base.dtype, torch.float32)
        self.count, self.device, self.shape = len(experts), base.device, base.shape
        self.tau = checks.task_matrix(base, experts)
        self.size = base.double().abs().flatten() + self.tau.abs().amax(0)
        self.weights = torch.linspace(1.0, 2.0, self.count, dtype=torch.float64)
        self.weights /= self.weights.sum()

    def case(
        self,
        operator: str,
        how: str,
        call: Callable[[Operators], Tensor],
        size: Tensor,
        computed: torch.dtype | None = None,
    ) -> Case:
        """A call, what its rounding is relative to, and the dtype it is computed in, if not the group's."""
        judge = partial(checks.judge_alike, size=size, count=self.count, wide=computed or self.wide)
        what = f"{how} {self.what}".lstrip()
        return Case(operator, what, lambda: call(_triton), lambda result: judge(result, call(_torch)))

    def writing(
        self, operator: str, how: str, write: Callable[[Operators, list[Tensor]], Tensor], size: Tensor | None = None
    ) -> Iterator[Case]:
        """A call that writes, into tensors of the dtype that is read and of the one that is computed in."""
        size = self.size if size is None else size
        for written in dict.fromkeys((self.dtype, self.wide)):

            def call(operators: Operators, written: torch.dtype = written) -> Tensor:
                out = torch.empty(self.shape, dtype=written, device=self.device)
                largest = write(operators, [out])
                return torch.cat([out.flatten(), largest.to(written)])

            into = "" if written == self.dtype else f" into {str(written).removeprefix('torch.')}"
            yield self.case(operator, f"{how}{into}", call, torch.cat([size, size.max().view(1)]))

    def with_factors(self, left: Tensor, right: Tensor, scale: Tensor) -> Iterator[Case]:
        """Rows of factors weighed, and coefficients by row beside factors."""
        m, lefts, rights = self.shape[0], left.unsqueeze(0), right.unsqueeze(0)
        rows = torch.linspace(-0.5, 1.0, m * self.count, device=self.device, dtype=self.wide).view(1, m, self.count)
        product = torch.einsum("i,imr,irn->mn", scale.to(self.tau), left.double().abs(), right.double().abs())
        # As if of the products themselves, whose sums of n and r terms are rounded in float64 alone.
        size = (self.shape[1] + 2 * left.shape[2]) * (lefts.double().abs() @ rights.double().abs()).norm(dim=3)
        unit = torch.linalg.qr(rights.double().mT).Q.mT.to(rights.dtype).contiguous()
        for known, how in ((False, False), "any"), ((True, False), "orthogonal"), ((True, True), "orthonormal"):

            def measured(our: Operators, known: tuple[bool, bool] = known) -> Tensor:
                return our.row_lengths(lefts, unit if known[1] else rights, *known)

            # That rows are said to have length 1 is known to their rounding alone.
            of_unit = lefts.double().norm(dim=3) * self.shape[1], rights.dtype
            yield self.case("row_lengths", f"{how} rows", measured, *(of_unit if known[1] else (size, torch.float64)))
        lengths = _torch.row_lengths(lefts, rights, False)
        yield self.case(
            "weigh_rows",
            "",
            lambda our: our.weigh_rows(lefts, lengths, self.weights, scale, 3.0, scale, lefts.dtype),
            lefts.double().abs(),
        )
        shares = torch.linspace(-0.2, 0.7, self.count, dtype=torch.float64)
        halves = (lefts.mT.bfloat16().mT, rights.bfloat16(), None)
        summed = torch.einsum("imr,irn->mn", halves[0][0].double().abs(), halves[1][0].double().abs())
        for how, coefficients in (("", shares), ("by rows ", rows)):

            def rounded(our: Operators, outs: list[Tensor], coefficients: Tensor = coefficients) -> Tensor:
                return our.combine(self.bases, self.experts, coefficients, *halves, outs)

            # Products are exact: what is rounded are the sums of all experts' components.
            yield from self.writing(
                "combine",
                f"{how}with bfloat16 factors",
                rounded,
                self.size + (8 + 2 * (self.count * left.shape[2]) ** 0.5) * summed.flatten(),
            )
        yield from self.writing(
            "combine",
            "by rows with factors",
            lambda our, outs: our.combine(self.bases, self.experts, rows, lefts, rights, scale, outs),
            self.size + (20 + 2 * left.shape[2] ** 0.5) * product.flatten(),
        )

    def sums(self) -> Iterator[Case]:
        """Weighted sums of what is read, and of the sums of rows."""
        (m, n), weights = self.shape, self.weights
        yield from self.writing("mean", "", lambda our, outs: our.mean(self.experts, weights, outs))
        for dtype in (torch.float32, torch.float64):
            changes = self.tau.sum(0).view(1, m, n).to(dtype)
            name = str(dtype).removeprefix("torch.")
            yield from self.writing("add", name, lambda our, outs, changes=changes: our.add(self.bases, changes, outs))
            yield self.case(
                "weighted_sum",
                name,
                lambda our, dtype=dtype: our.weighted_sum(self.bases, self.experts, weights, dtype),
                self.size.view(1, m, n),
                dtype,
            )
        rows = self.tau.view(1, self.count, m * n)
        yield self.case("sum_rows", "", lambda our: our.sum_rows(rows), rows.abs().sum(2))

    def rules(self) -> Iterator[Case]:
        """TIES, DARE and columns."""
        bases, experts, weights = self.bases, self.experts, self.weights
        thresholds = torch.linspace(0.0, 0.1, self.count)
        kept = self.tau * (self.tau.abs().float() >= thresholds.to(self.device).unsqueeze(1))
        parts = weights.to(self.tau).unsqueeze(1) * kept
        # Where the sum of what is kept is rounding, either sign may win.
        sure = parts.sum(0).abs() > 4 * self.count * checks.U * parts.abs().sum(0)
        yield from self.writing(
            "combine_ties",
            "",
            lambda our, outs: our.combine_ties(bases, experts, weights, 0.7, thresholds, outs),
            torch.where(sure | (kept == 0).all(0), self.size, torch.inf),
        )
        keys = torch.arange(1, self.count + 1).unsqueeze(0) * 0x9E3779B97F4A7
        yield from self.writing(
            "combine_dare",
            "",
            lambda our, outs: our.combine_dare(bases, experts, weights, 0.7, 0.3, keys, 2**40 + 1, outs),
            4 * self.size,
        )
        for upper in (None, torch.full((self.count,), 0x3D80)):

            def counted(our: Operators, upper: Tensor | None = upper) -> Tensor:
                counts = torch.zeros(self.count, 2**16, dtype=torch.int64, device=self.device)
                our.count_magnitudes(bases, experts, upper, counts)
                return counts

            how = "upper halves" if upper is None else "lower halves"
            yield self.case("count_magnitudes", how, counted, torch.zeros(1, device=self.device))
        changed = (bases[0].double() + self.tau.mean(0).view(self.shape)).to(self.wide)
        yield from self.writing(
            "match_columns",
            "",
            lambda our, outs: our.match_columns(bases, experts, [changed.clone()], weights, outs),
            4 * self.size,
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
    chosen = launch.residual_matmul(target, compute, precision, aligned, len(experts))
    return checks.judge_product(result, base, experts, mixing, rhs, transpose, chosen.precision)
