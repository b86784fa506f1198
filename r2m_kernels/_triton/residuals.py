"""The residuals of groups at work, formed once and kept as operands, and products with them (README §4).

A residual X_i = Σ_j mixing[j, i] (θ_j − θ₀) that is multiplied half a dozen times costs less to keep than to form
again: as float16 2 bytes a number are read, where the inputs have 4 for each of N + 1 tensors. What is kept is A, which
is X, or Xᵀ where X is wide: A is tall, and every step is one grouped product on the matrix units, of all shapes.

Operands are float16 where inputs have at most 32 bits. They are rounded, where matrix units cut tf32 ones off after as
many bits, cost half of what tf32 does, and are half the traffic. What is rounded has a norm that is known, so that a
power of two brings it into float16's range. float64 stays float64.

The sketch multiplies with random signs that are made in registers. ±1 is exact in every operand precision, and the pass
waits for memory, not for the matrix units: a sparse test matrix would save nothing here and would need atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stream.blocks import padded
from . import launch
from .addresses import ELEMENT_TYPES, SCALE, Group, known_multiple, row_stride, tensor_at
from .orthonormalize import Blocks
from .signs import random_signs
from .sums import summed

# What numbers of the last basis are multiplied with, which is kept as it is and rounded where it is read.
BASIS_SCALE = 2.0**8

# Residuals of one tensor that a program forms.
EXPERTS = 4
# Numbers of a shape in the table of :class:`Residuals`; the first three count programs, of kernels that form residuals,
# and of those whose products lie on the long and on the short side.
SHAPE, FORMING, LONG, SHORT = 14, 0, 1, 2


@triton.jit
def shape_of(shapes, COUNTS: tl.constexpr, SHAPE: tl.constexpr):
    """The row of a program's shape, and its place among the shape's programs."""
    program = tl.program_id(0).to(tl.int64)
    first, last = program * 0, tl.load(shapes + COUNTS)
    while program >= last:
        first = last
        shapes += SHAPE
        last = tl.load(shapes + COUNTS)
    return shapes, program - first


@triton.jit
def shape_with(shapes, residual, count, SHAPE: tl.constexpr):
    """The row of the shape of one of all residuals."""
    while residual // count >= tl.load(shapes + 13):
        shapes += SHAPE
    return shapes


@triton.jit
def tiles_of(shapes, residual, count, SHAPE: tl.constexpr):
    """Of one of all residuals: its shape's first tensor, its tiles on the long side, and where the shape's start."""
    shapes = shape_with(shapes, residual, count, SHAPE)
    return tl.load(shapes + 6), tl.load(shapes + 11).to(tl.int32), tl.load(shapes + 12)


@triton.jit
def sides_of(shapes, ALIGNED: tl.constexpr):
    """m, n, k and the index of the first tensor: of a row of the table."""
    m, n, k = tl.load(shapes + 3).to(tl.int32), tl.load(shapes + 4).to(tl.int32), tl.load(shapes + 5).to(tl.int32)
    if ALIGNED:
        m, n = known_multiple(m, 8), known_multiple(n, 8)
    return m, n, k, tl.load(shapes + 6)


@triton.jit(do_not_specialize=["count"])
def form_residuals_kernel(
    shapes,
    mixing,
    out,
    count,
    SHAPE: tl.constexpr,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXPERTS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """out[l, i] = SCALE · X_li, or its transpose where that is tall: a tile of X, of EXPERTS experts, a program.

    mixing (tensors, N, N). What serves other experts is a neighbour, and finds the inputs in the L2 cache.
    """
    shapes, place = shape_of(shapes, 0, SHAPE)
    m, n, _, first_tensor = sides_of(shapes, ALIGNED)
    blocks, column_tiles = tl.cdiv(count, EXPERTS), tl.cdiv(n, SIDE)
    programs = tl.cdiv(m, SIDE) * column_tiles * blocks
    tensor, rest = place // programs, (place % programs).to(tl.int32)
    tile, first = rest // blocks, rest % blocks * EXPERTS
    rows = tile // column_tiles * SIDE + tl.arange(0, SIDE)
    columns = tile % column_tiles * SIDE + tl.arange(0, SIDE)
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]

    slots = tensor_at(shapes + 7, True, tl.int64, False) + tensor * (count + 1)
    mixing += (first_tensor + tensor) * count * count
    theta = tl.load(tensor_at(slots, True, TYPE, ALIGNED) + offsets, mask=inside, other=0.0).to(COMPUTE)
    residuals = ()
    for _ in tl.static_range(EXPERTS):
        residuals += (tl.zeros((SIDE, SIDE), COMPUTE),)
    for j in range(count):
        expert = tensor_at(slots + 1 + j, True, TYPE, ALIGNED)
        tau = tl.load(expert + offsets, mask=inside, other=0.0).to(COMPUTE) - theta
        mixed = ()
        for i in tl.static_range(EXPERTS):
            weight = tl.load(mixing + j * count + first + i, mask=first + i < count, other=0.0) * SCALE
            mixed += (residuals[i] + weight * tau,)
        residuals = mixed

    long, stride = tl.maximum(m, n).to(tl.int64), row_stride(tl.minimum(m, n))
    out += known_multiple(tl.load(shapes + 8), 16) + (tensor * count + first) * long * stride
    for i in tl.static_range(EXPERTS):
        if first + i < count:
            kept = residuals[i].to(out.dtype.element_ty)
            matrix = out + i * long * stride
            if m < n:
                there = matrix + columns[:, None].to(tl.int64) * stride + rows[None, :]
                tl.store(there, tl.trans(kept), mask=(columns < n)[:, None] & (rows < m)[None, :])
            else:
                tl.store(matrix + rows[:, None].to(tl.int64) * stride + columns[None, :], kept, mask=inside)


@triton.jit(do_not_specialize=["count"])
def residual_product_kernel(
    residuals,
    vectors,
    out,
    squares,
    shifted,
    lengths,
    shapes,
    count,
    SHAPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    OPERAND: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACROSS: tl.constexpr,
    SIGNS: tl.constexpr,
    DAMPING: tl.constexpr,
    LENGTHS: tl.constexpr,
    PAIRED: tl.constexpr,
    VECTOR_SCALE: tl.constexpr,
    DIVISOR: tl.constexpr,
    SHIFTED_SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[b] = vectors[b] A_bᵀ, k rows on the long side, for every block b: residual i of tensor l.

    ACROSS: out[b] = vectors[b] A_b on the short side, less shift_b · shifted[b] where DAMPING is not 0. With SIGNS
    vectors holds a key for each tensor instead, and vector c is the random signs of column c.

    squares has the sum of squares of every tile of the long side, float64, a block's one after another, or, PAIRED, of
    products with the numbers of ``shifted`` there; shift_b = DAMPING / (short side − k) · (1 − Σ squares[b]), 0 where
    that is negative. Vectors are given, shifted and written times VECTOR_SCALE, SHIFTED_SCALE and OUT_SCALE, the last
    times lengths[b] with LENGTHS; DIVISOR is what operands are multiplied with together.
    """
    shapes, place = shape_of(shapes, 2 if ACROSS else 1, SHAPE)
    m, n, k, first_tensor = sides_of(shapes, ALIGNED)
    long, short = tl.maximum(m, n), tl.minimum(m, n)
    if ALIGNED:  # which a maximum loses
        long, short = known_multiple(long, 8), known_multiple(short, 8)
    outer, inner = (short, long) if ACROSS else (long, short)
    # Programs that read the same tile of a residual are neighbours: all but the first find it in the L2 cache.
    row_tiles = tl.cdiv(k, ROWS)
    tiles = tl.cdiv(outer, COLUMNS) * row_tiles
    block, tile = place // tiles, (place % tiles).to(tl.int32)
    rows = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    columns = tile // row_tiles * COLUMNS + tl.arange(0, COLUMNS)

    stride = row_stride(short)
    matrix = residuals + known_multiple(tl.load(shapes + 8), 16) + block * long * stride
    of_long = known_multiple(tl.load(shapes + 9), 16) + block * k * row_stride(long)
    of_short = known_multiple(tl.load(shapes + 10), 16) + block * k * stride
    of_outer, of_inner = (of_short, of_long) if ACROSS else (of_long, of_short)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    if DAMPING != 0.0:
        # Before the product: at its end there are no registers left for another tile.
        tiles_of_block, sums = tl.load(shapes + 11).to(tl.int32), squares + tl.load(shapes + 12)
        left_out = 1.0 - summed(sums + block * tiles_of_block, tiles_of_block, 32)
        amount = left_out * DAMPING / (short - k).to(tl.float64)
        amount = tl.where(amount < 0.0, 0.0, amount).to(COMPUTE) * (SHIFTED_SCALE * DIVISOR)  # a NaN stays one
        there = of_outer + rows[:, None].to(tl.int64) * row_stride(outer) + columns[None, :]
        both = (rows < k)[:, None] & (columns < outer)[None, :]
        total -= amount * tl.load(shifted + there, mask=both, other=0.0).to(COMPUTE)
    for start in range(0, inner, INNER):
        depth = start + tl.arange(0, INNER)
        if ACROSS:
            where = depth[:, None].to(tl.int64) * stride + columns[None, :]
            right = tl.load(matrix + where, mask=(depth < inner)[:, None] & (columns < outer)[None, :], other=0.0)
        else:
            where = columns[:, None].to(tl.int64) * stride + depth[None, :]
            right = tl.load(matrix + where, mask=(columns < outer)[:, None] & (depth < inner)[None, :], other=0.0)
            right = tl.trans(right)
        if SIGNS:
            left = random_signs(tl.load(vectors + first_tensor + block // count), depth[None, :], rows[:, None])
        else:
            where = of_inner + rows[:, None].to(tl.int64) * row_stride(inner) + depth[None, :]
            left = tl.load(vectors + where, mask=(rows < k)[:, None] & (depth < inner)[None, :], other=0.0)
            if VECTOR_SCALE != 1.0:
                left = left.to(COMPUTE) * VECTOR_SCALE
        left, right = left.to(OPERAND).to(DOT), right.to(DOT)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=COMPUTE)

    total *= 1.0 / DIVISOR
    here = (rows < k)[:, None] & (columns < outer)[None, :]
    where = of_outer + rows[:, None].to(tl.int64) * row_stride(outer) + columns[None, :]
    if not ACROSS:
        # In the compute type, for want of registers: residuals are scaled to norm 1.
        inside = tl.where(here, total, 0.0)
        other = inside
        if PAIRED:
            other = tl.load(shifted + where, mask=here, other=0.0).to(COMPUTE) * SHIFTED_SCALE
        tl.store(squares + tl.program_id(0), tl.sum(tl.sum(inside * other, axis=1).to(tl.float64)))
        if LENGTHS:
            total *= tl.load(lengths + first_tensor * count + block)
    tl.store(out + where, (total * OUT_SCALE).to(out.dtype.element_ty), mask=here)


def sides_of_group(inputs: Group) -> tuple[int, int]:
    """Rows and columns of its matrices."""
    m = len(inputs.bases[0])
    return m, inputs.bases[0].numel() // m


def fits(inputs: Group) -> bool:
    """Whether rows and columns of residuals, and vectors on either side, are whole vectors of operands."""
    return inputs.aligned and all(side % 8 == 0 for side in sides_of_group(inputs))


def product_config(inputs: Group, rank: int, aligned: bool) -> launch.MatmulConfig:
    """Of products with as many vectors. Sums of squares are those of its tiles, so that bits depend on it."""
    return launch.residual_product(launch.target_of(inputs.device), inputs.compute_dtype, aligned, rank)


class Matrices(NamedTuple):
    """Of one shape, of all experts of some tensors.

    Attributes:
        tensors: how many.
        m, n: their sides before they were laid tall.
        rank: how many vectors are multiplied with each.
        source: the address of what they are formed from.
        programs: that form them.
    """

    tensors: int
    m: int
    n: int
    rank: int
    source: int
    programs: int


class Kept:
    """Matrices of several shapes that are kept as operands, tall, one after another, and products with them.

    Attributes:
        short, long: how blocks of vectors on either side lie, a block for each matrix.
        operand, scale: what they are kept as, and vectors between steps, and what these are multiplied with.
        numbers: what is kept.
        shapes, aligned: as given.
        table: (shapes, SHAPE) int64 on the device. A row: programs up to its last one, that form its matrices, and
            whose products lie on the long, and on the short side; m, n and k; its first tensor; the address of what it
            is formed from; where its matrices and its vectors on the long and on the short side start; tiles of a block
            on the long side, and the shape's first; and the tensor after its last one.
    """

    def __init__(
        self,
        shapes: Sequence[Matrices],
        config: launch.MatmulConfig,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
        aligned: bool,
    ) -> None:
        """Nothing is formed yet.

        Args:
            config: of products.
            count: N experts.
            dtype: what is computed in.
            device: of all.
            aligned: whether sides are whole vectors of operands.
        """
        self.shapes, self.aligned, self.count, self.dtype, self.device = shapes, aligned, count, dtype, device
        half = dtype != torch.float64
        self.operand, self.scale = (torch.float16, SCALE) if half else (torch.float64, 1.0)
        self._basis_scale = BASIS_SCALE if half else 1.0
        self._product = config
        self.short, self.long = (
            Blocks([(one.tensors * count, one.rank, side(one.m, one.n)) for one in shapes], device)
            for side in (min, max)
        )
        self.size, self._programs, tensors, rows = 0, [0, 0, 0], 0, []
        for place, one in enumerate(shapes):
            (short, long), first, size = sorted((one.m, one.n)), self._programs[LONG], one.tensors * count
            row_tiles = -(-one.rank // self._product.rows)
            tiles = [row_tiles * -(-side // self._product.columns) for side in (long, short)]
            self._programs[FORMING] += one.programs
            self._programs[LONG] += size * tiles[0]
            self._programs[SHORT] += size * tiles[1]
            starts = self.size, self.long.starts[place], self.short.starts[place]
            last = tensors + one.tensors
            row = [*self._programs, one.m, one.n, one.rank, tensors, one.source, *starts, tiles[0], first, last]
            rows.append(row)
            self.size, tensors = self.size + size * long * padded(short), last
        self.table = torch.tensor(rows).to(device, non_blocking=True)
        self.numbers = torch.empty(0)

    @property
    def forming(self) -> int:
        """Programs that form what is kept."""
        return self._programs[FORMING]

    def matrices(self) -> list[Tensor]:
        """What is kept: of each shape (L, N, long side, short side), times :attr:`scale`."""
        views, start = [], 0
        for one in self.shapes:
            size, (short, long) = one.tensors * self.count, sorted((one.m, one.n))
            rows = self.numbers.as_strided((size, long, short), (long * padded(short), padded(short), 1), start)
            views.append(rows.view(-1, self.count, long, short))
            start += size * long * padded(short)
        return views

    def forget(self) -> None:
        """Give their memory back."""
        self.numbers = torch.empty(0)

    def sketch(self, keys: Tensor, scale: float | None = None) -> Tensor:
        """Random signs times A, on the short side; the same signs for all experts of a tensor.

        Args:
            keys: (tensors,) int64, on the device.
            scale: what operands that are made of it are multiplied with; by default it comes as it is.
        """
        out = self.short.vectors(self.dtype if scale is None else self.operand)
        self._multiply(keys, out, across=True, signs=True, divisor=self.scale, out_scale=scale or 1.0)
        return out

    def along(self, basis: Tensor, lengths: Tensor | None = None, *, paired: bool = False) -> tuple[Tensor, Tensor]:
        """A times a basis, on the long side, and the sums of squares of its tiles before lengths.

        Args:
            basis: on the short side, as operands, times :attr:`scale`; or in the compute dtype.
            lengths: (tensors, N) in the compute dtype, what products are multiplied with that come in it; without,
                these are operands, times :attr:`scale`.
            paired: A is symmetric, and the sums are of products with the basis: how much of A is in its span.

        Returns:
            Vectors, and float64 sums, a block's one after another.
        """
        last, operands = lengths is not None, basis.dtype == self.operand
        given, rounding = (self.scale, 1.0) if operands else (1.0, self._basis_scale)
        out = self.long.vectors(self.dtype if last else self.operand)
        squares = torch.empty(self._programs[LONG], dtype=torch.float64, device=self.device)
        self._multiply(
            *(basis, out, squares, basis if paired else None),
            lengths=lengths,
            paired=paired,
            vector_scale=rounding,
            divisor=self.scale * given * rounding,
            shifted_scale=1.0 / given,
            out_scale=1.0 if last else self.scale,
        )
        return out, squares

    def across(self, product: Tensor, basis: Tensor, squares: Tensor, damping: float) -> Tensor:
        """Aᵀ times what :meth:`along` made of a basis, less a shift of the basis, on the short side.

        The shift is ``damping`` of the mean energy of what the basis leaves out.
        """
        out = self.short.vectors(self.dtype)
        self._multiply(
            *(product, out, squares, basis),
            across=True,
            damping=damping,
            divisor=self.scale * self.scale,
            shifted_scale=1.0 / self.scale,
        )
        return out

    def _multiply(
        self,
        vectors: Tensor,
        out: Tensor,
        squares: Tensor | None = None,
        shifted: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        divisor: float,
        across: bool = False,
        signs: bool = False,
        damping: float = 0.0,
        paired: bool = False,
        vector_scale: float = 1.0,
        shifted_scale: float = 1.0,
        out_scale: float = 1.0,
    ) -> None:
        config = self._product
        launch.start(
            residual_product_kernel,
            (self._programs[SHORT if across else LONG],),
            config,
            *(self.numbers, vectors, out),
            *(out if one is None else one for one in (squares, shifted, lengths)),
            *(self.table, self.count),
            SHAPE=SHAPE,
            COMPUTE=ELEMENT_TYPES[self.dtype],
            OPERAND=ELEMENT_TYPES[self.operand],
            DOT=self.multiplied,
            PRECISION=config.input_precision,
            ACROSS=across,
            SIGNS=signs,
            DAMPING=damping,
            LENGTHS=lengths is not None,
            PAIRED=paired,
            VECTOR_SCALE=vector_scale,
            DIVISOR=divisor,
            SHIFTED_SCALE=shifted_scale,
            OUT_SCALE=out_scale,
            ALIGNED=config.aligned,
            ROWS=config.rows,
            COLUMNS=config.columns,
            INNER=config.inner,
        )

    @property
    def multiplied(self) -> tl.dtype:
        """What operands are where they meet."""
        return launch.multiplied(ELEMENT_TYPES[self.operand], ELEMENT_TYPES[self.dtype])


class Residuals(Kept):
    """Those of all experts, of groups of one dtype and as many experts, one group after another."""

    def __init__(self, inputs: Sequence[Group], ranks: Sequence[int]) -> None:
        """Nothing is formed yet.

        Args:
            inputs: groups of matrices, of rows as the matrices'.
            ranks: of each how many vectors are multiplied; of one :func:`product_config`.
        """
        first, shapes, aligned = inputs[0], [], all(map(fits, inputs))
        count, self.inputs = len(first.experts), inputs
        target, dtype = launch.target_of(first.device), first.compute_dtype
        self._form, config = launch.form_residuals(target, aligned), product_config(first, ranks[0], aligned)
        for of, rank in zip(inputs, ranks, strict=True):
            (m, n), size = sides_of_group(of), len(of.bases)
            programs = size * -(-m // self._form.block) * -(-n // self._form.block) * -(-count // EXPERTS)
            shapes.append(Matrices(size, m, n, rank, of.table.data_ptr(), programs))
        super().__init__(shapes, config, count, dtype, first.device, aligned)

    def form(self, unit: Tensor) -> None:
        """Keep them, each scaled to norm 1.

        Args:
            unit: (tensors, N, N) in the compute dtype, mixing and scaling: columns are experts.
        """
        self.numbers = torch.empty(self.size, dtype=self.operand, device=self.device)
        launch.start(
            form_residuals_kernel,
            (self.forming,),
            self._form,
            *(self.table, unit, self.numbers, self.count),
            SHAPE=SHAPE,
            TYPE=ELEMENT_TYPES[self.inputs[0].dtype],
            COMPUTE=ELEMENT_TYPES[self.dtype],
            SCALE=self.scale,
            ALIGNED=self.aligned,
            EXPERTS=EXPERTS,
            SIDE=self._form.block,
        )
