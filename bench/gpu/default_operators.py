"""What a default merge launches beside its task Gram matrices, at its rank: for :mod:`bench.gpu.operators`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench import cost_model, operator_costs
from bench.gpu import checks
from bench.gpu.groups import GroupOf, Timed, laid
from r2m_kernels import _triton
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels._triton.addresses import SCALE
from r2m_kernels._triton.gram_start import SKETCH_SCALE, Grams
from r2m_kernels._triton.residual_matmul import matrix_group
from r2m_kernels._triton.residuals import Residuals
from r2m_kernels._triton.units import quick_pass, unit_rows

AMOUNT = 0.25  # of a basis that is subtracted from its product, of residuals of norm 1
POWER = 3.0  # of rows' lengths


def operators(group: GroupOf) -> Iterator[Timed]:
    """Truncation from Gram matrices, weights of rows, and the combination; then rows without a truncation."""
    yield from truncation(group)
    yield from weights(group)
    yield combination(group)
    yield from by_rows(group)


def truncation(group: GroupOf) -> Iterator[Timed]:
    """Each kernel on operands that another one might have left."""
    size, job, k, (m, n) = len(group.bases), group.job, group.k, group.bases[0].shape
    short, shape = min(m, n), (size, job.experts)
    kept = Residuals([matrix_group(group.bases, group.experts)], [k])
    # Of norm 1 at most, as truncations have them; all tensors are as long.
    mixing = group.mixing / float(checks.residuals(*group.tensor(0), group.mixing).norm(dim=(1, 2)).max())
    unit = mixing.to(kept.device, kept.dtype).expand(size, -1, -1).contiguous()
    kept.form(unit)
    grams = Grams(kept)
    grams.form()
    blocks = grams.short
    basis = laid(blocks.vectors(torch.float16), blocks, (group.basis * SCALE).half())
    product, _ = grams.along(basis, paired=True)
    amounts = torch.full((blocks.count,), AMOUNT, device=kept.device)
    rows, pivots = unit_rows(blocks, basis, vector_scale=SCALE), torch.ones(blocks.count, device=kept.device)
    keys = torch.arange(1, size + 1, device=kept.device) * 0x9E3779B97F4A7
    ones = torch.ones(shape, dtype=kept.dtype, device=kept.device)

    def stored(vectors: Tensor, i: int, scale: float = SCALE) -> Tensor:
        """What a tensor's vectors on the short side stand for, (N, k, short) float64."""
        return blocks.of_sorts(vectors)[0].unflatten(0, shape)[i].double() / scale

    def of_gram(i: int) -> Tensor:
        return grams.matrices()[0][i].double() / SCALE

    def judge_paired(result: tuple[Tensor, Tensor]) -> float:
        vectors, sums = result
        shares = sums.view(*shape, -1).sum(2)
        return group.worst(lambda i: checks.judge_paired(stored(vectors, i), shares[i], stored(basis, i), of_gram(i)))

    def judge_final(result: tuple[Tensor, Tensor]) -> float:
        vectors = kept.long.of_sorts(result[0])[0].unflatten(0, shape)
        rhs = blocks.of_sorts(basis)[0].unflatten(0, shape)
        return group.worst(
            lambda i: checks.judge_product(
                vectors[i].double().mT, *group.tensor(i), mixing, rhs[i].double().mT / SCALE, not group.tall, "fp16"
            )
        )

    def judge_pass(result: tuple[Tensor, Tensor | None]) -> float:
        rounded, whole = result

        def judge(i: int) -> float:
            found = checks.judge_units(stored(rounded, i), stored(rows, i), torch.float16)
            if whole is None:
                return found
            return max(found, checks.judge_units(stored(whole, i, 1.0), stored(rows, i), torch.float32))

        return group.worst(judge)

    vectors = functools.partial(operator_costs.residual_product_cost, tensors=size, k=k, job=job, by_gram=True)
    units = functools.partial(operator_costs.unit_rows_cost, k, short, blocks.count, job, operator_costs.HALF_BYTES)
    quick = functools.partial(operator_costs.quick_orthonormalize_costs, k, short, blocks.count, job, 1)
    yield Timed(
        "form residuals",
        lambda: kept.form(unit),
        lambda _: group.worst(
            lambda i: checks.judge_residuals(kept.matrices()[0][i], *group.tensor(i), mixing, group.tall)
        ),
        [operator_costs.form_residuals_cost(m, n, size, job)],
    )
    yield Timed(
        "Gram of residuals",
        grams.form,
        lambda _: group.worst(
            lambda i: checks.judge_residual_gram(grams.matrices()[0][i], kept.matrices()[0][i].double() / SCALE)
        ),
        [operator_costs.residual_gram_cost(m, n, size, job)],
    )
    yield Timed(
        "sketch of a Gram",
        lambda: grams.sketch(keys, SKETCH_SCALE),
        lambda rows: group.worst(lambda i: checks.judge_signs(stored(rows, i, SKETCH_SCALE), of_gram(i))),
        [vectors("sketch", short, short, across=True, signs=True)],
    )
    yield Timed(
        "paired product",
        lambda: grams.along(basis, paired=True),
        judge_paired,
        [vectors("paired product", short, short, across=False, paired=True)],
    )
    yield Timed(
        "unit rows",
        lambda: unit_rows(blocks, product, amounts, basis, SCALE),
        lambda found: group.worst(
            lambda i: checks.judge_unit_rows(stored(found, i), stored(product, i), AMOUNT * stored(basis, i))
        ),
        [units(subtracted=True)],
    )
    yield Timed("quick pass", lambda: quick_pass(blocks, rows, pivots), judge_pass, quick(wholes=0))
    yield Timed("last quick pass", lambda: quick_pass(blocks, rows, pivots, last=True), judge_pass, quick(wholes=1))
    yield Timed(
        "final product, float16 vectors",
        lambda: kept.along(basis, ones),
        judge_final,
        [vectors("final product", m, n, across=False, last=True)],
    )


def weights(group: GroupOf) -> Iterator[Timed]:
    """Lengths of rows, by whether the right factor's are orthonormal, and left factors with their shares."""
    size, job, k, (m, n) = len(group.bases), group.job, group.k, group.bases[0].shape
    left, right = group.factors
    known = group.tall, group.tall  # as if random ones were, on the short side
    even = torch.full((job.experts,), 1 / job.experts, dtype=torch.float64)
    scales = torch.linspace(1.0, 2.0, job.experts, dtype=torch.float64)
    lengths = _triton.row_lengths(left.mT, right, *known)
    *measuring, weighing = operator_costs.weigh_rows_costs(m, n, size, k, job, rounded=True)
    yield Timed(
        "row lengths",
        lambda: _triton.row_lengths(left.mT, right, *known),
        lambda found: group.worst(lambda i: checks.judge_lengths(found[i], left[i], right[i], group.tall)),
        measuring,
    )
    yield Timed(
        "weigh rows",
        lambda: _triton.weigh_rows(left.mT, lengths, even, scales, POWER, scales, torch.bfloat16),
        lambda found: group.worst(
            lambda i: checks.judge_weighed(found[i], left[i].mT, lengths[i], even, scales, POWER, scales)
        ),
        [weighing],
    )


def combination(group: GroupOf) -> Timed:
    """As a default merge has it: the default rank, and factors in bfloat16, rows as truncations leave them."""
    size, job, (m, n) = len(group.bases), group.job, group.bases[0].shape
    outs = [torch.full_like(base, torch.nan) for base in group.bases]
    k, source = truncation_rank(cost_model.RANK, (m, n)), checks.generator(outs[0].device, seed=m + job.experts)
    core = torch.linspace(0.2, 0.5, job.experts, dtype=torch.float64)
    left, right = (
        (torch.randn(size, job.experts, k, side, generator=source, device=source.device) / side**0.5).bfloat16()
        for side in (m, n)
    )

    def combined() -> list[Tensor]:
        _triton.combine(group.bases, group.experts, core, left.mT, right, None, outs)
        return outs

    def judge(i: int) -> float:
        return checks.judge_combined(outs[i], *group.tensor(i), core, left[i].mT, right[i])

    costs = [operator_costs.combine_matrix_cost(m, n, size, k, job, rounded=True)]
    return Timed("combine, default rank, bfloat16 factors", combined, lambda _: group.worst(judge), costs)


def by_rows(group: GroupOf) -> Iterator[Timed]:
    """Residuals that are not truncated: Gram matrices of rows, and combinations with coefficients of each."""
    size, job, (m, n) = len(group.bases), group.job, group.bases[0].shape
    outs = [torch.full_like(base, torch.nan) for base in group.bases]
    coefficients = torch.linspace(-0.5, 1.0, size * m * job.experts, device=outs[0].device).view(size, m, job.experts)

    def combined() -> Any:
        _triton.combine(group.bases, group.experts, coefficients, None, None, None, outs)
        return outs

    yield Timed(
        "Gram of rows",
        lambda: _triton.row_grams(group.bases, group.experts),
        lambda grams: group.worst(lambda i: checks.judge_row_grams(grams.rows[i], *group.tensor(i))),
        [operator_costs.row_grams_cost(m, n, size, job)],
    )
    yield Timed(
        "combine by rows",
        combined,
        lambda _: group.worst(lambda i: checks.judge_by_rows(outs[i], *group.tensor(i), coefficients[i])),
        [operator_costs.combine_rows_cost(m, n, size, job)],
    )
