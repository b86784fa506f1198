"""Step 3, a near-optimal rank-r approximation of every residual, as factors (README §4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._interface import Effort, Operators
from ._stream.factors import RATE, Factors, GroupFactors, gram_matrices, leading_eigenvectors, stacked
from ._stream.loader import Group
from ._stream.plan import Plan, PlannedTensor
from ._stream.processes import Journal
from ._stream.run import Run
from ._stream.schedule import Found, Pass, Step
from ._stream.tensors import compute_dtype, fetched, tensor_key
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
# Elements of the Gram matrices it works with at once, of all experts and several tensors.
EXACT_GROUP = 2**25


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
    inputs = Truncatable(names, bases, experts)
    made = truncate(inputs, mixing, rank, config, operators, grams)
    products = [None] * len(names) if made.products is None else list(made.products.cpu())
    gaps = made.gap.cpu()
    factors = [replace(made.of(i), gap=gaps[i], products=products[i]) for i in range(len(names))]
    steep = untrusted(made.trusted)
    if steep:
        again = _textbook(inputs.some(steep), mixing, rank, config, operators)
        for place, index in enumerate(steep):
            factors[index] = replace(again.of(place), gap=again.gap[place])
    return factors


class Truncatable(NamedTuple):
    """L tensors of one shape with their names, on which random numbers depend, and N sequences of the experts'."""

    names: Sequence[str]
    bases: Sequence[Tensor]
    experts: Sequence[Sequence[Tensor]]

    def some(self, places: Sequence[int]) -> Truncatable:
        """Those at some places."""
        bases, *experts = ([of_one[place] for place in places] for of_one in (self.bases, *self.experts))
        return Truncatable([self.names[place] for place in places], bases, experts)


def untrusted(trusted: Tensor | None) -> list[int]:
    """Which of L tensors have a residual that the fast method could not truncate, from (L, N) on any device."""
    if trusted is None:
        return []
    return [place for place, fine in enumerate(trusted.bool().all(dim=1).tolist()) if not fine]


def truncate(
    inputs: Truncatable,
    mixing: Tensor,
    rank: int,
    config: MergeConfig,
    operators: Operators,
    grams: Sequence[Tensor] | None = None,
) -> GroupFactors:
    """See :func:`truncate_residuals`; whether the result can be trusted is still to be asked."""
    names, bases, experts = inputs
    smaller = min(bases[0].shape[0], bases[0].numel() // bases[0].shape[0])
    textbook = config.svd == "textbook" or (config.tolerance is not None and not operators.traits.takes_tolerance)
    width = _sketch_width(rank, config) if textbook else operators.truncation_width(rank, config.oversampling)
    if config.svd == "exact" or config.spectrum == "rescale" or smaller <= max(width, EXACT_UP_TO):
        # What maps spectra further works in float64: the conditions of its problems are its own.
        return _exact(inputs, mixing, rank, operators, keep_float64=config.spectrum != "truncate")
    if textbook:
        return _textbook(inputs, mixing, rank, config, operators)
    known = operators.task_gram(bases, experts).tasks.cpu() if grams is None else torch.stack(list(grams))
    keys = torch.tensor([tensor_key(config.seed, name, base.shape) for name, base in zip(names, bases, strict=True)])
    energies = (mixing.T @ known.to(mixing) @ mixing).diagonal(dim1=1, dim2=2).clamp_min(0)
    effort = Effort(config.power_iterations, config.oversampling, config.tolerance)
    shifted = operators.shifted_truncation(bases, experts, mixing, keys, energies, rank, effort)
    return GroupFactors(
        left=shifted.left,
        right=shifted.right,
        basis="right" if bases[0].shape[0] ** 2 >= bases[0].numel() else "left",
        ordered=operators.traits.orders_components,
        method="shifted",
        gap=shifted.gap,
        products=shifted.products,
        trusted=shifted.trusted,
    )


def _sketch_width(rank: int, config: MergeConfig) -> int:
    return -(-(rank + config.oversampling) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _textbook(
    inputs: Truncatable, mixing: Tensor, rank: int, config: MergeConfig, operators: Operators
) -> GroupFactors:
    names, bases, experts = inputs
    first, tolerance = bases[0], config.tolerance
    width = min(first.shape[0], first.numel() // first.shape[0], _sketch_width(rank, config))

    def times(rhs: Tensor, transpose: bool = False) -> Tensor:
        return operators.residual_matmul(bases, experts, mixing, rhs, transpose, precision="tf32x3")

    tests = stacked([_test_matrix(config.seed, name, first.shape, width) for name in names]).to(first.device)
    # The same test matrix for every expert: their order cannot matter.
    basis = operators.orthonormalize(times(tests.unsqueeze(1).expand(-1, len(experts), -1, -1)))
    product = times(basis, transpose=True)  # Bᵀ, (L, N, n, k)
    before, energy = None, _energies(product)
    done = torch.zeros(len(names), dtype=torch.bool)
    for _ in range(config.power_iterations):
        turned = operators.orthonormalize(times(operators.orthonormalize(product)))
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
    right = (product @ rotation).mT.contiguous()
    gap = torch.full_like(growth, torch.nan) if before is None else growth * _rates(grams, rank)
    return GroupFactors(basis @ rotation, right, "left", True, "textbook", gap)


def _energies(product: Tensor) -> Tensor:
    """‖product_li‖², (L, N) float64."""
    lengths: Tensor = torch.linalg.vector_norm(product, dim=(2, 3), dtype=torch.float64)
    return lengths.square()


def _rates(grams: Tensor, rank: int) -> Tensor:
    """What the subspaces still miss as a share of their last growth: it shrinks at the rate of their Ritz values."""
    values = torch.linalg.eigvalsh(grams).clamp_min(0)
    ratio = values[..., 0] / values[..., -rank].clamp_min(torch.finfo(torch.float64).tiny)
    rates: Tensor = ratio**RATE
    return rates


def _exact(inputs: Truncatable, mixing: Tensor, rank: int, operators: Operators, keep_float64: bool) -> GroupFactors:
    base, count = inputs.bases[0].flatten(1), len(inputs.experts)
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


def _exact_factors(inputs: Truncatable, mixing: Tensor, rank: int, operators: Operators) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of the short side, (L, N, side, r), and X or Xᵀ times them: both float64."""
    bases, *experts = ([one.flatten(1) for one in of_one] for of_one in (inputs.bases, *inputs.experts))
    wide, device = bases[0].shape[0] <= bases[0].shape[1], bases[0].device
    side, length = sorted(bases[0].shape)
    shape = (len(bases), len(experts), side, side)
    identity = torch.eye(side, dtype=torch.float64, device=device).expand(shape)
    grams = torch.zeros(shape, dtype=torch.float64, device=device)
    # XXᵀ (or XᵀX) from pieces across the long side; a piece of X is X times the identity, in float64 since that is.
    step = max(1, EXACT_PIECE // side)
    for start in range(0, length, step):
        theta, *thetas = (
            [one.narrow(int(wide), start, min(step, length - start)) for one in of_one] for of_one in (bases, *experts)
        )
        piece = operators.residual_matmul(theta, thetas, mixing, identity, transpose=wide)
        grams += operators.residual_matmul(theta, thetas, mixing, piece, transpose=not wide)
    vectors = leading_eigenvectors(grams.cpu(), rank).to(device)
    return vectors, operators.residual_matmul(bases, experts, mixing, vectors, transpose=wide)


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

    def work(self, group: Group) -> list[Made]:
        """Factors go into the store; what is known of them."""
        inputs, operators = Truncatable(group.names, group.bases, group.experts), self._run.backend.operators
        rank, known = group.tensors[0].rank, [self._grams[name] for name in group.names]
        factors = truncate(inputs, self._mixing, rank, self._config, operators, known)
        # Steep residuals are left for later, but where to know them takes no wait or mapping their spectra takes one.
        later = operators.traits.groups_tensors and self._config.spectrum == "truncate"
        steep = [] if later else untrusted(factors.trusted)
        if not steep:
            return [self._kept(group, range(len(group.tensors)), factors)]
        fine = [place for place in range(len(group.tensors)) if place not in steep]
        again = _textbook(inputs.some(steep), self._mixing, rank, self._config, operators)
        made = [self._kept(group, steep, again)]
        return [*made, self._kept(group, fine, factors.some(fine))] if fine else made

    def settled(self, found: Found) -> list[Sequence[Any]]:
        """See :class:`r2m_kernels.findings.Truncated`."""
        made = [(tensors, one) for tensors, several in found for one in several]
        numbers = fetched([number for _, one in made for number in one.numbers])
        triples = zip(*(numbers[of_one::3] for of_one in range(3)), strict=True)
        values: dict[str, Truncated] = {}
        for (tensors, one), (products, gap, trusted) in zip(made, triples, strict=True):
            of_these = [tensors[place] for place in one.places]
            for tensor, *known in zip(of_these, products, gap, strict=True):
                values[tensor.name] = Truncated(known[0], known[1], one.method)
            steep = [of_these[place] for place in untrusted(trusted)]
            if steep:
                group, operators = self.over.load(self._run.loader, steep), self._run.backend.operators
                inputs = Truncatable(group.names, group.bases, group.experts)
                factors = _textbook(inputs, self._mixing, steep[0].rank, self._config, operators)
                again = self._kept(group, range(len(steep)), factors)
                for tensor, *known in zip(steep, *fetched(again.numbers[:2]), strict=True):
                    values[tensor.name] = Truncated(known[0], known[1], again.method)
        return [[values[tensor.name] for tensor in tensors] for tensors, _ in found]

    def _kept(self, group: Group, places: Sequence[int], factors: GroupFactors) -> Made:
        factors = map_spectra(factors, self._config, group.compute_dtype)
        for index, place in enumerate(places):
            self._run.factors.put(group.tensors[place].name, factors.of(index))
        trusted = torch.ones_like(factors.gap) if factors.trusted is None else factors.trusted
        return Made(places, (factors.inner_products(), factors.gap, trusted), factors.method)


class Made(NamedTuple):
    """What is known of a group's truncations where they were made.

    Attributes:
        places: which of the group's tensors these are.
        numbers: products (L, N, N), gap (L, N) and whether they can be relied on (L, N).
        method: of :class:`Factors`.
    """

    places: Sequence[int]
    numbers: tuple[Tensor, Tensor, Tensor]
    method: str


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
