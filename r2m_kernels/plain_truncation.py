"""Truncations by products with the residuals alone: the textbook's range finder, and the exact one (README §4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._interface import Operators
from ._stream.blocks import as_matrix
from ._stream.factors import RATE, GroupFactors, gram_matrices, leading_eigenvectors, row_squares, stacked
from ._stream.stored import StoredMatrix
from ._stream.tensors import compute_dtype, fetched, tensor_key
from .config import MergeConfig

# Sketches are widened to a multiple of this: matrix products of 104 or 112 columns run up to twice as fast per
# column as those of 110 on the CPUs we measured, and more columns only lower the error.
WIDTH_MULTIPLE = 16
# Elements of a residual that the exact truncation holds at once.
EXACT_PIECE = 2**18
# Elements of the Gram matrices it works with at once, of all experts and several tensors.
EXACT_GROUP = 2**25

ROTATED_ROWS = 2**10  # of a basis, at once

M = TypeVar("M", Tensor, StoredMatrix)


class Truncatable(NamedTuple, Generic[M]):
    """L tensors of one shape with their names, on which random numbers depend, and N sequences of the experts'."""

    names: Sequence[str]
    bases: Sequence[M]
    experts: Sequence[Sequence[M]]

    def some(self, places: Sequence[int]) -> Truncatable[M]:
        """Those at some places."""
        names, bases = [self.names[place] for place in places], [self.bases[place] for place in places]
        return Truncatable(names, bases, [[expert[place] for place in places] for expert in self.experts])


def sketch_width(rank: int, config: MergeConfig) -> int:
    """Columns of the textbook's sketch, k."""
    return -(-(rank + config.oversampling) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def textbook(
    inputs: Truncatable[Tensor], mixing: Tensor, rank: int, config: MergeConfig, operators: Operators
) -> GroupFactors:
    """Power iterations, then the eigenvectors of a small Gram; on a CPU one residual after another."""
    width, shape = sketch_width(rank, config), inputs.bases[0].shape
    tests = [partial(test_matrix, config.seed, name, shape, width) for name in inputs.names]
    if operators.traits.groups_tensors:
        of_all = partial(stacked, [test() for test in tests])
        return _range_finder(inputs.bases, inputs.experts, mixing, rank, config, operators, of_all)
    of_tensors = [
        list(textbook_by_expert(inputs.some([place]), mixing, rank, config, operators, test))
        for place, test in enumerate(tests)
    ]
    left, right, gap = (
        torch.cat([torch.cat([getattr(one, field) for one in made], dim=1) for made in of_tensors])
        for field in ("left", "right", "gap")
    )
    return replace(of_tensors[0][0], left=left, right=right, gap=gap)


def textbook_by_expert(
    inputs: Truncatable[M],
    mixing: Tensor,
    rank: int,
    config: MergeConfig,
    operators: Operators,
    test: Callable[[], Tensor],
) -> Iterator[GroupFactors]:
    """The same on a CPU of one tensor, an expert's each: residuals are formed where they are read.

    Args:
        test: makes :func:`test_matrix` for the tensor's own name and shape, which is as large as a factor.
    """
    (base,), experts = inputs.bases, [expert for (expert,) in inputs.experts]
    alone = torch.ones(1, 1, dtype=torch.float64)
    for residual in operators.residual_matrices(base, experts, mixing):
        yield _range_finder(
            [residual.zeros()], [[residual]], alone, rank, config, operators, lambda: test().unsqueeze(0)
        )


def _range_finder(
    bases: Sequence[M],
    experts: Sequence[Sequence[M]],
    mixing: Tensor,
    rank: int,
    config: MergeConfig,
    operators: Operators,
    tests: Callable[[], Tensor],
) -> GroupFactors:
    first, tolerance = bases[0], config.tolerance

    def times(rhs: Tensor, transpose: bool = False) -> Tensor:
        return operators.residual_matmul(bases, experts, mixing, rhs, transpose, precision="tf32x3")

    # The same test matrix for every expert: their order cannot matter.
    drawn = times(tests().to(first.device).unsqueeze(1).expand(-1, len(experts), -1, -1))
    basis = operators.orthonormalize(drawn, overwrite=True)
    del drawn
    product = times(basis, transpose=True)  # Bᵀ, (L, N, n, k)
    before, energy = None, _energies(product)
    done = torch.zeros(len(bases), dtype=torch.bool)
    for _ in range(config.power_iterations):
        if tolerance is None:  # let go before the next ones are made
            basis = turned = product[:0]
            product = operators.orthonormalize(product, overwrite=True)
            turned = times(product)
            product = product[:0]
        else:
            turned = times(operators.orthonormalize(product))
        turned = operators.orthonormalize(turned, overwrite=True)
        multiplied = times(turned, transpose=True)
        energies = _energies(multiplied)
        if before is None or not bool(done.any()):
            basis, product, before, energy = turned, multiplied, energy, energies
        else:  # a tensor that is done stays as it is, whatever the others need
            places = (~done).nonzero().flatten().to(first.device)
            basis, product, before, energy = (
                old.index_copy(0, places, new[places])
                for old, new in ((basis, turned), (product, multiplied), (before, energy), (energy, energies))
            )
        if tolerance is not None:
            done |= (energy - before <= tolerance * energy).all(dim=1).cpu()
            if bool(done.all()):
                break
    grams, growth = fetched([gram_matrices(product), energy if before is None else (energy - before).clamp_min(0)])
    rotation = leading_eigenvectors(grams, rank).to(product)
    right = _turned(product, rotation).mT
    gap = torch.full_like(growth, torch.nan) if before is None else growth * _rates(grams, rank)
    right = right if first.device.type == "cpu" else right.contiguous()
    return GroupFactors(_turned(basis, rotation), right, "left", True, "textbook", gap)


def _turned(basis: Tensor, rotation: Tensor) -> Tensor:
    """(…, m, k) times (…, k, r), on a CPU in its own memory: it may be all that fits."""
    if basis.device.type != "cpu":
        return basis @ rotation
    for start in range(0, basis.shape[-2], ROTATED_ROWS):
        rows = basis[..., start : start + ROTATED_ROWS, :]
        rows[..., : rotation.shape[-1]] = rows @ rotation
    return basis[..., : rotation.shape[-1]]


def _energies(product: Tensor) -> Tensor:
    """‖product_li‖², (L, N) float64; on a CPU widened a few rows at a time: it may be all that fits."""
    if product.device.type == "cpu":
        return row_squares(product).sum(dim=-1)
    lengths: Tensor = torch.linalg.vector_norm(product, dim=(2, 3), dtype=torch.float64)
    return lengths.square()


def _rates(grams: Tensor, rank: int) -> Tensor:
    """What the subspaces still miss as a share of their last growth: it shrinks at the rate of their Ritz values."""
    values = torch.linalg.eigvalsh(grams).clamp_min(0)
    ratio = values[..., 0] / values[..., -rank].clamp_min(torch.finfo(torch.float64).tiny)
    rates: Tensor = ratio**RATE
    return rates


def exact(inputs: Truncatable[M], mixing: Tensor, rank: int, operators: Operators, keep_float64: bool) -> GroupFactors:
    """Eigenvectors of the short side's Gram; factors in the compute dtype, or as they are."""
    base, count = as_matrix(inputs.bases[0]), len(inputs.experts)
    # Of few tensors at once: their short sides' Gram matrices are as large as residuals.
    size = max(1, EXACT_GROUP // (count * min(base.shape) ** 2))
    chunks = [range(start, min(start + size, len(inputs.bases))) for start in range(0, len(inputs.bases), size)]
    made = [_exact_factors(inputs.some(chunk), mixing, rank, operators) for chunk in chunks]
    vectors, other = (of_one[0] if len(of_one) == 1 else torch.cat(of_one) for of_one in zip(*made, strict=True))
    dtype = torch.float64 if keep_float64 else compute_dtype([inputs.bases[0], *(one[0] for one in inputs.experts)])
    vectors, other = vectors.to(dtype), other.to(dtype)
    wide, gap = base.shape[0] <= base.shape[1], torch.zeros(len(inputs.bases), count, dtype=torch.float64)
    left, right = (vectors, other.mT.contiguous()) if wide else (other, vectors.mT.contiguous())
    return GroupFactors(left, right, "left" if wide else "right", True, "exact", gap.to(base.device))


def _exact_factors(inputs: Truncatable[M], mixing: Tensor, rank: int, operators: Operators) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of the short side, (L, N, side, r), and X or Xᵀ times them: both float64."""
    bases = [as_matrix(one) for one in inputs.bases]
    experts = [[as_matrix(one) for one in expert] for expert in inputs.experts]
    wide, device = bases[0].shape[0] <= bases[0].shape[1], bases[0].device
    side, length = sorted(bases[0].shape)
    shape = (len(bases), len(experts), side, side)
    identity = torch.eye(side, dtype=torch.float64, device=device).expand(shape)
    grams = torch.zeros(shape, dtype=torch.float64, device=device)
    # XXᵀ (or XᵀX) from pieces across the long side; a piece of X is X times the identity, in float64 since that is.
    step = max(1, EXACT_PIECE // side)
    for start in range(0, length, step):
        run = slice(start, min(start + step, length))
        where = (slice(None), run) if wide else (run, slice(None))
        theta, thetas = [one[where] for one in bases], [[one[where] for one in expert] for expert in experts]
        piece = operators.residual_matmul(theta, thetas, mixing, identity, transpose=wide)
        grams += operators.residual_matmul(theta, thetas, mixing, piece, transpose=not wide)
    vectors = leading_eigenvectors(grams.cpu(), rank).to(device)
    del grams, piece  # as large as all vectors
    return vectors, operators.residual_matmul(bases, experts, mixing, vectors, transpose=wide)


def exact_bytes(shape: tuple[int, int], rank: int, count: int) -> int:
    """What :func:`exact` takes at most beyond its inputs, of ``count`` residuals of one matrix, to float64 factors."""
    short, long = sorted(shape)
    # The Gram matrices, once more to be solved, their vectors, and a workspace.
    solved = (3 * count + 3) * short**2
    made = count * rank * (short + long + (long if shape[0] <= shape[1] else short))  # one side is copied
    return torch.float64.itemsize * max(solved, made)


def test_matrix(seed: int, name: str, shape: Sequence[int], width: int) -> Tensor:
    """Gaussian (n, width) float32, made on the CPU for all devices; no wider than the short side."""
    generator, columns = torch.Generator(), math.prod(shape[1:])
    generator.manual_seed(tensor_key(seed, name, shape))
    return torch.randn(columns, min(shape[0], columns, width), generator=generator)
