"""What one step of a merge costs on a GPU: counts from shapes and the launch plan, for :mod:`bench.cost_model`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace

import torch

from bench.chips import Chip, Kind
from r2m_kernels._stream.blocks import padded
from r2m_kernels._triton import launch, residuals
from r2m_kernels._triton.combine import ROWS_OF_A_TILE
from r2m_kernels._triton.task_gram import BLOCK_OF_EXPERTS

# Sketches and factors are float32 whatever the inputs are, float16 what goes from one product to the next, and bfloat16
# factors that are rounded; Gram matrices and partial sums are float64.
FACTOR_BYTES, HALF_BYTES, SUM_BYTES = 4, 2, 8
# A kernel's start and end, when few of its programs run: what small groups take longer than the roofs say on an H200.
START = 6e-6


@dataclass(frozen=True)
class Job:
    """How a merge is launched: for N ``experts`` and a target, in inputs of one dtype (merged alike)."""

    experts: int
    dtype: torch.dtype = torch.float32
    target: str = "sm_90"
    aligned: bool = True  # rows that are whole 16-byte vectors
    unread: int = 0  # experts with core coefficient 0, of which the combination reads nothing but factors

    def __str__(self) -> str:
        return f"N={self.experts} {str(self.dtype).removeprefix('torch.')}"

    def product(self) -> launch.MatmulConfig:
        """Of a product with residuals that are not kept, in full precision."""
        precision = launch.full_precision(self.target)
        return launch.residual_matmul(self.target, torch.float32, precision, self.aligned, self.experts)

    def plane(self, elements: int) -> int:
        """Bytes of as many elements of θ₀, or of one expert."""
        return elements * self.dtype.itemsize


@dataclass(frozen=True)
class StepCost:
    """Counts of one step, over all tensors."""

    step: str
    kind: Kind  # of the flops
    flops: int = 0  # of the mathematics, 2 a multiply-add; of Gram matrices of residuals what their large tiles do
    bytes_read: int = 0  # compulsory
    bytes_written: int = 0
    input_bytes: int = 0  # the part of bytes_read that is checkpoints
    fetched_bytes: int = 0  # the same, as often as programs fetch it
    loaded_bytes: int = 0  # of everything, as often as load instructions ask for it
    launches: int = 0  # a batched library call counts as one
    link_bytes: int = 0  # over the host link

    @property
    def reread_factor(self) -> float:
        """How often programs fetch an input, on average; 1 where none is."""
        return self.fetched_bytes / self.input_bytes if self.input_bytes else 1.0

    def floor_seconds(self, chip: Chip, *, cached: bool = True) -> float:
        """The slowest resource; not ``cached``: what is fetched again comes from memory."""
        read = self.bytes_read + (0 if cached else self.fetched_bytes - self.input_bytes)
        arithmetic = self.flops / chip.rate(self.kind) if self.flops else 0.0
        memory = (read + self.bytes_written) / chip.bandwidth
        cache = self.loaded_bytes / chip.l2 if chip.l2 else 0.0
        return max(memory, cache, arithmetic, self.link_bytes / chip.host_link)

    def predicted_seconds(self, chip: Chip) -> float:
        """The floor, and the start of each kernel."""
        return self.floor_seconds(chip) + START * self.launches

    def plus(self, other: StepCost) -> StepCost:
        """The same step over more tensors; launches add up."""
        if (self.step, self.kind) != (other.step, other.kind):
            raise ValueError(f"{self.step} ({self.kind}) and {other.step} ({other.kind}) are different steps")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _COUNTS})

    def times(self, repeats: int) -> StepCost:
        """The same step run ``repeats`` times."""
        return replace(self, **{name: getattr(self, name) * repeats for name in _COUNTS})


_COUNTS = tuple(field.name for field in fields(StepCost) if field.name not in ("step", "kind"))


def _kind(config: launch.MatmulConfig) -> Kind:
    return "fp32" if config.precision == "ieee" else config.precision


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def task_gram_cost(elements: int, tensors: int, job: Job) -> StepCost:
    """``tensors`` of one size. Beyond four experts a program serves a pair of blocks of four and fetches both.

    One that serves a block and itself loads it twice then.
    """
    config = launch.task_gram(job.target, job.dtype, job.experts, job.aligned)
    sums = (job.experts**2 + 1) * SUM_BYTES * tensors  # the last is of the base
    partial_sums = sums * _tiles(elements, config.steps * config.block)
    return _gram_of_tasks("task Gram", tensors * elements, partial_sums, partial_sums + sums, job)


def row_grams_cost(m: int, n: int, tensors: int, job: Job) -> StepCost:
    """The same row by row, of the pairs of experts alone; sums over rows as well."""
    rows = (job.experts * (job.experts + 1) // 2 + 1) * tensors * SUM_BYTES
    return _gram_of_tasks("Gram of rows", tensors * m * n, rows * m, rows * (m + 1), job)


def _gram_of_tasks(step: str, elements: int, partial_sums: int, written: int, job: Job) -> StepCost:
    """From one read of the inputs; partial sums are read again."""
    blocks = [min(BLOCK_OF_EXPERTS, job.experts - first) for first in range(0, job.experts, BLOCK_OF_EXPERTS)]
    pairs = [(row, column) for row in range(len(blocks)) for column in range(row + 1)]
    plane = job.plane(elements)
    inputs, fetched = (job.experts + 1) * plane, 0
    for row, column in pairs:
        fetched += plane * (1 + blocks[row] + (blocks[column] if row != column else 0))
    flops, diagonal = elements * job.experts * (job.experts + 1), job.aligned and len(blocks) == 1
    loaded = fetched + (0 if diagonal else job.experts * plane) + partial_sums
    return StepCost(step, "fp64", flops, inputs + partial_sums, written, inputs, fetched, loaded, launches=2)


def residual_matmul_cost(step: str, m: int, n: int, tensors: int, k: int, job: Job, transpose: bool) -> StepCost:
    """X, or Xᵀ, times k columns for every expert, in full precision, no residual kept."""
    config = job.product()
    outer, inner = (n, m) if transpose else (m, n)
    row_tiles, column_tiles = _tiles(outer, config.rows), _tiles(k, config.columns)
    times = _tiles(job.experts, config.experts) * column_tiles  # that a tile of the inputs is read
    inputs = (job.experts + 1) * job.plane(m * n * tensors)
    column = job.experts * k * tensors * FACTOR_BYTES  # of all vectors of length 1
    read, loaded = inputs + column * inner, inputs * times + column * inner * row_tiles
    flops, written = 2 * m * n * k * job.experts * tensors, column * outer
    return StepCost(step, _kind(config), flops, read, written, inputs, inputs * times, loaded, launches=1)


def form_residuals_cost(m: int, n: int, tensors: int, job: Job) -> StepCost:
    """Every residual as float16; the inputs are fetched again for every block of experts."""
    inputs, times = (job.experts + 1) * job.plane(m * n * tensors), _tiles(job.experts, residuals.EXPERTS)
    written = job.experts * m * n * tensors * HALF_BYTES
    return StepCost("form residuals", "fp32", 0, inputs, written, inputs, inputs * times, inputs * times, launches=1)


def residual_gram_cost(m: int, n: int, tensors: int, job: Job) -> StepCost:
    """K = AᵀA of residuals that are kept: tiles on or below the diagonal, each written on its other side too."""
    config, blocks = launch.residual_gram(job.target), job.experts * tensors
    long, short = max(m, n), min(m, n)
    tiles = [(row, column) for row in range(0, short, config.rows) for column in range(0, row + 1, config.columns)]
    sides = sum(min(config.rows, short - row) + min(config.columns, short - column) for row, column in tiles)
    flops = 2 * blocks * long * len(tiles) * config.rows * config.columns
    read, written, loaded = (blocks * side * HALF_BYTES for side in (long * short, short * short, sides * long))
    return StepCost("Gram K = AᵀA", _kind(config), flops, read, written, loaded_bytes=loaded, launches=1)


def residual_product_cost(
    step: str,
    m: int,
    n: int,
    tensors: int,
    k: int,
    job: Job,
    across: bool,
    signs: bool = False,
    last: bool = False,
    by_gram: bool = False,
    paired: bool = False,
) -> StepCost:
    """Vectors times a matrix that is kept, onto its long side, or ``across``; the ``last`` product is a factor.

    Random ``signs`` are made in registers; other vectors come as float16, and go so onto the long side, but the last.
    On the road ``by_gram`` the last basis comes and the sketch goes as float16, too; ``paired`` with what they become,
    vectors are read once more.
    """
    # What pairs are summed with takes registers that a wide tile has not.
    config = launch.residual_product(job.target, torch.float32, job.aligned, k if last or not by_gram else 0)
    long, short = max(m, n), min(m, n)
    outer, inner = (short, long) if across else (long, short)
    row_tiles, column_tiles = _tiles(k, config.rows), _tiles(outer, config.columns)
    column = job.experts * k * tensors  # numbers of all vectors of length 1
    kept = job.experts * m * n * tensors * HALF_BYTES
    come = 0 if signs else column * inner * (FACTOR_BYTES if last and not by_gram else HALF_BYTES)
    again = column * outer * HALF_BYTES if paired or (across and not signs) else 0
    squares = 0 if across else job.experts * tensors * row_tiles * column_tiles * SUM_BYTES
    # What is paired are the vectors themselves.
    read, loaded = kept + come + (0 if paired else again), kept * row_tiles + come * column_tiles + again
    written = column * outer * (FACTOR_BYTES if last or (across and not by_gram) else HALF_BYTES) + squares
    flops = 2 * m * n * k * job.experts * tensors
    return StepCost(step, _kind(config), flops, read, written, loaded_bytes=loaded, launches=1)


def shifts_cost(short: int, tensors: int, k: int, job: Job) -> StepCost:
    """What a step's basis leaves out of every residual, from the sums of its product's tiles."""
    config, blocks = launch.residual_product(job.target, torch.float32, job.aligned, 0), job.experts * tensors
    sums = blocks * _tiles(k, config.rows) * _tiles(short, config.columns) * SUM_BYTES
    return StepCost("steps: shifts", "fp64", 0, sums, blocks * FACTOR_BYTES, loaded_bytes=sums, launches=1)


def vectors_gram_cost(step: str, k: int, length: int, blocks: int, job: Job) -> StepCost:
    """Gram matrices of blocks of k rows, float64, half of each computed."""
    read, written = blocks * k * length * FACTOR_BYTES, blocks * k * k * SUM_BYTES
    # Every row meets every tile of the lower triangle in its own row and column of tiles.
    loaded = read * (_tiles(k, launch.vectors_gram(job.target, job.aligned).rows) + 1)
    return StepCost(step, "fp64 dot", blocks * length * k * k, read, written, loaded_bytes=loaded, launches=1)


@functools.cache
def _eliminated(k: int) -> int:
    """Numbers that the elimination of a k × k matrix by blocks loads, of the matrix and of what becomes its factor."""
    block = launch.inverse_factor().block
    sides = [min(block, k - first) for first in range(0, k, block)]
    loads = k + sum(sides[i] * sides[j] for i in range(len(sides)) for j in range(i + 1))
    for j, pivots in enumerate(sides):
        loads += pivots * pivots + sum(pivots * side for side in sides[: j + 1])
        for i in range(j + 1, len(sides)):
            loads += 2 * sides[i] * pivots + sum((sides[i] + pivots) * side for side in sides[: i + 1])
    return loads


def orthonormalize_costs(
    k: int, length: int, blocks: int, job: Job, passes: int = 2, halves: int = 0
) -> list[StepCost]:
    """CholeskyQR of ``blocks`` of k rows: Gram matrices, inverse factors, products, of which ``halves`` are float16."""
    gram = vectors_gram_cost("orthonormalize: Gram", k, length, blocks, job)
    square, cubes = blocks * k * k * SUM_BYTES, 2 * blocks * k**3 // 3  # factor and inverse, a third each
    loaded = blocks * _eliminated(k) * SUM_BYTES
    factor = StepCost("orthonormalize: factor", "fp64", cubes, square, square, loaded_bytes=loaded, launches=1)
    config = launch.triangular_product(job.target, torch.float32, job.aligned)
    # A tile of rows meets the rows of the triangle up to its last one, in whole steps.
    starts = range(0, k, config.rows)
    depths = [min(k, _tiles(min(k, i + config.rows), config.inner) * config.inner) for i in starts]
    triangle = sum(min(config.rows, k - i) * depth for i, depth in zip(starts, depths, strict=True))
    read = gram.bytes_read + triangle * blocks * SUM_BYTES
    loaded = triangle * blocks * SUM_BYTES * _tiles(length, config.columns)
    loaded += sum(depths) * length * blocks * FACTOR_BYTES
    kind, written = _kind(config), gram.bytes_read
    product = StepCost("orthonormalize: product", kind, gram.flops, read, written, loaded_bytes=loaded, launches=1)
    written = passes * written - halves * blocks * k * length * (FACTOR_BYTES - HALF_BYTES)
    return [gram.times(passes), factor.times(passes), replace(product.times(passes), bytes_written=written)]


def unit_rows_cost(
    k: int, length: int, blocks: int, job: Job, vector_bytes: int = FACTOR_BYTES, subtracted: bool = False
) -> StepCost:
    """Rows divided by their lengths, and so rounded; ``subtracted`` others before that."""
    held = min(length, launch.unit_rows(job.target, job.aligned).block)
    each = vector_bytes + (HALF_BYTES if subtracted else 0)
    read, loaded = blocks * k * length * each, blocks * k * (2 * length - held) * each  # the rest for both loops
    written = blocks * k * padded(length) * HALF_BYTES
    flops = blocks * k * length * (5 if subtracted else 3)
    return StepCost("unit rows", "fp32", flops, read, written, loaded_bytes=loaded, launches=1)


@functools.cache
def _units_factor(k: int, rows: int, side: int) -> int:
    """Numbers that an inverse factor loads: ``side`` columns at a time, each for ``rows`` rows after others."""
    width, loads = padded(k), 0
    for made in range(0, k, side):
        own, columns = min(side, k - made), min(side, width - made)
        loads += own * columns + own * made
        for top in range(0, made, rows):  # above: no block of L
            for start in range(top, made, side):
                loads += (min(rows, min(start + side, made) - top) + own) * side
        for top in range(made + side, k, rows):
            loads += min(rows, k - top) * (made + columns) + own * made
    return loads


def quick_orthonormalize_costs(
    k: int, length: int, blocks: int, job: Job, passes: int = 2, wholes: int = 1
) -> list[StepCost]:
    """The same of unit rows in float16, and sums in float32; ``wholes`` of the results are written in float32 too."""
    stride, width = padded(length), padded(k)
    units, products = blocks * k * stride * HALF_BYTES, blocks * length * k * k
    config = launch.units_gram(job.target)
    loaded = units * (_tiles(k, config.rows) + 1)
    starts = range(0, k, config.rows)
    lower = sum((k - i) * min(config.rows, width - i) for i in starts) * blocks * FACTOR_BYTES
    gram = StepCost("units: Gram", _kind(config), products, units, lower, loaded_bytes=loaded, launches=1)

    config = launch.units_factor(job.target)
    side, cubes = config.columns, 2 * blocks * k**3 // 3
    lower = sum((k - i) * min(side, width - i) for i in range(0, k, side)) * blocks * FACTOR_BYTES
    loaded = blocks * _units_factor(k, config.rows, side) * FACTOR_BYTES
    triangle = sum(min(side, k - i) * (i + min(side, width - i)) + i * min(side, width - i) for i in range(0, k, side))
    written = blocks * (k * width * FACTOR_BYTES + triangle * HALF_BYTES)
    factor = StepCost("units: factor", _kind(config), cubes, lower, written, loaded_bytes=loaded, launches=1)

    config, triangle, depths = launch.units_product(job.target), 0, 0
    for i in range(0, k, config.rows):  # a tile of rows meets those up to its last one, in whole steps
        depth = _tiles(min(k, i + config.rows), config.inner) * config.inner
        triangle, depths = triangle + min(config.rows, k - i) * min(depth, width), depths + min(depth, k)
    triangle *= blocks * HALF_BYTES
    loaded = triangle * _tiles(length, config.columns) + (depths + k) * stride * blocks * HALF_BYTES
    product = StepCost(
        "units: product", _kind(config), products, units + triangle, units, loaded_bytes=loaded, launches=1
    ).times(passes)
    whole = wholes * blocks * k * stride * FACTOR_BYTES
    return [gram.times(passes), factor.times(passes), replace(product, bytes_written=product.bytes_written + whole)]


def inner_products_cost(m: int, n: int, tensors: int, rank: int, job: Job) -> StepCost:
    """⟨F_i, F_j⟩ of half of the pairs, from the products of their components on both sides; no Gram is stored."""
    pairs, vectors = job.experts * (job.experts + 1) // 2, job.experts * tensors * rank * (m + n) * FACTOR_BYTES
    total = tensors * job.experts**2 * SUM_BYTES
    across = _tiles(rank, launch.factor_products(job.target, job.aligned).rows)
    sums, flops = total * across**2, 2 * pairs * tensors * rank**2 * (m + n)
    # An expert meets every one, itself twice, in as many tiles of components as there are.
    loaded = (job.experts + 1) * across * vectors + sums
    return StepCost("inner products", "fp64 dot", flops, vectors + sums, sums + total, loaded_bytes=loaded, launches=2)


def weigh_rows_costs(m: int, n: int, tensors: int, rank: int, job: Job, rounded: bool = False) -> list[StepCost]:
    """Lengths of rows, where right factors are the orthonormal ones those of left ones; then these, weighed."""
    side, blocks = launch.inverse_factor().block, job.experts * tensors
    lefts, found = blocks * rank * m * FACTOR_BYTES, blocks * m * SUM_BYTES
    if n <= m:
        flops = 2 * blocks * rank * m
        costs = [StepCost("weigh rows: lengths", "fp64", flops, lefts, found, loaded_bytes=lefts, launches=1)]
    else:
        gram = vectors_gram_cost("weigh rows: Gram", rank, n, blocks, job)
        flops, read = 2 * blocks * rank**2 * m, lefts + gram.bytes_written
        loaded = (1 + _tiles(rank, side)) * lefts + gram.bytes_written * _tiles(m, side)
        mixed = StepCost("weigh rows: lengths by Gram", "fp64 dot", flops, read, found, loaded_bytes=loaded, launches=1)
        costs = [gram, mixed]
    # Shares are written twice and read twice in between.
    read, loaded = lefts + found, lefts + 3 * found
    written = blocks * rank * m * (HALF_BYTES if rounded else FACTOR_BYTES) + 2 * found
    return [*costs, StepCost("weigh rows", "fp32", blocks * rank * m, read, written, loaded_bytes=loaded, launches=1)]


def round_factors_cost(n: int, tensors: int, rank: int, job: Job) -> StepCost:
    """Right factors, by PyTorch; left ones are rounded where their rows are weighed."""
    numbers = job.experts * tensors * rank * n
    read, written = numbers * FACTOR_BYTES, numbers * HALF_BYTES
    return StepCost("round right factors", "fp32", 0, read, written, loaded_bytes=read, launches=1)


def combine_matrix_cost(m: int, n: int, tensors: int, rank: int, job: Job, rounded: bool = False) -> StepCost:
    """Merged matrices; every factor is read once a tile of the other side, in whole vectors of those in bfloat16."""
    inputs = (job.experts + 1 - job.unread) * job.plane(m * n * tensors)
    # Bytes of all factors of one column.
    column = job.experts * tensors * rank * (HALF_BYTES if rounded else FACTOR_BYTES)
    if rounded:
        config = launch.combine_rounded(job.target, job.aligned, job.experts)
        lefts, rights = (8 * _tiles(side, 8) for side in (m, n))
    else:
        config, lefts, rights = launch.combine_matrix(job.target, torch.float32, job.aligned), m, n
    flops = 2 * m * n * rank * job.experts * tensors
    read, written = inputs + column * (m + n), job.plane(m * n * tensors)
    loaded = inputs + column * (lefts * _tiles(n, config.columns) + rights * _tiles(m, config.rows))
    return StepCost("combine: matrices", _kind(config), flops, read, written, inputs, inputs, loaded, launches=1)


def row_coefficients_cost(m: int, tensors: int, job: Job) -> StepCost:
    """Shares of rows, from their Gram matrices; they are written twice, and read again for each of the experts."""
    grams, found = (job.experts * rest * tensors * m * SUM_BYTES // 2 for rest in (job.experts + 1, 2))
    written, loaded = 2 * found + found * FACTOR_BYTES // SUM_BYTES, job.experts * grams + (1 + job.experts) * found
    return StepCost("coefficients of rows", "fp64", 0, grams, written, loaded_bytes=loaded, launches=1)


def combine_rows_cost(m: int, n: int, tensors: int, job: Job) -> StepCost:
    """Merged matrices of whole residuals, with coefficients for every row; each tile reads those of its rows."""
    config, rows = launch.combine_vector(job.target, job.aligned), ROWS_OF_A_TILE
    plane = job.plane(m * n * tensors)
    inputs, coefficients = (job.experts + 1) * plane, job.experts * tensors * FACTOR_BYTES
    loaded = inputs + coefficients * rows * _tiles(m, rows) * _tiles(n, config.block // rows)
    read, flops = inputs + coefficients * m, 3 * m * n * tensors * job.experts
    return StepCost("combine: rows", "fp32", flops, read, plane, inputs, inputs, loaded, launches=1)


def combine_vector_cost(elements: int, tensors: int, job: Job) -> StepCost:
    """Merged vectors: a difference and a multiply-add an element and expert."""
    plane, read = job.plane(elements * tensors), job.experts - job.unread
    inputs, flops = (read + 1) * plane, 3 * elements * tensors * read
    return StepCost("combine: vectors", "fp32", flops, inputs, plane, inputs, inputs, inputs, launches=1)
