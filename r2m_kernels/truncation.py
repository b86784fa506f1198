"""Step 3, a near-optimal rank-r approximation of every residual, as factors (README §4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._interface import Effort, Operators
from ._stream.factors import RATE, Factors, gram_matrix, leading_eigenvectors
from ._stream.loader import Group
from ._stream.plan import Plan, PlannedTensor
from ._stream.processes import Journal
from ._stream.run import Run
from ._stream.schedule import Found, Pass, Step
from ._stream.tensors import compute_dtype, tensor_key
from .config import MergeConfig
from .findings import Findings, Truncated
from .norm_matching import any_residual
from .spectra import map_spectra

# Sketches are widened to a multiple of this: matrix products of 104 or 112 columns run up to twice as fast per
# column as those of 110 on the CPUs we measured, and more columns only lower the error.
WIDTH_MULTIPLE = 16

# Short sides up to this are truncated exactly: a sketch would save nothing there.
EXACT_UP_TO = 64
# Elements of a residual that the exact truncation holds at once.
EXACT_PIECE = 2**18


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
    textbook = config.svd == "textbook" or (config.tolerance is not None and not operators.traits.takes_tolerance)
    width = _sketch_width(rank, config) if textbook else operators.truncation_width(rank, config.oversampling)
    if config.svd == "exact" or config.spectrum == "rescale" or smaller <= max(width, EXACT_UP_TO):
        # What maps spectra further works in float64: the conditions of its problems are its own.
        keep = config.spectrum != "truncate"
        return [_exact(base, others, mixing, rank, operators, keep) for _, base, others in of_tensor]
    if textbook:
        return [_textbook(name, base, others, mixing, rank, config, operators) for name, base, others in of_tensor]
    if grams is None:
        grams = list(operators.task_gram(bases, experts).tasks.cpu())
    keys = torch.tensor([tensor_key(config.seed, name, base.shape) for name, base, _ in of_tensor])
    energies = torch.stack([(mixing.T @ gram.to(mixing) @ mixing).diag().clamp_min(0) for gram in grams])
    effort = Effort(config.power_iterations, config.oversampling, config.tolerance)
    shifted = operators.shifted_truncation(bases, experts, mixing, keys, energies, rank, effort)
    trusted, gaps = shifted.trusted.all(dim=1).tolist(), shifted.gap.cpu()
    all_products = None if shifted.products is None else shifted.products.cpu()
    factors = []
    for index, (name, base, others) in enumerate(of_tensor):
        if trusted[index]:
            left, right, gap = shifted.left[index], shifted.right[index], gaps[index]
            products = None if all_products is None else all_products[index]
            factors.append(Factors(left, right, operators.traits.orders_components, products, gap, "shifted"))
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
    grams = [gram_matrix(block) for block in product]
    rotation = leading_eigenvectors(grams, rank).to(product)
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
    vectors = leading_eigenvectors([gram.cpu() for gram in grams], rank).to(base.device)
    group = [[whole] for whole in matrices]
    other = operators.residual_matmul([matrix], group, mixing, vectors.unsqueeze(0), transpose=wide)[0]
    dtype = torch.float64 if keep_float64 else compute_dtype([base, *experts])
    vectors, other = vectors.to(dtype), other.to(dtype)
    gap = torch.zeros(len(experts), dtype=torch.float64)
    if wide:
        return Factors(vectors, other.transpose(1, 2).contiguous(), gap=gap)
    return Factors(other, vectors.transpose(1, 2).contiguous(), gap=gap)


def _test_matrix(seed: int, name: str, shape: Sequence[int], width: int) -> Tensor:
    """Gaussian (n, width) float32, made on the CPU for all devices."""
    generator = torch.Generator()
    generator.manual_seed(tensor_key(seed, name, shape))
    return torch.randn(math.prod(shape[1:]), width, generator=generator)


def truncation_pass(plan: Plan, config: MergeConfig) -> Pass:
    """Matrices that are not kept whole. All of a matrix is needed at once."""
    return Pass("truncation", [tensor for tensor in plan.of("matrix") if tensor.truncated and config.eta != 0])


class TruncationStep(Step):
    """Factors of every residual, into the run's store; what is known of them beside, as plain values."""

    def __init__(self, run: Run, config: MergeConfig, mixing: Tensor, grams: Mapping[str, Tensor]) -> None:
        super().__init__(truncation_pass(run.plan, config))
        self._config, self._run, self._mixing, self._grams = config, run, mixing, grams

    def remembered(self, journal: Journal) -> Mapping[str, Any]:
        """Factors are not written down: a tensor that is not merged yet is truncated again, the same to the bit."""
        merged, truncated = journal.known("combination"), journal.known(self.over.name)
        return {name: Truncated.from_plain(value) for name, value in truncated.items() if name in merged}

    def plain(self, value: Any) -> Any:
        """See :meth:`Truncated.plain`."""
        return value.plain()

    def settled(self, found: Found) -> list[Sequence[Any]]:
        """See :class:`r2m_kernels.findings.Truncated`."""
        return [values for _, values in found]

    def work(self, group: Group) -> list[Any]:
        """Factors go into the store."""
        known = [self._grams[name] for name in group.names]
        rank, operators = group.tensors[0].rank, self._run.backend.operators
        factors = truncate_residuals(
            group.names, group.bases, group.experts, self._mixing, rank, self._config, operators, known
        )
        factors = map_spectra(factors, self._config, group.compute_dtype)
        for name, of_tensor in zip(group.names, factors, strict=True):
            self._run.factors.put(name, of_tensor)
        return [Truncated.of(of_tensor) for of_tensor in factors]


class ResidualFactors:
    """The truncated residuals of every matrix, at the analyzed rank or any smaller one."""

    def __init__(self, findings: Findings, run: Run) -> None:
        self._findings, self._run = findings, run
        analyzed = {name: truncated.products for name, truncated in findings.truncated.items()}
        self._products = {_ranks(findings.config): analyzed}
        self._late: dict[tuple[str, int], Factors] = {}

    def of(self, tensor: PlannedTensor) -> Factors | None:
        """Factors at the tensor's rank; ``None`` where nothing is truncated, or there are no residuals."""
        if tensor.name in self._run.factors:
            return self._run.factors.get(tensor.name).truncated(tensor.rank)
        mixing = self._findings.real.mixing
        if tensor.full_rank or not any_residual(mixing):
            return None
        # Analyzed at full rank, where factors were not needed, and asked for at a smaller one: truncated now.
        key = (tensor.name, tensor.rank)
        if key not in self._late:
            group, operators = self._run.loader.load([tensor]), self._run.backend.operators
            (self._late[key],) = truncate_residuals(
                group.names, group.bases, group.experts, mixing, tensor.rank, self._findings.config, operators
            )
        return self._late[key]

    def products(self, config: MergeConfig) -> dict[str, Tensor]:
        """⟨F_il, F_jl⟩ of every matrix tensor at the config's rank: (N, N) float64 by name."""
        if config.eta == 0:
            return {}
        matrices, ranks = self._findings.matrices(config), _ranks(config)
        if ranks not in self._products:
            shared = {
                tensor.name: factors.inner_products()
                for tensor in matrices
                if self._run.owns(tensor) and (factors := self.of(tensor)) is not None
            }
            self._products[ranks] = self._run.processes.gather(shared)
        whole = {tensor.name: self._findings.residual_gram(tensor.name) for tensor in matrices if tensor.full_rank}
        return {**self._products[ranks], **whole}


def _ranks(config: MergeConfig) -> str:
    """What decides the ranks, as text: 1 (rank one) and 1.0 (full rank) are the same key otherwise."""
    return repr((config.rank, config.ranks))
