"""The Triton kernels in the interpreter, beyond what ``test_operators.py`` asks of every backend.

All numbers of experts, inputs that touch NaN on both sides in memory, outputs between sentinels, aligned and not,
products in tf32x3 emulated; and mutants with a mask removed, which these very checks must catch.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl
from interpreter import PATCH, multiply_in_tf32, sum_alike_wherever_it_lies
from triton.runtime import interpreter

from bench.gpu.cases import cases
from r2m_kernels import _torch, _triton
from r2m_kernels._interface import Effort, ResidualGroup
from r2m_kernels._triton import launch, truncate

COUNTS = [1, 3, 8, 13]  # of four that a kernel takes at once; twice as many; and a part of the fourth four
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FEW = [(torch.float32, 0), (torch.bfloat16, 1)]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24, torch.float64: 2.0**-53}
# The second has rows of whole 16-byte vectors in every dtype: kernels for aligned tensors run on it.
SHAPES = [(37, 53), (36, 72)]
MARGIN = 8192  # elements of NaN before and after: more than any tile reaches
SENTINEL = -77.0


def embedded(tensor, offset=0):
    """The same values, contiguous, amid NaN in memory; with ``offset`` 0 they start at a multiple of 16 bytes."""
    buffer = tensor.new_full((tensor.numel() + 2 * MARGIN,), math.nan)
    view = buffer[MARGIN + offset : MARGIN + offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def inputs(shape, dtype, count, offset=0, tensors=None, seed=0):
    """L bases and N × L experts in NaN, and the task vectors as (L, N, m·n) float64."""
    tensors = tensors or (2 if count <= 3 else 1)
    generator = torch.Generator().manual_seed(seed)
    plain = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(tensors)]
    bases = [embedded(base, offset) for base in plain]
    experts = [
        [embedded((base.double() + 0.1 * torch.randn(shape, generator=generator)).to(dtype), offset) for base in plain]
        for _ in range(count)
    ]
    tau = torch.stack(
        [torch.stack([(e[i].double() - b.double()).flatten() for e in experts]) for i, b in enumerate(plain)]
    )
    return bases, experts, tau


def mixing_of(count):
    return torch.eye(count, dtype=torch.float64) - torch.linspace(0.1, 0.4, count, dtype=torch.float64).unsqueeze(1)


def check_task_gram(task_gram, shape, dtype, count, offset):
    bases, experts, tau = inputs(shape, dtype, count, offset)
    gram = task_gram(bases, experts).tasks
    # Everything is float64: well inside the 16·2⁻²⁴ that backends promise for float32.
    assert ((gram - tau @ tau.mT).abs() <= 2.0**-44 * tau.abs() @ tau.abs().mT).all()


def check_residual_matmul(module, monkeypatch, shape, dtype, count, offset, transpose, k=21):
    bases, experts, tau = inputs(shape, dtype, count, offset)
    mixing = mixing_of(count)
    buffers = []

    def between_sentinels(leading, length, dtype, device):
        padded = -(-length // 16) * 16
        buffer = torch.full((math.prod(leading) * padded + 2 * MARGIN,), SENTINEL, dtype=dtype)
        view = buffer[MARGIN:-MARGIN].view(*leading, padded)[..., :length]
        buffers.append((buffer, view))
        return view

    monkeypatch.setattr(module, "empty_rows", between_sentinels)
    inner = shape[0] if transpose else shape[1]
    rhs = torch.randn(len(bases), count, inner, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rhs = rhs.to(torch.promote_types(dtype, torch.float32))
    result = module.residual_matmul(bases, experts, mixing, rhs, transpose, "tf32x3")
    x = torch.einsum("ji,lje->lie", mixing, tau).unflatten(2, shape)
    magnitude = torch.einsum("ji,lje->lie", mixing.abs(), tau.abs()).unflatten(2, shape)
    if transpose:
        x, magnitude = x.mT, magnitude.mT
    # N + 1 roundings to form X, about 2·√K to sum K terms of one rounding each.
    bound = (4 + count + 2 * math.sqrt(inner)) * UNIT[dtype] * magnitude @ rhs.double().abs()
    assert ((result.double() - x @ rhs.double()).abs() <= bound).all()
    for buffer, view in buffers:
        assert int((buffer == SENTINEL).sum()) == buffer.numel() - view.numel()


def check_combine(combine, shape, dtype, count, offset, rank):
    bases, experts, tau = inputs(shape, dtype, count, offset)
    generator = torch.Generator().manual_seed(2)
    core = torch.rand(count, generator=generator, dtype=torch.float64) - 0.3
    left = right = scale = None
    low_rank = magnitude = torch.zeros(len(bases), *shape, dtype=torch.float64)
    if rank:
        scale = torch.rand(count, generator=generator, dtype=torch.float64)
        left = torch.randn(len(bases), count, shape[0], rank, generator=generator)
        right = torch.randn(len(bases), count, rank, shape[1], generator=generator)
        low_rank = torch.einsum("i,limr,lirn->lmn", scale, left.double(), right.double())
        magnitude = torch.einsum("i,limr,lirn->lmn", scale, left.double().abs(), right.double().abs())
    buffers = [torch.full((math.prod(shape) + 2 * MARGIN,), SENTINEL, dtype=dtype) for _ in bases]
    outs = [buffer[MARGIN + offset :][: math.prod(shape)].view(shape) for buffer in buffers]
    squares = []
    combine(bases, experts, core, left, right, scale, outs, squares)
    if rank:
        (parts,) = squares
        assert torch.allclose(parts.sum(1), low_rank.square().sum((1, 2)), rtol=1e-5, atol=0)
    for index, (base, out, buffer) in enumerate(zip(bases, outs, buffers, strict=True)):
        exact = base.double() + (core @ tau[index]).view(shape) + low_rank[index]
        size = base.double().abs() + (core.abs() @ tau[index].abs()).view(shape) + magnitude[index]
        half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
        # The contract's 8 + 2·√r, and a rounding for every expert beyond four.
        bound = half_ulp[dtype] * exact.abs() * (1 + 1e-6) + (8 + count + 2 * math.sqrt(rank)) * UNIT[dtype] * size
        assert ((out.double() - exact).abs() <= bound + (2.0**-25 if dtype == torch.float16 else 0)).all()
        assert int((buffer == SENTINEL).sum()) == buffer.numel() - out.numel()


def check_combine_rounded(combine, shape, dtype, count, offset, rank, by_row):
    bases, experts, tau = inputs(shape, dtype, count, offset)
    generator, wide = torch.Generator().manual_seed(2), torch.promote_types(dtype, torch.float32)
    core = torch.rand(len(bases), shape[0], count, generator=generator).to(wide) - 0.3
    if not by_row:
        core = core[0, 0].double()
        core[0] = 0.0
    # Rows amid NaN: where they are padded and beyond the last one.
    left, right = (
        embedded_rows(torch.randn(len(bases), count, rank, side, generator=generator).bfloat16()) for side in shape
    )
    products = torch.einsum("lirm,lirn->lmn", left.double(), right.double())
    sizes = torch.einsum("lirm,lirn->lmn", left.double().abs(), right.double().abs())
    buffers = [torch.full((math.prod(shape) + 2 * MARGIN,), SENTINEL, dtype=dtype) for _ in bases]
    outs = [buffer[MARGIN + offset :][: math.prod(shape)].view(shape) for buffer in buffers]
    squares = []
    largest = combine(bases, experts, core, left.mT, right, None, outs, squares)
    (parts,) = squares
    assert torch.allclose(parts.sum(1), products.square().sum((1, 2)), rtol=1e-5, atol=0)
    each = core.double() if by_row else core.expand(len(bases), shape[0], count)
    changes, magnitudes = (
        torch.einsum("lmi,limn->lmn", each, tau.unflatten(2, shape)),
        torch.einsum("lmi,limn->lmn", each.abs(), tau.abs().unflatten(2, shape)),
    )
    half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
    for index, (base, out, buffer) in enumerate(zip(bases, outs, buffers, strict=True)):
        exact = base.double() + changes[index] + products[index]
        # Of a product nothing is rounded, and of a sum of N · rank of them no more than that many numbers.
        size = (4 + count) * (base.double().abs() + magnitudes[index]) + (4 + count * rank) * sizes[index]
        bound = half_ulp[dtype] * exact.abs() * (1 + 1e-6) + UNIT[dtype] * size
        assert ((out.double() - exact).abs() <= bound + (2.0**-25 if dtype == torch.float16 else 0)).all()
        assert int((buffer == SENTINEL).sum()) == buffer.numel() - out.numel()
        assert float(largest[index]) == float(out.double().abs().max())


def embedded_rows(rows):
    """The same numbers, laid out as truncations leave them, with NaN wherever nothing is."""
    *leading, length = rows.shape
    buffer = rows.new_full((*leading[:-1], leading[-1], -(-length // 16) * 16), math.nan)
    buffer = embedded(buffer)[..., :length]
    return buffer.copy_(rows)


# The interpreter is slow: with many experts `make test` takes thirteen in two dtypes, and `make test-all` the rest.
def quick(dtype, count, offset):
    return count <= 3 or (count == 13 and (dtype, offset) in FEW)


CASES = [
    pytest.param(dtype, count, offset, marks=() if quick(dtype, count, offset) else pytest.mark.slow)
    for dtype in DTYPES
    for count in COUNTS
    for offset in (0, 1)
]


@pytest.mark.parametrize(("dtype", "count", "offset"), CASES)
def test_task_gram_for_any_number_of_experts(dtype, count, offset):
    for shape in SHAPES:
        check_task_gram(_triton.task_gram, shape, dtype, count, offset)


def pairwise(*values):
    """`make test` meets every pair of a dtype, a number of experts, an offset and a value; `make test-all` the rest."""
    return [
        pytest.param(dtype, count, offset, value, marks=() if met else pytest.mark.slow)
        for i, dtype in enumerate(DTYPES)
        for j, count in enumerate(COUNTS)
        for offset in (0, 1)
        for k, value in enumerate(values)
        for met in [quick(dtype, count, offset) and (count > 3 or (i + j + offset + k) % 2 == 0)]
    ]


@pytest.mark.parametrize(("dtype", "count", "offset", "transpose"), pairwise(False, True))
def test_residual_matmul_for_any_number_of_experts(monkeypatch, dtype, count, offset, transpose):
    module = sys.modules["r2m_kernels._triton.residual_matmul"]
    for shape in SHAPES:
        check_residual_matmul(module, monkeypatch, shape, dtype, count, offset, transpose)


@pytest.mark.parametrize(("dtype", "count", "offset", "rank"), pairwise(0, 7))
def test_combine_for_any_number_of_experts(dtype, count, offset, rank):
    for shape in SHAPES:
        check_combine(_triton.combine, shape, dtype, count, offset, rank)


@pytest.mark.parametrize(("dtype", "count", "offset", "by_row"), pairwise(False, True))
def test_combine_with_bfloat16_factors_for_any_number_of_experts(dtype, count, offset, by_row):
    for shape in SHAPES:
        check_combine_rounded(_triton.combine, shape, dtype, count, offset, 7, by_row)


@pytest.mark.parametrize(("dtype", "by_row"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_many_tiles_and_components_of_bfloat16_factors(dtype, by_row):
    # More than one tile of 128 rows, of 256 columns and of 64 components; the last of each is no whole one.
    check_combine_rounded(_triton.combine, (140, 272), dtype, 3, 0, 30, by_row)
    check_combine_rounded(_triton.combine, (133, 271), dtype, 3, 0, 30, by_row)


def test_dtypes_mixed_between_experts_are_computed_in_the_widest():
    bases, experts, _ = inputs((40, 24), torch.float32, 3)
    experts[1] = [tensor.bfloat16() for tensor in experts[1]]
    experts[2] = [tensor.half() for tensor in experts[2]]
    wide = [[tensor.float() for tensor in expert] for expert in experts]
    rhs = torch.randn(2, 3, 24, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(_triton.task_gram(bases, experts).tasks, _triton.task_gram(bases, wide).tasks)
    arguments = (mixing_of(3), rhs)
    assert torch.equal(
        _triton.residual_matmul(bases, experts, *arguments), _triton.residual_matmul(bases, wide, *arguments)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_columns_and_vectors_of_the_result(dtype):
    # More than one tile of 128 columns, and of 64 rows.
    bases, experts, tau = inputs((72, 136), dtype, 2, tensors=1)
    rhs = torch.randn(1, 2, 136, 150, generator=torch.Generator().manual_seed(1))
    result = _triton.residual_matmul(bases, experts, mixing_of(2), rhs, False, "tf32x3")
    x = torch.einsum("ji,lje->lie", mixing_of(2), tau).unflatten(2, (72, 136))
    assert (result - x @ rhs.double()).norm() <= 1e-6 * (x @ rhs.double()).norm()


def test_a_tensor_has_the_same_bits_alone_and_in_a_group():
    bases, experts, _ = inputs((68, 136), torch.float32, 3, tensors=3)
    last, others = bases[2:], [expert[2:] for expert in experts]
    # Nor on whether another tensor of the group lies at an odd address, as a view into a flat buffer may.
    odd = [bases[0], embedded(bases[1], offset=1), bases[2]]
    together = _triton.task_gram(bases, experts).tasks
    assert torch.equal(together[2:], _triton.task_gram(last, others).tasks)
    assert torch.equal(together, _triton.task_gram(odd, experts).tasks)
    rhs = torch.randn(3, 3, 136, 20, generator=torch.Generator().manual_seed(1))
    for precision in ("tf32", "tf32x3", "ieee"):
        options = (mixing_of(3), rhs, False, precision)
        together = _triton.residual_matmul(bases, experts, *options)
        assert torch.equal(together[2:], _triton.residual_matmul(last, others, mixing_of(3), rhs[2:], False, precision))
        assert precision == "ieee" or torch.equal(together, _triton.residual_matmul(odd, experts, *options))
    # 18 blocks, more than the 16 that smaller batches are filled up to; three of them; one.
    y = torch.randn(6, 3, 70, 9, generator=torch.Generator().manual_seed(2))
    q = _triton.orthonormalize(y)
    assert torch.equal(q[4], _triton.orthonormalize(y[4]))
    assert torch.equal(q[4, 1], _triton.orthonormalize(y[4, 1]))


def test_groups_of_other_shapes_beside_a_group_change_no_bit_of_its_truncation(monkeypatch):
    sum_alike_wherever_it_lies(monkeypatch)
    monkeypatch.setattr(truncate, "EXTRA_STEPS", ())
    groups = []
    # Of other ranks, lengths and numbers of tensors; wide; and one whose vectors do not end at 16 bytes.
    for seed, (shape, rank, size) in enumerate(
        [((24, 20), 6, 2), ((20, 36), 5, 1), ((40, 36), 6, 1), ((22, 18), 4, 2)]
    ):
        bases, experts, tau = inputs(shape, torch.float32, 3, tensors=size, seed=seed)
        energies = torch.einsum("ji,lje->lie", mixing_of(3), tau).square().sum(2)
        groups.append(ResidualGroup(bases, experts, torch.arange(size) + seed, energies, rank))
    effort = Effort(2, 0, None)
    together = _triton.shifted_truncation(groups, mixing_of(3), effort)
    for group, found in zip(groups, together, strict=True):
        (alone,) = _triton.shifted_truncation([group], mixing_of(3), effort)
        assert found.left.shape == (len(group.bases), 3, len(group.bases[0]), group.rank)
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        exact = (found.left.double() @ found.right.double()).square().sum((2, 3))
        assert torch.allclose(found.energies, exact, rtol=1e-5, atol=0)


class OfAGroup:
    """What operators that write or add up make of tensors of one shape, in a group or a part of it."""

    def __init__(self, shape=(36, 72), dtype=torch.float32, size=3):
        self.bases, self.experts, _ = inputs(shape, dtype, 3, tensors=size)
        generator = torch.Generator().manual_seed(3)
        self.merged = [base + 0.1 * torch.randn(shape, generator=generator) for base in self.bases]
        self.rows = torch.randn(size, shape[0], 3, generator=generator)
        self.left = torch.randn(size, 3, shape[0], 5, generator=generator)
        self.right = torch.randn(size, 3, 5, shape[1], generator=generator)
        self.keys = torch.arange(3 * size).view(size, 3) * 0x9E3779B97F4A7

    def results(self, some=slice(None)):
        """Name → what is written of each tensor and its largest magnitude, or one result with the tensors first."""
        bases, experts = self.bases[some], [expert[some] for expert in self.experts]
        third = torch.full((3,), 1 / 3, dtype=torch.float64)
        rows, left, right, keys = self.rows[some], self.left[some], self.right[some], self.keys[some]
        thresholds = torch.tensor([0.02, 0.1, 0.0])
        found = {"row_grams": _triton.row_grams(bases, experts).rows, "task_gram": _triton.task_gram(bases, experts)[0]}
        found["sum_rows"] = _triton.sum_rows(found["row_grams"])
        for orthogonal in (True, False):
            found[f"row_lengths {orthogonal}"] = lengths = _triton.row_lengths(left, right, orthogonal)
        found["weigh_rows"] = _triton.weigh_rows(left, lengths, third, third, 3.0, third, left.dtype)
        found["weighted_sum"] = _triton.weighted_sum(bases, experts, third, torch.float64)
        found["row_coefficients"] = _triton.row_coefficients(
            found["row_grams"], third, mixing_of(3), third, third, 0.7, 3.0, torch.float32
        )
        written = {
            "combine": lambda outs: _triton.combine(bases, experts, third, None, None, None, outs),
            "by rows": lambda outs: _triton.combine(bases, experts, rows, None, None, None, outs),
            "factors": lambda outs: _triton.combine(bases, experts, third, left, right, third, outs),
            "both": lambda outs: _triton.combine(bases, experts, rows, left, right, third, outs),
            "halves": lambda outs: _triton.combine(
                bases, experts, third, left.bfloat16(), right.bfloat16(), None, outs
            ),
            "ties": lambda outs: _triton.combine_ties(bases, experts, third, 0.7, thresholds, outs),
            "dare": lambda outs: _triton.combine_dare(bases, experts, third, 0.7, 0.5, keys, 0, outs),
            "mean": lambda outs: _triton.mean(experts, third, outs),
            "add": lambda outs: _triton.add(bases, torch.stack(self.merged[some]), outs),
            "match_columns": lambda outs: _triton.match_columns(bases, experts, self.merged[some], third, outs),
        }
        for name, write in written.items():
            outs = [torch.empty_like(base) for base in bases]
            found[f"largest of {name}"] = write(outs)
            found[name] = torch.stack(outs)
        return found

    def counts(self):
        """Of the whole group: there is nothing of a single tensor."""
        counts = torch.zeros(3, 2**16, dtype=torch.int64)
        _triton.count_magnitudes(self.bases, self.experts, None, counts)
        return counts


def test_what_is_written_has_the_same_bits_alone_and_in_a_group():
    group = OfAGroup()
    together = group.results()
    for name, alone in group.results(slice(2, 3)).items():
        assert torch.equal(together[name][2:], alone), name
    group.bases[1] = embedded(group.bases[1], offset=1)  # an odd address of another tensor
    for name, odd in group.results().items():
        assert torch.equal(together[name], odd), name


@pytest.mark.parametrize("height", [36, 35])
def test_some_rows_meet_the_kernels_of_the_whole_and_have_its_bits(monkeypatch, height):
    sum_alike_wherever_it_lies(monkeypatch)
    configurations, start = set(), launch.start

    def recorded(kernel, grid, config, *arguments, **constants):
        configurations.add((kernel.__name__, config))
        start(kernel, grid, config, *arguments, **constants)

    monkeypatch.setattr(launch, "start", recorded)
    bases, experts, _ = inputs((height, 72), torch.float32, 3, tensors=1)
    generator = torch.Generator().manual_seed(4)
    left, right = torch.randn(1, 3, height, 5, generator=generator), torch.randn(1, 3, 5, 72, generator=generator)
    third, outs = torch.full((3,), 1 / 3, dtype=torch.float64), [torch.empty_like(bases[0])]
    _triton.combine(bases, experts, third, left, right, third, outs)
    whole = _triton.row_grams(bases, experts).rows
    known = len(configurations)
    for rows in (slice(0, 17), slice(17, 33), slice(33, height)):
        some, thetas = [bases[0][rows]], [[expert[0][rows]] for expert in experts]
        part = [torch.empty_like(some[0])]
        _triton.combine(some, thetas, third, left[:, :, rows], right, third, part)
        assert torch.equal(part[0], outs[0][rows])
        assert torch.equal(_triton.row_grams(some, thetas).rows, whole[:, :, rows])
    assert len(configurations) == known


@pytest.mark.parametrize(("height", "width"), [(36, 72), (35, 67)])
def test_parts_with_bfloat16_factors_have_the_bits_of_the_whole(monkeypatch, height, width):
    sum_alike_wherever_it_lies(monkeypatch)
    bases, experts, _ = inputs((height, width), torch.float32, 3, tensors=1)
    generator, third = torch.Generator().manual_seed(4), torch.full((3,), 1 / 3, dtype=torch.float64)
    left, right = (torch.randn(1, 3, 40, side, generator=generator).bfloat16() for side in (height, width))
    outs = [torch.empty_like(bases[0])]
    _triton.combine(bases, experts, third, left.mT, right, None, outs)
    parts = [(rows, slice(0, width)) for rows in (slice(0, 17), slice(17, 33), slice(33, height))]
    parts += [(slice(0, height), columns) for columns in (slice(0, 40), slice(40, width))]
    for rows, columns in parts:
        some, thetas = [bases[0][rows, columns]], [[expert[0][rows, columns]] for expert in experts]
        part = [torch.empty(some[0].shape)]
        _triton.combine(some, thetas, third, left[..., rows].mT, right[..., columns], None, part)
        assert torch.equal(part[0], outs[0][rows, columns])


def test_a_group_of_more_tensors_than_a_grid_takes_is_launched_in_parts(monkeypatch):
    assert launch.MOST_TENSORS <= 65_535
    table, keys, shared = torch.arange(140_000).view(70_000, 2), torch.arange(70_000), torch.arange(3)
    found = list(launch.parts((5, 70_000), (table, shared, 7, keys)))
    assert [grid for grid, _ in found] == [(5, launch.MOST_TENSORS), (5, 70_000 - launch.MOST_TENSORS)]
    for index, whole in ((0, table), (3, keys)):
        assert torch.equal(torch.cat([arguments[index] for _, arguments in found]), whole)
    assert all(arguments[1] is shared and arguments[2] == 7 for _, arguments in found)
    assert list(launch.parts((70_000,), (table,))) == [((70_000,), (table,))]  # the first dimension has 2^31
    group = OfAGroup((6, 16), size=5)
    whole, counts = group.results(), group.counts()
    monkeypatch.setattr(launch, "MOST_TENSORS", 2)
    for name, parts in group.results().items():
        assert torch.equal(whole[name], parts), name
    assert torch.equal(group.counts(), counts)


def test_nothing_that_other_peoples_kernels_share_is_touched():
    """Triton's allocator is one for the process, which descriptors made on the device need; nor what is known to race.

    Floating-point atomics would make bits depend on chance; TIES counts with integers.
    """
    sources = {path.name: path.read_text() for path in Path(launch.__file__).parent.glob("*.py")}
    for name in ("set_allocator", "make_tensor_descriptor", "make_block_ptr", "warp_specialize"):
        assert [file for file, text in sources.items() if name in text] == []
    atomics = {file: text.count("tl.atomic") for file, text in sources.items()}
    assert {file: count for file, count in atomics.items() if count} == {"elements.py": 1}


def test_no_number_reaches_a_kernel_as_a_float_of_python(monkeypatch):
    # Triton passes it in 32 bits, and its interpreter does not.
    passed, start = [], launch.start

    def recorded(kernel, grid, config, *arguments, **constants):
        passed.append(kernel.__name__)
        assert not any(isinstance(one, float) for one in arguments), kernel.__name__
        start(kernel, grid, config, *arguments, **constants)

    monkeypatch.setattr(launch, "start", recorded)
    group = OfAGroup((4, 8), torch.float64, size=1)
    group.results()
    group.counts()
    assert {"row_coefficients_kernel", "combine_dare_kernel", "count_magnitudes_kernel"} < set(passed)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(("shape", "dtype", "offset"), [((36, 72), torch.bfloat16, 64), ((23, 53), torch.float32, 65)])
def test_operators_agree_with_the_portable_backend_amid_nan(shape, dtype, offset, count):
    judged = set()
    for case in cases(shape, dtype, count, torch.device("cpu"), offset):
        if case.operator not in {"task_gram", "residual_matmul", "orthonormalize"}:  # tested above
            assert case.judge(case.call()) <= 1, f"{case.operator} {case.what}"
            judged.add(case.operator)
    assert {"combine_ties", "combine_dare", "mean", "add", "weighted_sum", "count_magnitudes", "match_columns"} < judged


def test_magnitudes_of_tensors_of_several_shapes_are_counted_together():
    shapes, counts, expected = [(5, 7), (36, 72), (1,)], *(torch.zeros(2, 2**16, dtype=torch.int64) for _ in range(2))
    groups = [inputs(shape, torch.float32, 2, tensors=1) for shape in shapes]
    bases, experts = [group[0][0] for group in groups], [[group[1][j][0] for group in groups] for j in range(2)]
    _triton.count_magnitudes(bases, experts, None, counts)
    _torch.count_magnitudes(bases, experts, None, expected)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("kind", ["equal columns", "zero column", "condition 1e7", "one column", "tiny"])
def test_orthonormalize_of_ill_conditioned_blocks(kind):
    y = torch.randn(150, 12, generator=torch.Generator().manual_seed(0))
    if kind == "equal columns":
        y[:, 5] = y[:, 2]
    elif kind == "zero column":
        y[:, 3] = 0.0
    elif kind == "condition 1e7":
        u, _, v = torch.linalg.svd(y.double(), full_matrices=False)
        y = ((u * torch.logspace(0, -7, 12, dtype=torch.float64)) @ v).float()
    elif kind == "one column":
        y = y[:, :1]
    else:
        y = y * 1e-34  # lengths near the smallest that float32 can invert
    q = _triton.orthonormalize(y).double()
    kept = [i for i in range(y.shape[1]) if kind != "zero column" or i != 3]
    gram = q[:, kept].T @ q[:, kept]
    assert torch.allclose(gram, torch.eye(len(kept), dtype=torch.float64), atol=2e-6)
    unit = y.double() / y.double().norm(dim=0).clamp_min(1e-300)
    assert float((unit - q @ (q.T @ unit)).abs().max()) <= 2e-6
    if kind == "zero column":
        assert torch.equal(q[:, 3], torch.zeros(150, dtype=torch.float64))


def test_the_language_is_patched_once_a_launch_restored_and_no_bit_changes(monkeypatch):
    bases, experts, _ = inputs((20, 24), torch.float32, 2)
    patched, patch = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *rest: patched.append(rest[0]) or patch(*rest))
    before = tl.load, tl.range, tl.tensor.__add__
    quick = _triton.task_gram(bases, experts).tasks
    assert (tl.load, tl.range, tl.tensor.__add__) == before
    once = len(patched)
    # Two launches: four parts of the language each, and both its modules anew where a function of Triton's knows both.
    assert once <= 2 * 11
    monkeypatch.setattr(interpreter, "_patch_lang", PATCH)
    assert torch.equal(quick, _triton.task_gram(bases, experts).tasks)
    assert len(patched) > 10 * once


@pytest.mark.parametrize("transpose", [False, True])
def test_tf32x3_products_leave_out_two_to_the_minus_22(monkeypatch, transpose):
    multiply_in_tf32(monkeypatch)
    bases, experts, x = residuals(transpose)
    rhs = torch.randn(2, 3, x.shape[3], 20, generator=torch.Generator().manual_seed(1))
    result = _triton.residual_matmul(bases, experts, mixing_of(3), rhs, transpose, "tf32x3")
    error = float(((result - x @ rhs.double()).abs() / (x.abs() @ rhs.double().abs())).max())
    # Forming X and summing add float32 roundings.
    assert error <= 2.0**-22 + (4 + 3 + 2 * math.sqrt(136)) * 2.0**-24


def residuals(transpose):
    """Bases, experts, and what a product multiplies with: (2, 3, 68, 136) float64, or transposed."""
    bases, experts, tau = inputs((68, 136), torch.float32, 3)
    x = torch.einsum("ji,lje->lie", mixing_of(3), tau).unflatten(2, (68, 136))
    return bases, experts, x.mT if transpose else x


def test_combine_with_tf32x3_products_is_within_its_bound(monkeypatch):
    multiply_in_tf32(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16):
        check_combine(_triton.combine, (68, 136), dtype, 3, 0, rank=33)


def mutant(tmp_path, name, original, changed):
    """A kernel module with one expression replaced, loaded beside the others from a file of its own."""
    source = Path(sys.modules[f"r2m_kernels._triton.{name}"].__file__).read_text()
    assert source.count(original) >= 1
    path = tmp_path / f"mutant_{name}.py"
    path.write_text(source.replace(original, changed))
    spec = importlib.util.spec_from_file_location(f"r2m_kernels._triton.mutant_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("offset", [0, 1])
def test_a_read_beyond_the_end_is_caught(tmp_path, offset):
    inside = "tl.where(row * 4 + a < count, elements, 0)"
    module = mutant(tmp_path, "task_gram", inside, inside.replace("elements", "elements + 4"))
    with pytest.raises(AssertionError):
        check_task_gram(module.task_gram, (37, 53), torch.float32, 3, offset)


@pytest.mark.parametrize(
    "original", ["(rows < outer)[:, None] & (columns < k)[None, :]", "depth < inner, rows < outer"]
)
def test_a_product_without_its_masks_is_caught(tmp_path, monkeypatch, original):
    everywhere = {"(": "(rows < rows + 1)[:, None] & (columns < k)[None, :]", "d": "depth >= 0, rows >= 0"}
    module = mutant(tmp_path, "residual_matmul", original, everywhere[original[0]])
    with pytest.raises(AssertionError):
        check_residual_matmul(module, monkeypatch, (68, 136), torch.float32, 2, 0, transpose=False)


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("rank + depth, depth < rank", "rank + depth, depth < rank + INNER"),
        ("known_multiple(m + 7, 8)", "m - 1"),
        ("(rows < m)[:, None] & (some < n)[None, :]", "(rows < m)[:, None] & (some < n + 1)[None, :]"),
        ("(columns < n)[None, :], total, 0.0)", "(columns < n + 1)[None, :], total, 0.0)"),
    ],
)
def test_a_product_of_bfloat16_factors_with_another_mask_is_caught(tmp_path, original, changed):
    module = mutant(tmp_path, "combine", original, changed)
    with pytest.raises(AssertionError):
        check_combine_rounded(module.combine, (37, 53), torch.float32, 2, 0, 7, by_row=False)


@pytest.mark.parametrize("rank", [0, 7])
def test_a_merged_tensor_written_without_its_mask_is_caught(tmp_path, monkeypatch, rank):
    module = mutant(tmp_path, "outputs", "+ offsets, rounded, mask=inside)", "+ offsets, rounded)")
    monkeypatch.setattr(sys.modules["r2m_kernels._triton.combine"], "write_rounded", module.write_rounded)
    with pytest.raises(AssertionError):
        check_combine(_triton.combine, (37, 53), torch.float32, 2, 0, rank)


def test_precision_is_never_lower_than_asked_for():
    order = ["bf16", "tf32", "tf32x3", "ieee"]
    for target in launch.TARGETS:
        for asked in order:
            for aligned in (True, False):
                config = launch.residual_matmul(target, torch.float32, asked, aligned, 3)
                assert order.index(config.precision) >= order.index(asked)
                assert target != "gfx942" or config.precision == "ieee"  # ROCm has no tf32
    assert launch.residual_matmul("sm_90", torch.float64, "tf32", True, 3).precision == "ieee"
