"""What a merge costs on a GPU, as counts and floors: bytes, flops and launches of every step (README §§2–6).

Counts follow from shapes and the launch plan; a floor is the time of the slowest resource, busy at its datasheet's rate
throughout. Both are predictions: nothing here is measured, and nothing here touches a device.

``bytes_read`` is compulsory: every distinct byte once, as if caches were perfect. ``fetched_bytes`` is what programs
fetch of the inputs: each reads a byte once, but several may want the same one, which the L2 cache then usually has.
``loads_bytes`` is all that load instructions move, factors and partial sums included, addresses and coefficients not.

Matrices are taken to be aligned and sketched; arithmetic beside the loads (mixing, differences) is not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

Kind = Literal["fp64", "fp32", "tf32", "tf32x3", "bf16"]
# A product with a residual: as it is, with random signs made in registers, less the shift, or in full precision.
Variant = Literal["fast", "signs", "shifted", "full"]

# Sketches, bases and factors are float32 whatever the inputs are; Gram matrices and partial sums are float64.
FACTOR_BYTES = 4
SUM_BYTES = 8
BLOCK_OF_EXPERTS = 4
UNROLLED_INPUTS = 3
GRAM_ENTRIES = BLOCK_OF_EXPERTS**2  # that a program of the task Gram leaves, needed or not


@dataclass(frozen=True)
class Chip:
    """A GPU by its datasheet: B/s, and flop/s at dense rates, without sparsity."""

    name: str
    bandwidth: float  # of device memory
    fp64: float  # vector units; matrix units may do float64 products up to twice as fast
    fp32: float  # products as Triton compiles "ieee": vector units on NVIDIA, matrix units on AMD
    tf32: float | None  # None where tl.dot has none
    bf16: float
    host_link: float  # in one direction
    target: str  # its entry in _triton/launch.json

    def rate(self, kind: Kind) -> float:
        """Flop/s for products of a kind, tf32x3 being three of tf32; ValueError where the chip has none."""
        if kind in ("tf32", "tf32x3"):
            if self.tf32 is None:
                raise ValueError(f"{self.name} has no {kind} products: plan with kinds that it has")
            return self.tf32 / (3 if kind == "tf32x3" else 1)
        return {"fp64": self.fp64, "fp32": self.fp32, "bf16": self.bf16}[kind]


# NVIDIA prints matrix rates with sparsity and PCIe in both directions; both are halved here.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 2.039e12, 9.7e12, 19.5e12, 156e12, 312e12, 32e9, "sm_80"),  # datasheet, A100 80GB SXM
        Chip("H100", 3.35e12, 34e12, 67e12, 494.5e12, 989.5e12, 64e9, "sm_90"),  # datasheet, H100 SXM
        Chip("H200", 4.8e12, 34e12, 67e12, 494.5e12, 989.5e12, 64e9, "sm_90"),  # datasheet, H200 SXM
        Chip("B200", 7.7e12, 37e12, 75e12, 1100e12, 2250e12, 64e9, "sm_100"),  # datasheet, column HGX B200
        Chip("MI300X", 5.3e12, 81.7e12, 163.4e12, None, 1307.4e12, 64e9, "gfx942"),  # datasheet, fp32 is matrix
    )
}


@dataclass(frozen=True)
class Model:
    """A checkpoint as shapes, each shape once."""

    name: str
    matrices: tuple[tuple[int, int, int], ...]  # m, n, how many
    vectors: tuple[tuple[int, int], ...] = ()  # elements, how many

    @classmethod
    def of(cls, name: str, shapes: Iterable[tuple[int, ...]]) -> Model:
        """From the shapes of all its tensors; two dimensions or more are a matrix, first dimension × the rest."""
        counted = Counter((s[0], math.prod(s[1:])) if len(s) > 1 else (math.prod(s),) for s in shapes)
        matrices = tuple((key[0], key[1], count) for key, count in counted.items() if len(key) == 2)
        return cls(name, matrices, tuple((key[0], count) for key, count in counted.items() if len(key) == 1))

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(m * n * count for m, n, count in self.matrices) + sum(size * count for size, count in self.vectors)


def _vit(name: str, layers: int, width: int, mlp: int, patch: int, tokens: int, projection: int) -> Model:
    """CLIP's vision tower: separate q, k, v and out, biases, a norm before and one after the layers."""
    layer: list[tuple[int, ...]] = [*[(width, width)] * 4, (mlp, width), (width, mlp), *[(width,)] * 9, (mlp,)]
    ends: list[tuple[int, ...]] = [(width, 3, patch, patch), (tokens, width), (projection, width), *[(width,)] * 5]
    return Model.of(name, layer * layers + ends)


def _llama(name: str, layers: int, width: int, mlp: int, vocabulary: int) -> Model:
    layer: list[tuple[int, ...]] = [*[(width, width)] * 4, *[(mlp, width)] * 2, (width, mlp), (width,), (width,)]
    return Model.of(name, [*layer * layers, (vocabulary, width), (vocabulary, width), (width,)])


MODELS = {
    model.name: model
    for model in (
        _vit("vit_b_16", layers=12, width=768, mlp=3072, patch=16, tokens=197, projection=512),
        _vit("vit_l_14", layers=24, width=1024, mlp=4096, patch=14, tokens=257, projection=768),
        _llama("7b", layers=32, width=4096, mlp=11008, vocabulary=32000),
    )
}


@dataclass(frozen=True)
class Tile:
    """What a program owns: ``rows`` × ``columns`` of the result of ``experts`` experts, ``inner`` of the sum a step."""

    rows: int
    columns: int
    inner: int
    experts: int = 1

    @property
    def flops(self) -> int:
        """Of one step of one expert."""
        return 2 * self.rows * self.columns * self.inner


@dataclass(frozen=True)
class Tiles:
    """A launch plan: tile sizes, and the precision of products. The defaults are those of float32 on an H100."""

    gram_elements: int = 8 * 512  # that a program of the task Gram sums
    fast: Tile = Tile(64, 128, 16, 3)  # products that only turn the subspace, N ≤ 3
    fast_many: Tile = Tile(64, 128, 32, 4)  # the same for N > 3
    full: Tile = Tile(16, 128, 32, 1)  # the final product, N ≤ 3
    full_many: Tile = Tile(32, 128, 32, 1)
    combine: Tile = Tile(32, 128, 16)
    vectors_gram: Tile = Tile(32, 32, 16)
    triangular: Tile = Tile(16, 256, 16)
    fast_kind: Kind = "tf32"  # with 32-bit inputs; 16-bit ones use bf16 everywhere
    full_kind: Kind = "tf32x3"  # of the final and the triangular product and the combination


@dataclass(frozen=True)
class Job:
    """What is merged and how."""

    experts: int
    dtype_bytes: int = 4  # of base, experts and merged model: 4 or 2
    tiles: Tiles = Tiles()
    unread: int = 0  # experts with core coefficient 0, of which the combination reads nothing but factors

    def product(self, full: bool) -> tuple[Tile, Kind]:
        """How products with residuals are launched."""
        tiles, many = self.tiles, self.experts > UNROLLED_INPUTS
        if full:
            return tiles.full_many if many else tiles.full, tiles.full_kind
        return tiles.fast_many if many else tiles.fast, tiles.fast_kind if self.dtype_bytes == 4 else "bf16"


@dataclass(frozen=True)
class StepCost:
    """Counts of one step, over all tensors."""

    step: str
    kind: Kind  # of the flops
    flops: int = 0  # of the mathematics, 2 a multiply-add
    padded_flops: int = 0  # of the tiles, edges and unused experts included
    bytes_read: int = 0  # compulsory
    bytes_written: int = 0
    input_bytes: int = 0  # the part of bytes_read that is checkpoints
    fetched_bytes: int = 0  # the same, as often as programs fetch it
    loads_bytes: int = 0  # all that load instructions move
    launches: int = 0  # a batched library call counts as one
    link_bytes: int = 0  # over the host link

    @property
    def reread_factor(self) -> float:
        """How often programs fetch an input, on average; 1 where none is."""
        return self.fetched_bytes / self.input_bytes if self.input_bytes else 1.0

    def floor_seconds(self, chip: Chip, *, cached: bool = True) -> float:
        """The slowest of memory, arithmetic and host link; not ``cached``: what is fetched again comes from memory."""
        read = self.bytes_read + (0 if cached else self.fetched_bytes - self.input_bytes)
        arithmetic = self.flops / chip.rate(self.kind) if self.flops else 0.0
        return max((read + self.bytes_written) / chip.bandwidth, arithmetic, self.link_bytes / chip.host_link)

    def plus(self, other: StepCost) -> StepCost:
        """The same step over more tensors; launches add up."""
        if (self.step, self.kind) != (other.step, other.kind):
            raise ValueError(f"{self.step} ({self.kind}) and {other.step} ({other.kind}) are different steps")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in _COUNTS})

    def times(self, repeats: int) -> StepCost:
        """The same step run ``repeats`` times."""
        return replace(self, **{name: getattr(self, name) * repeats for name in _COUNTS})


_COUNTS = tuple(field.name for field in fields(StepCost) if field.name not in ("step", "kind"))


def rank_of(rank: float | int, m: int, n: int) -> int:
    """The rank that truncation keeps: max(1, ⌈rank · min(m, n)⌉) for a ratio, at most min(m, n)."""
    return min(rank, m, n) if isinstance(rank, int) else max(1, math.ceil(rank * min(m, n) * (1 - 1e-12)))


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def task_gram_cost(elements: int, tensors: int, job: Job, *, aligned: bool = True) -> StepCost:
    """``tensors`` of one size. Beyond four experts a program serves a pair of blocks of four and fetches both."""
    blocks = [min(BLOCK_OF_EXPERTS, job.experts - first) for first in range(0, job.experts, BLOCK_OF_EXPERTS)]
    pairs = [(row, column) for row in range(len(blocks)) for column in range(row + 1)]
    alone = aligned and len(blocks) == 1
    plane = tensors * elements * job.dtype_bytes  # θ₀, or one expert
    fetched = plane * sum(1 + blocks[row] + (blocks[column] if row != column else 0) for row, column in pairs)
    # Only the variant for one pair knows that its two blocks are the same; the other loads them as two.
    loaded = fetched if alone else plane * sum(1 + blocks[row] + blocks[column] for row, column in pairs)
    products = BLOCK_OF_EXPERTS * (BLOCK_OF_EXPERTS + 1) // 2 if alone else GRAM_ENTRIES
    chunks, sums = _tiles(elements, job.tiles.gram_elements), GRAM_ENTRIES * SUM_BYTES * tensors * len(pairs)
    inputs, partial_sums = (job.experts + 1) * plane, sums * chunks
    flops = tensors * elements * job.experts * (job.experts + 1)
    padded = 2 * products * tensors * len(pairs) * chunks * job.tiles.gram_elements
    read, written, loads = inputs + partial_sums, partial_sums + sums, loaded + partial_sums
    return StepCost("task Gram", "fp64", flops, padded, read, written, inputs, fetched, loads, launches=2)


def residual_matmul_cost(
    step: str, m: int, n: int, tensors: int, k: int, job: Job, transpose: bool, variant: Variant = "fast"
) -> StepCost:
    """One pass: X, or Xᵀ, times k columns for every expert."""
    tile, kind = job.product(variant == "full")
    outer, inner = (n, m) if transpose else (m, n)
    row_tiles, column_tiles, steps = _tiles(outer, tile.rows), _tiles(k, tile.columns), _tiles(inner, tile.inner)
    times = _tiles(job.experts, tile.experts) * column_tiles  # that a tile of the inputs is read
    inputs = (job.experts + 1) * m * n * job.dtype_bytes * tensors
    bases = job.experts * k * FACTOR_BYTES * tensors  # bytes of all vectors of length 1
    vectors = 0 if variant == "signs" else bases * inner
    squares = job.experts * row_tiles * column_tiles * SUM_BYTES * tensors
    streams = (bases * outer if variant == "shifted" else 0) + squares
    flops = 2 * m * n * k * job.experts * tensors
    padded = tile.flops * tile.experts * steps * row_tiles * times * tensors
    read, loads = inputs + vectors + streams, inputs * times + vectors * row_tiles + streams
    written = bases * outer + squares + job.experts * SUM_BYTES * tensors
    return StepCost(step, kind, flops, padded, read, written, inputs, inputs * times, loads, launches=2)


def vectors_gram_cost(step: str, k: int, length: int, blocks: int, job: Job) -> StepCost:
    """Gram matrices of blocks of k rows, float64, half of each computed."""
    side, across = job.tiles.vectors_gram, _tiles(k, job.tiles.vectors_gram.rows)
    vectors, flops = blocks * k * length * FACTOR_BYTES, blocks * length * k * k
    padded = blocks * across * (across + 1) // 2 * _tiles(length, side.inner) * side.flops
    # Every row meets every tile of the lower triangle in its own row and column of tiles.
    loads, written = vectors * (across + 1), blocks * k * k * SUM_BYTES
    return StepCost(step, "fp64", flops, padded, vectors, written, loads_bytes=loads, launches=1)


def orthonormalize_costs(k: int, length: int, blocks: int, job: Job) -> list[StepCost]:
    """CholeskyQR twice, ``blocks`` of k rows: Gram matrices, their inverse factors (library), triangular products."""
    gram = vectors_gram_cost("orthonormalize: Gram", k, length, blocks, job)
    square, cubes = 2 * blocks * k * k * SUM_BYTES, 2 * blocks * k**3 // 3  # factor and inverse, a third each
    factor = StepCost("orthonormalize: factor", "fp64", cubes, cubes, square, square, 0, 0, square, launches=2)
    tile, kind, column_tiles = job.tiles.triangular, job.tiles.full_kind, _tiles(length, job.tiles.triangular.columns)
    # A tile of rows meets the rows of the triangle up to its last one, in whole steps.
    steps = [_tiles(min(k, end), tile.inner) for end in range(tile.rows, k + tile.rows, tile.rows)]
    depths = [min(k, count * tile.inner) for count in steps]
    triangle = sum(min(tile.rows, k - i * tile.rows) * depth for i, depth in enumerate(depths)) * blocks * SUM_BYTES
    vectors, padded = gram.bytes_read, blocks * column_tiles * sum(steps) * tile.flops
    read, loads = vectors + triangle, sum(depths) * blocks * length * FACTOR_BYTES + triangle * column_tiles
    product = StepCost("orthonormalize: product", kind, gram.flops, padded, read, vectors, 0, 0, loads, launches=1)
    return [cost.times(2) for cost in (gram, factor, product)]


def inner_products_cost(m: int, n: int, tensors: int, rank: int, job: Job) -> StepCost:
    """⟨F_i, F_j⟩ from the Gram matrices of all experts' factors together: their product, laid out anew, and summed."""
    grams = [vectors_gram_cost("inner products", job.experts * rank, size, tensors, job) for size in (m, n)]
    square, total = grams[0].bytes_written, tensors * job.experts**2 * SUM_BYTES
    rest = StepCost("inner products", "fp64", 0, 0, 4 * square, 2 * square + total, 0, 0, 4 * square, launches=3)
    return grams[0].plus(grams[1]).plus(rest)


def combine_matrix_cost(m: int, n: int, tensors: int, rank: int, job: Job) -> StepCost:
    """Merged matrices; every factor is read once a tile of the other side."""
    tile, tiled = job.tiles.combine, job.experts * tensors
    row_tiles, column_tiles = _tiles(m, tile.rows), _tiles(n, tile.columns)
    inputs = (job.experts + 1 - job.unread) * m * n * job.dtype_bytes * tensors
    left, right = (tiled * rank * size * FACTOR_BYTES for size in (m, n))
    flops = 2 * m * n * rank * tiled
    padded = tile.flops * _tiles(rank, tile.inner) * row_tiles * column_tiles * tiled
    read, loads = inputs + left + right, inputs + left * column_tiles + right * row_tiles
    written, kind = m * n * job.dtype_bytes * tensors, job.tiles.full_kind
    return StepCost("combine: matrices", kind, flops, padded, read, written, inputs, inputs, loads, launches=1)


def combine_vector_cost(elements: int, tensors: int, job: Job) -> StepCost:
    """Merged vectors: a difference and a multiply-add an element and expert."""
    plane, read = elements * tensors * job.dtype_bytes, job.experts - job.unread
    inputs, flops = (read + 1) * plane, 3 * elements * tensors * read
    return StepCost("combine: vectors", "fp32", flops, flops, inputs, plane, inputs, inputs, inputs, 1)


def merge_costs(
    model: Model,
    experts: int,
    rank: float | int = 0.1,
    dtype_bytes: int = 4,
    power_iterations: int = 2,
    tiles: Tiles = Tiles(),
    unread: int = 0,
    group_bytes: int | None = None,
) -> list[StepCost]:
    """The steps of a merge in their order, each over all tensors and repetitions; for ``unread`` see :class:`Job`.

    Args:
        rank: a ratio of min(m, n), rounded up, or an integer ≥ 1; that many columns are sketched.
        group_bytes: inputs that one launch serves, at most; ``None``: all tensors of a shape.
    """
    job, inputs = Job(experts, dtype_bytes, tiles, unread), (experts + 1) * model.elements * dtype_bytes

    def groups(elements: int, count: int) -> list[int]:
        size = max(1, (group_bytes or inputs) // ((experts + 1) * elements * dtype_bytes))
        return [min(size, count - first) for first in range(0, count, size)]

    matrices = [(m, n, size) for m, n, count in model.matrices for size in groups(m * n, count)]
    vectors = [(elements, size) for elements, count in model.vectors for size in groups(elements, count)]
    costs = [StepCost("transfer", "fp32", bytes_written=inputs, link_bytes=inputs)]
    costs += [task_gram_cost(*flat, job) for flat in [(m * n, count) for m, n, count in matrices] + vectors]
    for m, n, count in matrices:
        k, tall = rank_of(rank, m, n), n <= m  # A is X where tall, else Xᵀ: V lies on the short side
        multiply = partial(residual_matmul_cost, m=m, n=n, tensors=count, k=k, job=job)
        orthonormalize = orthonormalize_costs(k, min(m, n), experts * count, job)
        costs += [
            multiply("sketch V = AᵀS", transpose=tall, variant="signs"),
            multiply("steps Y = AV", transpose=not tall).times(power_iterations),
            multiply("steps V = AᵀY − shift·V", transpose=tall, variant="shifted").times(power_iterations),
            *(cost.times(1 + power_iterations) for cost in orthonormalize),
            multiply("final Y = AV", transpose=not tall, variant="full"),
            inner_products_cost(m, n, count, k, job),
            combine_matrix_cost(m, n, count, k, job),
        ]
    costs += [combine_vector_cost(elements, count, job) for elements, count in vectors]
    merged: dict[str, StepCost] = {}
    for cost in costs:
        merged[cost.step] = merged[cost.step].plus(cost) if cost.step in merged else cost
    return [cost for cost in merged.values() if cost.launches or cost.link_bytes]


def floor_seconds(costs: Iterable[StepCost], chip: Chip, *, cached: bool = True) -> float:
    """The floors of all kernels, one after the other, without the transfer."""
    return sum(cost.floor_seconds(chip, cached=cached) for cost in costs if not cost.link_bytes)
