"""Step 3, a near-optimal rank-r approximation of every residual, as factors (README §4)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._backends import Operators
from ._stream.tensors import compute_dtype
from .config import MergeConfig

# Sketches are widened to a multiple of this: matrix products of 104 or 112 columns run up to twice as fast per
# column as those of 110 on the CPUs we measured, and more columns only lower the error.
WIDTH_MULTIPLE = 16

# Short sides up to this are truncated exactly: a sketch would save nothing there.
EXACT_UP_TO = 64
# Elements of a residual that the exact truncation holds at once.
EXACT_PIECE = 2**18
# How fast what a subspace misses shrinks, from the Ritz values at its edge and at the rank: their ratio to this power.
RATE = 4


@dataclass(frozen=True)
class Factors:
    """Truncated residuals of one tensor, F_i = left_i right_i.

    Attributes:
        left: (N, m, r).
        right: (N, r, n).
        ordered: components come by descending singular value, so that the leading ones are a smaller truncation.
        products: (N, N) float64, ⟨F_i, F_j⟩, where they came with the factors.
        gap: (N,) float64, an estimate of the energy that the best truncation at this rank would keep beyond this one's;
            0 where this is the best one, NaN where nothing is known.
        method: who truncated: "exact", "textbook", or "shifted" for the backend's own.
    """

    left: Tensor
    right: Tensor
    ordered: bool = True
    products: Tensor | None = None
    gap: Tensor | None = None
    method: str = "exact"

    def truncated(self, rank: int) -> Factors:
        """The leading ``rank`` components, by descending singular value."""
        if rank >= self.left.shape[2]:
            return self
        whole = self if self.ordered else self._in_order()
        return Factors(whole.left[:, :, :rank], whole.right[:, :rank])

    def _in_order(self) -> Factors:
        """The same F_i; one side is orthonormal, and the other's Gram has the squared singular values."""
        tall = self.left.shape[1] >= self.right.shape[2]
        weighted = self.left if tall else self.right.transpose(1, 2)
        rotation = _leading_eigenvectors([_gram(block) for block in weighted], weighted.shape[2]).to(weighted)
        return Factors(torch.bmm(self.left, rotation), torch.bmm(rotation.transpose(1, 2), self.right))

    def inner_products(self) -> Tensor:
        """⟨F_i, F_j⟩ from the factors alone: (N, N) float64 on the CPU."""
        if self.products is not None:
            return self.products
        count, rank = len(self.left), self.left.shape[2]
        products = self.left.new_empty(count, count, dtype=torch.float64)
        left, right = self.left.mT.double(), self.right.double()
        # In float64, since residuals may nearly cancel; one expert with all that follow, which is half of the pairs.
        # Components that come by size are orthogonal on both sides to float32's rounding: of ‖F_i‖² that leaves the
        # squares of their own lengths, and products of two roundings.
        first = 1 if self.ordered else 0
        if self.ordered:
            products.diagonal().copy_((left.square().sum(2) * right.square().sum(2)).sum(1))
        for i in range(count - first):
            others = slice(i + first, count)
            pairs = (left[i] @ left[others].flatten(0, 1).T).mul_(right[i] @ right[others].flatten(0, 1).T)
            products[i, others] = products[others, i] = pairs.view(rank, count - i - first, rank).sum(dim=(0, 2))
        return products.cpu()


def truncation_rank(rank: float | int, shape: Sequence[int], most: int | None = None) -> int:
    """r_l = max(1, ⌈rank · min(m, n)⌉) for a ratio, at most ``most`` or min(m, n)."""
    smaller = min(shape[0], math.prod(shape[1:]))
    if most is not None:
        return min(max(1, most), truncation_rank(rank, shape))
    if isinstance(rank, int):
        return min(rank, smaller)
    # 0.07 · 100 is 7.000000000000001 in binary: a hair above a whole number is that number.
    return min(smaller, max(1, math.ceil(rank * smaller * (1 - 1e-12))))


def truncate_residuals(
    names: Sequence[str],
    bases: Sequence[Tensor],
    experts: Sequence[Sequence[Tensor]],
    mixing: Tensor,
    rank: int,
    config: MergeConfig,
    operators: Operators,
    grams: Sequence[Tensor] | None = None,
) -> list[Factors]:
    """Near-optimal rank-r approximations of X_i = Σ_j mixing[j, i] τ_j for all experts, without storing any X_i.

    ``svd="randomized"``: the backend's own fast method (README §4). ``"textbook"``, and residuals too steep for the
    former: a range finder with power iterations (Halko, Martinsson & Tropp 2011, algorithm 4.4), then the eigenvectors
    of the small Gram BBᵀ in float64 in place of an SVD of B = QᵀX. ``"exact"``, or a short side that is tiny or
    spanned by the sketch: eigenvectors of the short side's Gram in float64, exact to 1e-8 · ‖X‖ before the factors are
    rounded to the compute dtype.

    Args:
        names, bases: L tensors of one shape.
        experts: N sequences of L tensors.
        grams: the L task Gram matrices (N, N) float64, where they are known already.

    Returns:
        L factors; none depends on what else is in the group.
    """
    of_tensor = list(zip(names, bases, zip(*experts, strict=True), strict=True))
    smaller = min(bases[0].shape[0], bases[0].numel() // bases[0].shape[0])
    textbook = config.svd == "textbook" or (config.tolerance is not None and not operators.takes_tolerance)
    width = _sketch_width(rank, config) if textbook else operators.truncation_width(rank, config.oversampling)
    if config.svd == "exact" or config.spectrum == "rescale" or smaller <= max(width, EXACT_UP_TO):
        # What maps spectra further works in float64: the conditions of its problems are its own.
        keep = config.spectrum != "truncate"
        return [_exact(base, others, mixing, rank, operators, keep) for _, base, others in of_tensor]
    if textbook:
        return [_textbook(name, base, others, mixing, rank, config, operators) for name, base, others in of_tensor]
    if grams is None:
        grams = list(operators.task_gram(bases, experts))
    keys = torch.tensor([tensor_key(config.seed, name, base.shape) for name, base, _ in of_tensor])
    energies = torch.stack([(mixing.T @ gram.to(mixing) @ mixing).diag().clamp_min(0) for gram in grams])
    options = (rank, config.power_iterations, config.oversampling, config.tolerance)
    left, right, products, trusted, gap = operators.shifted_truncation(bases, experts, mixing, keys, energies, *options)
    factors = []
    for index, (name, base, others) in enumerate(of_tensor):
        if bool(trusted[index].all()):
            known = None if products is None else products[index]
            ordered = operators.orders_components
            factors.append(Factors(left[index], right[index], ordered, known, gap[index], "shifted"))
        else:
            factors.append(_textbook(name, base, others, mixing, rank, config, operators))
    return factors


def _sketch_width(rank: int, config: MergeConfig) -> int:
    return -(-(rank + config.oversampling) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _textbook(
    name: str,
    base: Tensor,
    experts: Sequence[Tensor],
    mixing: Tensor,
    rank: int,
    config: MergeConfig,
    operators: Operators,
) -> Factors:
    smaller = min(base.shape[0], base.numel() // base.shape[0])
    width = min(smaller, _sketch_width(rank, config))
    group = [[expert] for expert in experts]

    def times(rhs: Tensor, transpose: bool = False) -> Tensor:
        return operators.residual_matmul([base], group, mixing, rhs.unsqueeze(0), transpose, precision="tf32x3")[0]

    def transposed_times(rhs: Tensor) -> Tensor:
        return times(rhs, transpose=True)

    test = _test_matrix(config.seed, name, base.shape, width).to(base.device)
    # The same test matrix for every expert: their order cannot matter.
    basis = operators.orthonormalize(times(test.expand(len(experts), -1, -1)))
    product = transposed_times(basis)  # Bᵀ, (N, n, k)
    before, energy = None, _energies(product)
    for _ in range(config.power_iterations):
        basis = operators.orthonormalize(times(operators.orthonormalize(product)))
        product = transposed_times(basis)
        before, energy = energy, _energies(product)
        if config.tolerance is not None and bool((energy - before <= config.tolerance * energy).all()):
            break
    grams = [_gram(block) for block in product]
    rotation = _leading_eigenvectors(grams, rank).to(product)
    gap = _gap(grams, rank, None if before is None else (energy - before).clamp_min(0))
    right = torch.bmm(product, rotation).transpose(1, 2).contiguous()
    return Factors(torch.bmm(basis, rotation), right, gap=gap, method="textbook")


def _energies(product: Tensor) -> Tensor:
    """‖product_i‖², (N,) float64 on the CPU."""
    return product.double().square().sum(dim=(1, 2)).cpu()


def _gap(grams: Sequence[Tensor], rank: int, growth: Tensor | None) -> Tensor:
    """What the subspaces still miss: their last growth, shrunk at the rate that their Ritz values tell."""
    if growth is None:
        return torch.full((len(grams),), torch.nan, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.stack(list(grams))).clamp_min(0)
    ratio = values[:, 0] / values[:, -rank].clamp_min(torch.finfo(torch.float64).tiny)
    gap: Tensor = growth * ratio**RATE
    return gap


def _exact(
    base: Tensor, experts: Sequence[Tensor], mixing: Tensor, rank: int, operators: Operators, keep_float64: bool
) -> Factors:
    matrix, matrices = base.flatten(1), [expert.flatten(1) for expert in experts]
    wide = matrix.shape[0] <= matrix.shape[1]
    side, length = sorted(matrix.shape)
    identity = torch.eye(side, dtype=torch.float64, device=base.device).expand(len(experts), -1, -1)
    grams = torch.zeros(len(experts), side, side, dtype=torch.float64, device=base.device)
    # XXᵀ (or XᵀX) from pieces across the long side; a piece of X is X times the identity, in float64 since that is.
    step = max(1, EXACT_PIECE // side)
    for start in range(0, length, step):
        theta, *thetas = (whole.narrow(int(wide), start, min(step, length - start)) for whole in (matrix, *matrices))
        group = [[piece] for piece in thetas]
        piece = operators.residual_matmul([theta], group, mixing, identity.unsqueeze(0), transpose=wide)
        grams += operators.residual_matmul([theta], group, mixing, piece, transpose=not wide)[0]
    vectors = _leading_eigenvectors([gram.cpu() for gram in grams], rank).to(base.device)
    group = [[whole] for whole in matrices]
    other = operators.residual_matmul([matrix], group, mixing, vectors.unsqueeze(0), transpose=wide)[0]
    dtype = torch.float64 if keep_float64 else compute_dtype([base, *experts])
    vectors, other = vectors.to(dtype), other.to(dtype)
    gap = torch.zeros(len(experts), dtype=torch.float64)
    if wide:
        return Factors(vectors, other.transpose(1, 2).contiguous(), gap=gap)
    return Factors(other, vectors.transpose(1, 2).contiguous(), gap=gap)


def _gram(product: Tensor) -> Tensor:
    """(k, k) float64 on the CPU, where small eigenvalue problems are solved for every device."""
    double = product.double()
    return (double.T @ double).cpu()


def _leading_eigenvectors(grams: Sequence[Tensor], rank: int) -> Tensor:
    """(N, k, rank), by descending eigenvalue, with signs fixed (the largest entry of a column is positive)."""
    leading = []
    for gram in grams:
        vectors = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)[:, :rank]
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        leading.append(vectors * torch.where(largest < 0, -1.0, 1.0))
    return torch.stack(leading)


def _test_matrix(seed: int, name: str, shape: Sequence[int], width: int) -> Tensor:
    """Gaussian (n, width) float32, made on the CPU for all devices."""
    generator = torch.Generator()
    generator.manual_seed(tensor_key(seed, name, shape))
    return torch.randn(math.prod(shape[1:]), width, generator=generator)


def tensor_key(seed: int, name: str, shape: Sequence[int]) -> int:
    """63 bits, a function of (seed, tensor name, shape) alone: all that is random about a tensor."""
    key = f"{seed}\0{name}\0{shape[0]}x{math.prod(shape[1:])}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
