"""Orthonormal bases of blocks of vectors: CholeskyQR twice, all blocks at once (Fukaya et al. 2014; README §4).

The Gram matrices and their factors are float64, so that the first pass survives any conditioning that float32 vectors
can have; the second removes what rounding the product to float32 left. Every step is one launch for all blocks, of as
many sorts as there are, and a block's numbers are its own: libraries choose another algorithm for single matrices than
for batches of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._stream.blocks import padded
from . import launch
from .addresses import ELEMENT_TYPES, SCALE, known_multiple, padded_rows, row_stride, vectors_fit
from .sums import sum_tiles

# Added to the Gram matrix of k vectors of length 1, so that it stays positive definite whatever their rank: at least
# this, and four times its rounding √m · k · 2⁻⁵³ where that is more; far below what the second pass can repair.
RELATIVE_SHIFT = 1e-11


SORT = 7  # numbers of a sort in the table of :class:`Blocks`


@triton.jit
def sort_of(sorts, index, SORT: tl.constexpr):
    """A block's place in its sort, k, the length, and where vectors, squares, rows and padded squares of it start."""
    first, last = index * 0, tl.load(sorts)
    while index >= last:
        first = last
        sorts += SORT
        last = tl.load(sorts)
    k, length = tl.load(sorts + 1).to(tl.int32), tl.load(sorts + 2).to(tl.int32)
    starts = tl.load(sorts + 3), tl.load(sorts + 4), tl.load(sorts + 5), tl.load(sorts + 6)
    return index - first, k, length, starts[0], starts[1], starts[2], starts[3]


@triton.jit
def lower_tile(pair):
    """Row and column of a tile of the lower triangle, of which there are 1, 2, 3 … in a row."""
    row, column = pair * 0, pair
    while column > row:
        row += 1
        column -= row
    return row, column


@triton.jit(do_not_specialize=["pairs"])
def vectors_gram_kernel(
    vectors, gram, sorts, pairs, SORT: tl.constexpr, ALIGNED: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr
):
    """gram[b] = vectors[b] vectors[b]ᵀ, float64, (k, length) → (k, k): a tile of the lower triangle a program."""
    block, k, length, of_vectors, of_squares, _, _ = sort_of(sorts, (tl.program_id(0) // pairs).to(tl.int64), SORT)
    row, column = lower_tile(tl.program_id(0) % pairs)
    stride = row_stride(length)
    vectors, gram = vectors + known_multiple(of_vectors, 16), gram + of_squares
    if ALIGNED:
        length = known_multiple(length, 4)
    length = tl.where(row * SIDE < k, length, 0)  # others of the launch have more tiles
    rows, columns = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE)
    of_rows = vectors + (block * k + rows[:, None]) * stride
    of_columns = vectors + (block * k + columns[:, None]) * stride
    total = tl.zeros((SIDE, SIDE), tl.float64)
    for start in range(0, length, INNER):
        depth = start + tl.arange(0, INNER)
        inside = (depth < length)[None, :]
        left = tl.load(of_rows + depth[None, :], mask=(rows < k)[:, None] & inside, other=0.0).to(tl.float64)
        right = tl.load(of_columns + depth[None, :], mask=(columns < k)[:, None] & inside, other=0.0).to(tl.float64)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee", out_dtype=tl.float64)
    inside = (rows < k)[:, None] & (columns < k)[None, :]
    tl.store(gram + block * k * k + rows[:, None] * k + columns[None, :], total, mask=inside)
    tl.store(gram + block * k * k + columns[None, :] * k + rows[:, None], total, mask=inside)


@triton.jit
def eliminated(block, size, least, SIDE: tl.constexpr):
    """W with W block Wᵀ = I, lower triangular, of the leading ``size`` rows and columns; the others are the identity's.

    No pivot is below ``least``: where the matrix is known to have none, it is what rounding took.
    """
    places = tl.arange(0, SIDE)
    inverse = tl.where(places[:, None] == places[None, :], 1.0, 0.0).to(block.dtype)
    for step in range(size):
        in_row, in_column = (places == step)[:, None], (places == step)[None, :]
        row = tl.sum(tl.where(in_row, block, 0.0), axis=0)
        column = tl.sum(tl.where(in_column, block, 0.0), axis=1)
        made = tl.sum(tl.where(in_row, inverse, 0.0), axis=0)
        pivot = tl.sum(tl.where(places == step, row, 0.0), axis=0)
        pivot = tl.where(pivot < least, least, pivot)  # not tl.maximum: a NaN is to stay one
        factor = tl.where(places > step, column / pivot, 0.0)
        block -= factor[:, None] * row[None, :]
        inverse = tl.where(in_row, inverse / tl.sqrt(pivot), inverse - factor[:, None] * made[None, :])
    return inverse


@triton.jit
def add_product(matrix, rows, columns, k, left, right):
    """matrix[rows, columns] += left right, of a k × k matrix."""
    inside, where = (rows < k)[:, None] & (columns < k)[None, :], rows[:, None] * k + columns[None, :]
    total = tl.load(matrix + where, mask=inside, other=0.0)
    total = tl.dot(left, right, total, input_precision="ieee", out_dtype=tl.float64)
    tl.store(matrix + where, total, mask=inside)


@triton.jit
def inverse_factor_kernel(
    gram, lengths, out, sorts, SORT: tl.constexpr, SHIFT: tl.constexpr, SMALLEST: tl.constexpr, SIDE: tl.constexpr
):
    """out[b] = T with T gram[b] Tᵀ = I, lower triangular: a matrix a program, by blocks of SIDE rows and columns.

    The matrix of unit vectors, a shift on its diagonal, is eliminated in place, and out[b] with it, which begins as
    what made them unit vectors: lengths[b], which are 0 for vectors whose square is not above SMALLEST. The shift is
    SHIFT, or four times the matrix's rounding.
    """
    matrix, k, length, _, of_squares, of_rows, _ = sort_of(sorts, tl.program_id(0).to(tl.int64), SORT)
    matrix_at = of_squares + matrix * k * k
    gram, out, lengths = gram + matrix_at, out + matrix_at, lengths + of_rows + matrix * k
    shift = 4.0 * tl.sqrt(length.to(tl.float64)) * k.to(tl.float64) * 2.0**-53
    shift = tl.where(shift > SHIFT, shift, SHIFT)
    places, blocks = tl.arange(0, SIDE), tl.cdiv(k, SIDE)
    for i in range(blocks):
        rows = i * SIDE + places
        square = tl.load(gram + rows * (k + 1), mask=rows < k, other=1.0)
        absent = square <= SMALLEST  # a NaN is not
        tl.store(lengths + rows, tl.where(absent, 0.0, 1.0 / tl.sqrt(tl.where(absent, 1.0, square))), mask=rows < k)
    tl.debug_barrier()
    for i in range(blocks):
        rows = i * SIDE + places
        left = tl.load(lengths + rows, mask=rows < k, other=0.0)
        for j in range(blocks):
            columns = j * SIDE + places
            where, same = rows[:, None] * k + columns[None, :], rows[:, None] == columns[None, :]
            inside = (rows < k)[:, None] & (columns < k)[None, :]
            if j <= i:
                right = tl.load(lengths + columns, mask=columns < k, other=0.0)
                unit = tl.load(gram + where, mask=inside, other=0.0) * left[:, None] * right[None, :]
                # A NaN stays one.
                tl.store(gram + where, tl.where(same, unit * 0.0 + 1.0 + shift, unit), mask=inside)
            tl.store(out + where, tl.where(same, left[:, None], 0.0), mask=inside)
    tl.debug_barrier()
    for j in range(blocks):
        pivots = j * SIDE + places
        at_pivots = (pivots < k)[:, None] & (pivots < k)[None, :]
        block = tl.load(gram + pivots[:, None] * k + pivots[None, :], mask=at_pivots, other=0.0)
        inverse = eliminated(block, tl.minimum(SIDE, k - j * SIDE), shift, SIDE)
        for p in range(j + 1):
            columns = p * SIDE + places
            inside, where = (pivots < k)[:, None] & (columns < k)[None, :], pivots[:, None] * k + columns[None, :]
            made = tl.load(out + where, mask=inside, other=0.0)
            tl.store(out + where, tl.dot(inverse, made, input_precision="ieee", out_dtype=tl.float64), mask=inside)
        for i in range(j + 1, blocks):
            rows = i * SIDE + places
            inside, where = (rows < k)[:, None] & (pivots < k)[None, :], rows[:, None] * k + pivots[None, :]
            below = tl.load(gram + where, mask=inside, other=0.0)
            factor = tl.dot(below, tl.trans(inverse), input_precision="ieee", out_dtype=tl.float64)
            tl.store(gram + where, factor, mask=inside)
        tl.debug_barrier()
        for i in range(j + 1, blocks):
            rows = i * SIDE + places
            inside = (rows < k)[:, None] & (pivots < k)[None, :]
            factor = -tl.load(gram + rows[:, None] * k + pivots[None, :], mask=inside, other=0.0)
            # Two loops and no pointer that is one or the other: Triton 3.6.0 cannot compile that for AMD.
            for p in range(j + 1):  # out_ip −= L_ij out_jp
                columns = p * SIDE + places
                there = (pivots < k)[:, None] & (columns < k)[None, :]
                made = tl.load(out + pivots[:, None] * k + columns[None, :], mask=there, other=0.0)
                add_product(out, rows, columns, k, factor, made)
            for p in range(j + 1, i + 1):  # gram_ip −= L_ij L_pjᵀ
                columns = p * SIDE + places
                there = (pivots < k)[:, None] & (columns < k)[None, :]
                of_pivots = tl.load(gram + columns[None, :] * k + pivots[:, None], mask=there, other=0.0)
                add_product(gram, rows, columns, k, factor, of_pivots)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["m", "n", "rank", "count", "left_stride", "right_stride", "tiles"])
def factor_products_kernel(
    left,
    right,
    partial,
    m,
    n,
    rank,
    count,
    left_stride,
    right_stride,
    tiles,
    ALIGNED: tl.constexpr,
    SIDE: tl.constexpr,
    INNER: tl.constexpr,
):
    """partial[l, i, j, tile] = Σ over a tile of (left_i left_jᵀ) ∘ (right_i right_jᵀ), float64, and [l, j, i, tile].

    left (L, N, rank, m), right (L, N, rank, n); a tile is SIDE components of i by as many of j.
    """
    tensor = tl.program_id(1).to(tl.int64)
    tile, pair = tl.program_id(0) % (tiles * tiles), tl.program_id(0) // (tiles * tiles)
    i, j = lower_tile(pair)
    left_stride, right_stride = known_multiple(left_stride, 16), known_multiple(right_stride, 16)
    if ALIGNED:
        m, n = known_multiple(m, 4), known_multiple(n, 4)
    rows, columns = tile // tiles * SIDE + tl.arange(0, SIDE), tile % tiles * SIDE + tl.arange(0, SIDE)
    of_rows, of_columns = (tensor * count + i) * rank + rows[:, None], (tensor * count + j) * rank + columns[:, None]
    lefts, rights = tl.zeros((SIDE, SIDE), tl.float64), tl.zeros((SIDE, SIDE), tl.float64)
    for start in range(0, m, INNER):
        depth = (start + tl.arange(0, INNER))[None, :]
        here, there = (rows < rank)[:, None] & (depth < m), (columns < rank)[:, None] & (depth < m)
        a = tl.load(left + of_rows * left_stride + depth, mask=here, other=0.0).to(tl.float64)
        b = tl.load(left + of_columns * left_stride + depth, mask=there, other=0.0).to(tl.float64)
        lefts = tl.dot(a, tl.trans(b), lefts, input_precision="ieee", out_dtype=tl.float64)
    for start in range(0, n, INNER):
        depth = (start + tl.arange(0, INNER))[None, :]
        here, there = (rows < rank)[:, None] & (depth < n), (columns < rank)[:, None] & (depth < n)
        a = tl.load(right + of_rows * right_stride + depth, mask=here, other=0.0).to(tl.float64)
        b = tl.load(right + of_columns * right_stride + depth, mask=there, other=0.0).to(tl.float64)
        rights = tl.dot(a, tl.trans(b), rights, input_precision="ieee", out_dtype=tl.float64)
    total = tl.sum(tl.sum(lefts * rights, axis=1), axis=0)
    of_tensor = partial + tensor * count * count * tiles * tiles + tile
    tl.store(of_tensor + (i * count + j) * tiles * tiles, total)
    tl.store(of_tensor + (j * count + i) * tiles * tiles, total)


@triton.jit(do_not_specialize=["row_tiles", "column_tiles"])
def triangular_product_kernel(
    triangle,
    vectors,
    out,
    sorts,
    row_tiles,
    column_tiles,
    SORT: tl.constexpr,
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[b] = SCALE · triangle[b] vectors[b]: (k, k) lower triangular times (k, length); what is zero is not read."""
    column_tile, rest = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    row_tile = rest % row_tiles
    block, k, length, of_vectors, of_squares, _, _ = sort_of(sorts, (rest // row_tiles).to(tl.int64), SORT)
    stride, of_vectors = row_stride(length), known_multiple(of_vectors, 16)
    vectors, out, triangle = vectors + of_vectors, out + of_vectors, triangle + of_squares
    if ALIGNED:
        length = known_multiple(length, 4)
    k = tl.where(column_tile * COLUMNS < length, k, 0)  # others of the launch have more tiles
    rows, columns = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, tl.where(row_tile * ROWS < k, tl.minimum(k, (row_tile + 1) * ROWS), 0), INNER):
        depth = start + tl.arange(0, INNER)
        inside = (rows < k)[:, None] & (depth < k)[None, :]
        left = tl.load(triangle + (block * k + rows[:, None]) * k + depth[None, :], mask=inside, other=0.0)
        inside = (depth < k)[:, None] & (columns < length)[None, :]
        right = tl.load(vectors + (block * k + depth[:, None]) * stride + columns[None, :], mask=inside, other=0.0)
        total = tl.dot(left.to(COMPUTE), right, total, input_precision=PRECISION, out_dtype=COMPUTE)
    inside = (rows < k)[:, None] & (columns < length)[None, :]
    total = (total * SCALE).to(out.dtype.element_ty)
    tl.store(out + (block * k + rows[:, None]) * stride + columns[None, :], total, mask=inside)


def orthonormalize(y: Tensor, *, overwrite: bool = False) -> Tensor:
    """(…, m, k), a transposed view of rows; see :func:`r2m_kernels.ops.orthonormalize`."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    if y.numel() == 0:
        return y.to(dtype, copy=True)
    leading, (m, k) = y.shape[:-2], y.shape[-2:]
    rows = y.to(dtype).transpose(-1, -2).reshape(-1, k, m)
    return orthonormal_rows(rows).reshape(*leading, k, m).transpose(-1, -2)


class Blocks:
    """How blocks of vectors of several sorts lie in one piece of memory, one sort after another.

    Attributes:
        sorts: (how many, k, their length) of each.
        table: (sorts, SORT) int64 on the device: the number of blocks up to its last one, k, the length, and where its
            vectors, their k × k numbers and their k numbers start.
        starts: where the vectors of each start.
    """

    def __init__(self, sorts: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self.sorts, self.device, rows = sorts, device, []
        self.count = self._vectors = self._squares = self._rows = self.padded_squares = 0
        for count, k, length in sorts:
            self.count += count
            starts = self._vectors, self._squares, self._rows, self.padded_squares
            rows.append([self.count, k, length, *starts])
            self._vectors += count * k * padded(length)
            self._squares += count * k * k
            self._rows += count * k
            self.padded_squares += count * k * padded(k)
        self.table = torch.tensor(rows).to(device, non_blocking=True)
        self.starts = [row[3] for row in rows]

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """Memory for all vectors."""
        return torch.empty(self._vectors, dtype=dtype, device=self.device)

    def of_sorts(self, vectors: Tensor) -> list[Tensor]:
        """Each sort's, (B, k, length), rows as :func:`.blocks.empty_rows` lays them."""
        return [
            vectors.as_strided((count, k, length), (k * padded(length), padded(length), 1), start)
            for (count, k, length), start in zip(self.sorts, self.starts, strict=True)
        ]

    def grams(self, vectors: Tensor) -> Tensor:
        """The k × k Gram matrices of all blocks, one after another, float64; a block's numbers are its own."""
        config = launch.vectors_gram(launch.target_of(self.device), self._aligned)
        gram = torch.empty(self._squares, dtype=torch.float64, device=self.device)
        tiles = self.tiles(1, config.rows)
        pairs = tiles * (tiles + 1) // 2
        launch.start(
            vectors_gram_kernel,
            (pairs * self.count,),
            config,
            vectors,
            gram,
            self.table,
            pairs,
            SORT=SORT,
            ALIGNED=config.aligned,
            SIDE=config.rows,
            INNER=config.inner,
        )
        return gram

    def last_on_diagonal(self, squares: Tensor, count: int) -> Tensor:
        """The smallest of the last ``count`` numbers on the diagonal of each k × k matrix, or of all k: (blocks,)."""
        smallest, start = [], 0
        for blocks, k, _ in self.sorts:
            some = min(k, count)
            ends = squares.as_strided((blocks, some), (k * k, k + 1), start + (k - some) * (k + 1))
            smallest.append(ends.amin(dim=1))
            start += blocks * k * k
        return torch.cat(smallest)

    def orthonormal(
        self,
        vectors: Tensor,
        passes: int,
        operand: torch.dtype | None = None,
        triangles: list[Tensor] | None = None,
    ) -> Tensor:
        """Orthonormal rows spanning those of every block; rows left with nothing are zero.

        One pass is enough where only the span matters: what rounding leaves is that of vectors of the same condition.

        Args:
            vectors: float32 or float64, as :meth:`vectors`.
            passes: of CholeskyQR.
            operand: what the result becomes that is multiplied next; float16 times :data:`SCALE`.
            triangles: takes the inverse factor of each pass. What of row j the rows before it do not have is as long
                as 1 / its number (j, j), in the first.
        """
        # Rows this short count as zero: their reciprocal length would overflow the vectors' type.
        smallest = (1e3 * torch.finfo(vectors.dtype).tiny) ** 2
        for index in range(passes):
            triangle = self._inverse_factors(self.grams(vectors), smallest)
            if triangles is not None:
                triangles.append(triangle)
            vectors = self._triangular_products(triangle, vectors, operand if index == passes - 1 else None)
        return vectors

    def _inverse_factors(self, gram: Tensor, smallest: float) -> Tensor:
        """T with T G Tᵀ = I, lower triangular; the Gram matrices are overwritten."""
        out, config = torch.empty_like(gram), launch.inverse_factor()
        launch.start(
            inverse_factor_kernel,
            (self.count,),
            config,
            gram,
            torch.empty(self._rows, dtype=torch.float64, device=gram.device),
            out,
            self.table,
            SORT=SORT,
            SHIFT=RELATIVE_SHIFT,
            SMALLEST=smallest,
            SIDE=config.block,
        )
        return out

    def _triangular_products(self, triangle: Tensor, vectors: Tensor, operand: torch.dtype | None) -> Tensor:
        config = launch.triangular_product(launch.target_of(self.device), vectors.dtype, self._aligned)
        out = self.vectors(operand or vectors.dtype)
        row_tiles, column_tiles = self.tiles(1, config.rows), self.tiles(2, config.columns)
        launch.start(
            triangular_product_kernel,
            (row_tiles * column_tiles * self.count,),
            config,
            triangle,
            vectors,
            out,
            self.table,
            row_tiles,
            column_tiles,
            SORT=SORT,
            SCALE=SCALE if out.dtype == torch.float16 else 1.0,
            COMPUTE=ELEMENT_TYPES[vectors.dtype],
            PRECISION=config.input_precision,
            ALIGNED=config.aligned,
            ROWS=config.rows,
            COLUMNS=config.columns,
            INNER=config.inner,
        )
        return out

    @property
    def _aligned(self) -> bool:
        return all(vectors_fit(length) for _, _, length in self.sorts)

    def tiles(self, field: int, size: int) -> int:
        """Of the largest k (1) or length (2)."""
        return -(-max(sort[field] for sort in self.sorts) // size)


def orthonormal_rows(vectors: Tensor) -> Tensor:
    """:meth:`Blocks.orthonormal` of one sort, twice: (B, k, length) → the same."""
    blocks = Blocks([(len(vectors), vectors.shape[1], vectors.shape[2])], vectors.device)
    return blocks.of_sorts(blocks.orthonormal(padded_rows(vectors), passes=2))[0]


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over (left_i left_jᵀ) ∘ (right_i right_jᵀ), for rows (L, N, r, m) and (L, N, r, n): (L, N, N) float64."""
    (size, count, rank, m), n = left.shape, right.shape[-1]
    left, right = padded_rows(left), padded_rows(right)
    config = launch.factor_products(launch.target_of(left.device), vectors_fit(m) and vectors_fit(n))
    tiles = -(-rank // config.rows)
    partial = torch.empty(size, count, count, tiles * tiles, dtype=torch.float64, device=left.device)
    launch.start(
        factor_products_kernel,
        (count * (count + 1) // 2 * tiles * tiles, size),
        config,
        left,
        right,
        partial,
        m,
        n,
        rank,
        count,
        left.stride(-2),
        right.stride(-2),
        tiles,
        ALIGNED=config.aligned,
        SIDE=config.rows,
        INNER=config.inner,
    )
    return sum_tiles(partial)


def vectors_gram(vectors: Tensor) -> Tensor:
    """(B, k, length), rows as :func:`padded_rows` lays them: (B, k, k) float64, a block's numbers its own."""
    count, k, length = vectors.shape
    return Blocks([(count, k, length)], vectors.device).grams(vectors).view(count, k, k)
