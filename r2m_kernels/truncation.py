"""Step 3, a near-optimal rank-r approximation of every residual, as factors (README §4)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2m_kernels._backends import Operators
from r2m_kernels.config import MergeConfig

# Sketches are widened to a multiple of this: matrix products of 104 or 112 columns run up to twice as fast per
# column as those of 110 on the CPUs we measured, and more columns only lower the error.
WIDTH_MULTIPLE = 16

# Short sides up to this are truncated exactly: a sketch would save nothing there.
EXACT_UP_TO = 64
# Elements of a residual that the exact truncation holds at once.
EXACT_PIECE = 2**18


@dataclass(frozen=True)
class Factors:
    """Truncated residuals of one tensor, F_i = left_i right_i, components by descending singular value.

    Attributes:
        left: (N, m, r).
        right: (N, r, n).
    """

    left: Tensor
    right: Tensor

    def truncated(self, rank: int) -> Factors:
        """The leading ``rank`` components."""
        if rank >= self.left.shape[2]:
            return self
        return Factors(self.left[:, :, :rank], self.right[:, :rank])

    def inner_products(self) -> Tensor:
        """⟨F_i, F_j⟩ from the factors alone: (N, N) float64."""
        count = len(self.left)
        left, right = self.left.double(), self.right.double()
        products = torch.empty(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i + 1):
                value = ((left[i].T @ left[j]) * (right[i] @ right[j].T)).sum()
                products[i, j] = products[j, i] = value
        return products


def truncation_rank(rank: float | int, shape: Sequence[int]) -> int:
    """r_l = max(1, ⌈rank · min(m, n)⌉) for a ratio, at most min(m, n)."""
    smaller = min(shape[0], math.prod(shape[1:]))
    if isinstance(rank, int):
        return min(rank, smaller)
    # 0.07 · 100 is 7.000000000000001 in binary: a hair above a whole number is that number.
    return min(smaller, max(1, math.ceil(rank * smaller * (1 - 1e-12))))


def truncate_residuals(
    name: str,
    base: Tensor,
    experts: Sequence[Tensor],
    mixing: Tensor,
    rank: int,
    config: MergeConfig,
    operators: Operators,
) -> Factors:
    """Near-optimal rank-r approximations of X_i = Σ_j mixing[j, i] τ_j for all experts, without storing any X_i.

    ``svd="randomized"``: range finder with power iterations (Halko, Martinsson & Tropp 2011, algorithm 4.4), then the
    eigenvectors of the small Gram BBᵀ in float64 in place of an SVD of B = QᵀX. ``svd="exact"``, or a short
    side that is tiny or spanned by the sketch: eigenvectors of the short side's Gram in float64, exact to 1e-8 · ‖X‖
    before the factors are rounded to the compute dtype.
    """
    smaller = min(base.shape[0], base.numel() // base.shape[0])
    width = -(-(rank + config.oversampling) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if config.svd == "exact" or smaller <= max(width, EXACT_UP_TO):
        return _exact(base, experts, mixing, rank, operators)
    return _randomized(name, base, experts, mixing, rank, width, config, operators)


def _randomized(
    name: str,
    base: Tensor,
    experts: Sequence[Tensor],
    mixing: Tensor,
    rank: int,
    width: int,
    config: MergeConfig,
    operators: Operators,
) -> Factors:
    def times(rhs: Tensor) -> Tensor:  # only turns the subspace: operands may be rounded where that is faster
        return operators.residual_matmul(base, experts, mixing, rhs, precision="tf32")

    def transposed_times(rhs: Tensor) -> Tensor:
        return operators.residual_matmul(base, experts, mixing, rhs, transpose=True, precision="ieee")

    test = _test_matrix(config.seed, name, base.shape, width).to(base.device)
    # The same test matrix for every expert: their order cannot matter.
    basis = operators.orthonormalize(times(test.expand(len(experts), -1, -1)))
    product = transposed_times(basis)  # Bᵀ, (N, n, k)
    for _ in range(config.power_iterations):
        previous = product
        basis = operators.orthonormalize(times(operators.orthonormalize(product)))
        product = transposed_times(basis)
        if config.tolerance is not None and _settled(previous, product, config.tolerance):
            break
    rotation = _leading_eigenvectors([_gram(block) for block in product], rank).to(product.dtype)
    return Factors(torch.bmm(basis, rotation), torch.bmm(product, rotation).transpose(1, 2).contiguous())


def _exact(base: Tensor, experts: Sequence[Tensor], mixing: Tensor, rank: int, operators: Operators) -> Factors:
    matrix, matrices = base.flatten(1), [expert.flatten(1) for expert in experts]
    wide = matrix.shape[0] <= matrix.shape[1]
    side, length = sorted(matrix.shape)
    identity = torch.eye(side, dtype=torch.float64, device=base.device).expand(len(experts), -1, -1)
    grams = torch.zeros(len(experts), side, side, dtype=torch.float64, device=base.device)
    # XXᵀ (or XᵀX) from pieces across the long side; a piece of X is X times the identity, in float64 since that is.
    step = max(1, EXACT_PIECE // side)
    for start in range(0, length, step):
        theta, *thetas = (whole.narrow(int(wide), start, min(step, length - start)) for whole in (matrix, *matrices))
        piece = operators.residual_matmul(theta, thetas, mixing, identity, transpose=wide)
        grams += operators.residual_matmul(theta, thetas, mixing, piece, transpose=not wide)
    vectors = _leading_eigenvectors(list(grams), rank)
    other = operators.residual_matmul(matrix, matrices, mixing, vectors, transpose=wide)
    dtype = torch.float64 if torch.float64 in {t.dtype for t in (base, *experts)} else torch.float32
    vectors, other = vectors.to(dtype), other.to(dtype)
    if wide:
        return Factors(vectors, other.transpose(1, 2).contiguous())
    return Factors(other, vectors.transpose(1, 2).contiguous())


def _settled(previous: Tensor, product: Tensor, tolerance: float) -> bool:
    """Whether no expert's energy ‖product_i‖² grew by more than ``tolerance`` of itself."""
    before, after = (block.double().square().sum(dim=(1, 2)) for block in (previous, product))
    return bool((after - before <= tolerance * after).all())


def _gram(product: Tensor) -> Tensor:
    double = product.double()
    return double.T @ double


def _leading_eigenvectors(grams: Sequence[Tensor], rank: int) -> Tensor:
    """(N, k, rank), by descending eigenvalue, with signs fixed (the largest entry of a column is positive)."""
    leading = []
    for gram in grams:
        vectors = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)[:, :rank]
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        leading.append(vectors * torch.where(largest < 0, -1.0, 1.0))
    return torch.stack(leading)


def _test_matrix(seed: int, name: str, shape: Sequence[int], width: int) -> Tensor:
    """Gaussian (n, width) float32, a function of (seed, tensor name, shape) alone; made on the CPU for all devices."""
    m = shape[0]
    n = math.prod(shape[1:])
    key = f"{seed}\0{name}\0{m}x{n}".encode()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)
    return torch.randn(n, width, generator=generator)
