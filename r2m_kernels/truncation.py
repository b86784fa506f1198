"""Step 3, a near-optimal rank-r approximation of every residual, as factors (README §4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import low_rank
from ._interface import Operators, Pace, ResidualGroup, ShiftedFactors, spans
from ._stream.blocks import as_matrix, long_panels
from ._stream.budget import Inputs, Memory, effort_of, pace_of, truncation_bytes
from ._stream.factors import Factors, GroupFactors, Side
from ._stream.loader import Group
from ._stream.plan import Plan, PlannedTensor
from ._stream.processes import Journal, KeptFactors
from ._stream.run import Run
from ._stream.schedule import Found, Pass, Step
from ._stream.stored import StoredMatrix
from ._stream.tensors import compute_dtype, fetched, tensor_key
from .config import MergeConfig
from .fields import WHOLE_SPECTRUM
from .findings import Truncated
from .plain_truncation import Truncatable, exact, exact_bytes, sketch_width, test_matrix, textbook, textbook_by_expert
from .single_truncation import depends_on_others, with_kept
from .spectra import map_spectra, mapping_bytes

Method = Literal["shifted", "textbook", "exact"]
# Short sides up to this are truncated exactly: a sketch would save nothing there.
EXACT_UP_TO = 64


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
    gaps = made.gap.cpu()
    factors = [replace(one, gap=gap) for one, gap in zip(made.each(), gaps, strict=True)]
    steep = untrusted(made.trusted)
    if steep:
        known = None if grams is None else [grams[index] for index in steep]
        for _, places, again in truncate_again([inputs.some(steep)], mixing, [rank], config, operators, [known]):
            gaps = again.gap.cpu()
            for of_steep, one, gap in zip(places, again.each(), gaps, strict=True):
                factors[steep[of_steep]] = replace(one, gap=gap)
    return factors


def untrusted(trusted: Tensor | None) -> list[int]:
    """Which of L tensors have a residual that the fast method could not truncate, from (L, N) on any device."""
    if trusted is None:
        return []
    return [place for place, fine in enumerate(trusted.bool().all(dim=1).tolist()) if not fine]


def truncate(
    inputs: Truncatable[Tensor],
    mixing: Tensor,
    rank: int,
    config: MergeConfig,
    operators: Operators,
    grams: Sequence[Tensor] | None = None,
) -> GroupFactors:
    """See :func:`truncate_residuals`; whether the result can be trusted is still to be asked."""
    return truncate_several([inputs], mixing, [rank], config, operators, [grams])[0]


def truncate_several(
    several: Sequence[Truncatable[Tensor]],
    mixing: Tensor,
    ranks: Sequence[int],
    config: MergeConfig,
    operators: Operators,
    grams: Sequence[Sequence[Tensor] | None],
) -> list[GroupFactors]:
    """The same of groups of one shape each, and one dtype: those of the fast method share its small launches."""
    made: dict[int, GroupFactors] = {}
    fast: dict[int, ResidualGroup] = {}
    for place, (inputs, rank, known) in enumerate(zip(several, ranks, grams, strict=True)):
        method = _method(as_matrix(inputs.bases[0]).shape, rank, config, operators)
        if method == "exact":
            # What maps spectra further works in float64: the conditions of its problems are its own.
            made[place] = exact(inputs, mixing, rank, operators, keep_float64=config.spectrum != "truncate")
        elif method == "textbook":
            made[place] = textbook(inputs, mixing, rank, config, operators)
        else:
            fast[place] = _residual_group(inputs, mixing, rank, config, operators, known)
    if fast:
        found = operators.shifted_truncation(list(fast.values()), mixing, effort_of(config))
        for place, one in zip(fast, found, strict=True):
            made[place] = _fast(one, several[place].bases[0].shape)
    return [made[place] for place in range(len(several))]


def truncate_again(
    several: Sequence[Truncatable[Tensor]],
    mixing: Tensor,
    ranks: Sequence[int],
    config: MergeConfig,
    operators: Operators,
    grams: Sequence[Sequence[Tensor] | None],
) -> Iterator[tuple[int, list[int], GroupFactors]]:
    """Residuals too steep for the fast method: those of few directions by a sketch of all at once, others by the book.

    In between are those that careful steps can truncate, on backends that group tensors.

    Yields:
        Which of ``several``, places in it, and their factors.
    """
    steep = {which: list(range(len(inputs.names))) for which, inputs in enumerate(several)}
    efforts = ({"few_directions": True}, {"carefully": True}) if operators.traits.groups_tensors else ()
    for effort in efforts:
        left = [which for which, places in steep.items() if places]
        groups = []
        for which in left:
            some, known = several[which].some(steep[which]), grams[which]
            tasks = None if known is None else [known[place] for place in steep[which]]
            groups.append(_residual_group(some, mixing, ranks[which], config, operators, tasks))
        found = operators.shifted_truncation(groups, mixing, effort_of(config)._replace(**effort)) if left else []
        for which, factors, trusted in zip(left, found, fetched([one.trusted for one in found]), strict=True):
            made, untold = _fast(factors, several[which].bases[0].shape), untrusted(trusted)
            every, steep[which] = steep[which], [steep[which][at] for at in untold]
            fine = [at for at in range(len(every)) if at not in untold]
            if fine:
                yield which, [every[at] for at in fine], made.some(fine) if untold else made
    for which, places in steep.items():
        if places:
            yield which, places, textbook(several[which].some(places), mixing, ranks[which], config, operators)


def _residual_group(
    inputs: Truncatable[Tensor],
    mixing: Tensor,
    rank: int,
    config: MergeConfig,
    operators: Operators,
    known: Sequence[Tensor] | None,
) -> ResidualGroup:
    names, bases, experts = inputs
    tasks = operators.task_gram(bases, experts).tasks.cpu() if known is None else torch.stack(list(known))
    keys = [tensor_key(config.seed, name, base.shape) for name, base in zip(names, bases, strict=True)]
    return ResidualGroup(bases, experts, torch.tensor(keys), _energies(tasks, mixing), rank)


def _energies(grams: Tensor, mixing: Tensor) -> Tensor:
    """‖X_li‖² from the task Grams, (L, N) float64; rounding where task vectors cancel."""
    return (mixing.T @ grams.to(mixing) @ mixing).diagonal(dim1=1, dim2=2).clamp_min(0)


def _fast(made: ShiftedFactors, shape: Sequence[int]) -> GroupFactors:
    """What a backend's fast method made of tensors of a shape."""
    side: Side = "right" if shape[0] ** 2 >= math.prod(shape) else "left"
    known = (made.products, made.trusted, made.energies)
    return GroupFactors(made.left, made.right, side, made.ordered, "shifted", made.gap, *known)


def _method(shape: Sequence[int], rank: int, config: MergeConfig, operators: Operators) -> Method:
    """Who truncates matrices of a shape."""
    by_the_book = config.svd == "textbook" or (config.tolerance is not None and not operators.traits.takes_tolerance)
    if by_the_book:
        short, exact = min(shape), config.svd == "exact" or config.spectrum in WHOLE_SPECTRUM
        return "exact" if exact or short <= max(sketch_width(rank, config), EXACT_UP_TO) else "textbook"
    return "exact" if exactly(shape, rank, config) else "shifted"


def exactly(shape: Sequence[int], rank: int, config: MergeConfig) -> bool:
    """Whether matrices of a shape are truncated exactly, where nothing asks for the textbook's method."""
    short = min(shape)
    asked = config.svd == "exact" or config.spectrum in WHOLE_SPECTRUM
    return asked or short <= EXACT_UP_TO or spans(rank, config.oversampling, short)


def truncation_pass(plan: Plan, config: MergeConfig, operators: Operators) -> Pass:
    """Matrices that are not kept whole. All of a matrix is needed at once, in memory or where it is stored."""
    tensors = [tensor for tensor in plan.of("matrix") if not tensor.whole and config.eta != 0]

    def pace(tensor: PlannedTensor, inputs: Inputs, memory: Memory, threads: int) -> Pace | None:
        return pace_of(tensor, inputs, config, memory, threads)

    def reads(tensor: PlannedTensor, inputs: Inputs, pace: Pace) -> Fraction:
        """But for residuals that turn out to be steep."""
        method, count = _method(tensor.matrix_shape, tensor.rank, config, operators), len(inputs.experts)
        if method == "exact":
            return Fraction(2)  # a Gram matrix and a product
        # Sketch and steps of some experts, and the factor of each.
        effort, shape = effort_of(config), tensor.matrix_shape
        passes = Fraction(effort.passes_on_cpu(tensor.rank, shape))
        if effort.from_gram(tensor.rank, shape):
            passes += Fraction(long_panels(*shape)[0][0].stop, max(shape))
        return -(-count // pace.experts) * passes + count

    def workspace(tensor: PlannedTensor, inputs: Inputs) -> int:
        """Factors and what makes them, beyond a result of the tensor's size."""
        shape, count, kept = tensor.matrix_shape, len(inputs.experts), inputs.factor_bytes(tensor, config)
        made, method = mapping_bytes(shape, tensor.rank, count, config), _method(shape, tensor.rank, config, operators)
        if method == "exact":  # whose factors are float64 until they are mapped
            made = max(exact_bytes(shape, tensor.rank, count) - kept, kept + made)
        elif method == "shifted":
            made = max(truncation_bytes(tensor, inputs, config, Pace(count, 1)), made)
        made += kept
        return max(0, inputs.nbytes(tensor) + made - inputs.working_bytes(tensor))

    return Pass(
        "truncation",
        tensors,
        pace=pace,
        reads=reads,
        workspace=workspace,
        by_factors=lambda tensor: tensor.factored,
        base_by_factors=False,
        of_any_shape=lambda tensor: not tensor.factored,
    )


class TruncationStep(Step):
    """Factors of every residual, into the run's store; what is known of them beside, as plain values."""

    def __init__(self, run: Run, config: MergeConfig, mixing: Tensor, grams: Mapping[str, Tensor]) -> None:
        super().__init__(truncation_pass(run.plan, config, run.backend.operators))
        self._config, self._run, self._mixing, self._grams = config, run, mixing, grams
        alone = not depends_on_others(config, run.backend.operators)
        self._single = run.kept if alone else None

    def remembered(self, journal: Journal) -> Mapping[str, Any]:
        """Factors are not written down: a tensor that is not merged yet is truncated again, the same to the bit."""
        merged, truncated = journal.known("combination"), journal.known(self.over.name)
        return {name: Truncated.from_plain(value) for name, value in truncated.items() if name in merged}

    def plain(self, value: Any) -> Any:
        """See :meth:`Truncated.plain`."""
        return value.plain()

    def work(self, group: Group) -> list[Made]:
        """Factors go into the store; what is known of them."""
        if group.factored:
            first, dtype = group.tensors[0], group.compute_dtype
            exact = low_rank.truncate(group.experts, first.matrix_shape[0], self._mixing, first.rank, dtype)
            return [self._in_store(group.tensors, exact)]
        if self._single is not None and (single := self._with_kept(self._single, group)) is not None:
            return [self._in_store(group.tensors, single)]
        alike = group.of_one_shape()
        asked = self._asked(alike)
        several, found = asked[0], truncate_several(*asked)
        found.reverse()
        made: list[Made] = []
        for one, inputs in zip(alike, several, strict=True):
            made += self._of_one_shape(one, inputs, found)
        return made

    def _of_one_shape(self, group: Group, inputs: Truncatable[Tensor], found: list[GroupFactors]) -> list[Made]:
        """Of a group what was ``found`` last, which nobody else holds on to."""
        factors, operators, rank = found.pop(), self._run.backend.operators, group.tensors[0].rank
        # Steep residuals are left for later, but where to know them takes no wait or mapping their spectra takes one.
        later = operators.traits.groups_tensors and self._config.spectrum == "truncate"
        steep = [] if later else untrusted(factors.trusted)
        tensors, dtype = group.tensors, group.compute_dtype
        if not steep:
            mapped = map_spectra(factors, inputs, self._mixing, self._config, operators, dtype)
            del factors  # float64 where they are mapped, and their products take as much again
            return [self._in_store(tensors, mapped)]
        fine = [place for place in range(len(tensors)) if place not in steep]
        known, made = [[self._grams[tensors[place].name] for place in steep]], list[Made]()
        for _, places, again in truncate_again(
            [inputs.some(steep)], self._mixing, [rank], self._config, operators, known
        ):
            some = [steep[place] for place in places]
            made.append(self._kept([tensors[place] for place in some], inputs.some(some), again, dtype))
        if fine:
            made.append(self._kept([tensors[place] for place in fine], inputs.some(fine), factors.some(fine), dtype))
        return made

    def _with_kept(self, kept: KeptFactors, group: Group) -> GroupFactors | None:
        """Factors of task vectors, those that are kept among them; ``None`` where all have to be truncated together."""
        (tensor,), config, operators = group.tensors, self._config, self._run.backend.operators

        def make(places: Sequence[int]) -> GroupFactors | None:
            inputs = Truncatable(group.names, group.bases, [group.experts[place] for place in places])
            alone = torch.eye(len(places), dtype=torch.float64)  # each residual is a task vector
            grams = [self._grams[tensor.name][places][:, places]]
            factors = truncate(inputs, alone, tensor.rank, config, operators, grams)
            if untrusted(factors.trusted):
                return None
            return map_spectra(factors, inputs, alone, config, operators, group.compute_dtype)

        names = list(self._run.inputs.named)
        return with_kept(kept, tensor.name, names, tensor.matrix_shape, group.compute_dtype, make)

    def from_storage(self, tensor: PlannedTensor, inputs: Sequence[StoredMatrix], pace: Pace) -> list[Made]:
        """The same; factors go into the store an expert at a time, and their products are worked out from there."""
        base, *experts = inputs
        config, operators, store = self._config, self._run.backend.operators, self._run.factors
        matrix = Truncatable([tensor.name], [base], [[expert] for expert in experts])
        method = _method(base.shape, tensor.rank, config, operators)
        if method == "exact":
            factors = exact(matrix, self._mixing, tensor.rank, operators, keep_float64=False)
            return [self._in_store([tensor], factors)]
        key = tensor_key(config.seed, tensor.name, tensor.spec.shape)
        (energies,) = _energies(self._grams[tensor.name].unsqueeze(0), self._mixing)
        told = (key, energies, tensor.rank, effort_of(config), pace)
        fast = operators.truncate_by_expert(base, experts, self._mixing, *told)
        # A generator here would hold one expert's factors while the next one's are made.
        last, numbers = self._placed(tensor, map(_fast, fast, repeat(base.shape)), compute_dtype(inputs))
        if untrusted(numbers[-1]):
            width = sketch_width(tensor.rank, config)
            test = partial(test_matrix, config.seed, tensor.name, tensor.spec.shape, width)
            again = textbook_by_expert(matrix, self._mixing, tensor.rank, config, operators, test)
            last, numbers = self._placed(tensor, again, compute_dtype(inputs))
        store.complete(tensor.name, last)
        if config.row_power == 0:
            numbers = (store.inner_products(tensor.name, last.orthogonal).unsqueeze(0), *numbers[1:])
        return [Made([tensor], numbers, last.method)]

    def _placed(
        self, tensor: PlannedTensor, made: Iterable[GroupFactors], dtype: torch.dtype
    ) -> tuple[Factors, tuple[Tensor, Tensor, Tensor]]:
        """Puts factors into the store as they come, an expert's each.

        Returns:
            What is known of all, without their tensors; energies, gaps and whether to trust them, (1, N) each.
        """
        store = self._run.factors
        store.place(tensor.name, len(self._mixing), tensor.matrix_shape, tensor.rank, dtype)
        numbers: list[tuple[Tensor, Tensor, Tensor]] = []
        nothing = torch.empty(0)
        for one in made:
            store.put_expert(tensor.name, len(numbers), one.left[0, 0], one.right[0, 0])
            trusted = torch.ones_like(one.gap) if one.trusted is None else one.trusted
            numbers.append((one.energies(), one.gap, trusted))
            known = Factors(nothing, nothing, one.ordered, one.basis, method=one.method)
            del one  # before the next one is made; `enumerate` would hold it
        energies, gaps, trust = (torch.cat(each, dim=1) for each in zip(*numbers, strict=True))
        return known, (energies, gaps, trust)

    def settled(self, found: Found) -> list[Sequence[Any]]:
        """See :class:`r2m_kernels.findings.Truncated`."""
        made = [one for _, several in found for one in several]
        numbers = fetched([number for one in made for number in one.numbers])
        triples = zip(*(numbers[of_one::3] for of_one in range(3)), strict=True)
        values: dict[str, Truncated] = {}
        steep: set[str] = set()
        for one, (products, gap, trusted) in zip(made, triples, strict=True):
            values |= one.values(products, gap)
            steep |= {one.tensors[place].name for place in untrusted(trusted)}
        again: list[Made] = []
        for tensors, _ in found:
            if some := [tensor for tensor in tensors if tensor.name in steep]:
                again += self._again(some)
        numbers = fetched([number for one in again for number in one.numbers[:2]])
        for one, products, gap in zip(again, numbers[::2], numbers[1::2], strict=True):
            values |= one.values(products, gap)
        return [[values[tensor.name] for tensor in tensors] for tensors, _ in found]

    def _again(self, steep: Sequence[PlannedTensor]) -> list[Made]:
        alike = self.over.load(self._run.loader, steep).of_one_shape()
        return [
            self._in_store([alike[which].tensors[place] for place in places], factors)
            for which, places, factors in truncate_again(*self._asked(alike))
        ]

    def _asked(
        self, alike: Sequence[Group]
    ) -> tuple[list[Truncatable[Tensor]], Tensor, list[int], MergeConfig, Operators, list[Sequence[Tensor]]]:
        """What truncations of groups of one shape are told."""
        several = [Truncatable(one.names, one.bases, one.experts) for one in alike]
        ranks, operators = [one.tensors[0].rank for one in alike], self._run.backend.operators
        grams: list[Sequence[Tensor]] = [[self._grams[name] for name in one.names] for one in alike]
        return several, self._mixing, ranks, self._config, operators, grams

    def _kept(
        self,
        tensors: Sequence[PlannedTensor],
        inputs: Truncatable[Tensor],
        factors: GroupFactors,
        dtype: torch.dtype,
    ) -> Made:
        operators = self._run.backend.operators
        return self._in_store(tensors, map_spectra(factors, inputs, self._mixing, self._config, operators, dtype))

    def _in_store(self, tensors: Sequence[PlannedTensor], factors: GroupFactors) -> Made:
        for tensor, one in zip(tensors, factors.each(), strict=True):
            self._run.factors.put(tensor.name, one)
        trusted = torch.ones_like(factors.gap) if factors.trusted is None else factors.trusted
        # Of residuals that are weighted by row nobody asks for more than their lengths.
        products = factors.inner_products() if self._config.row_power == 0 else factors.energies()
        return Made(tensors, (products, factors.gap, trusted), factors.method)


class Made(NamedTuple):
    """What is known of a group's truncations where they were made.

    Attributes:
        tensors: whose they are.
        numbers: products (L, N, N), or energies (L, N) where rows are weighted; gap (L, N); whether they can be relied
            on (L, N).
        method: of :class:`Factors`.
    """

    tensors: Sequence[PlannedTensor]
    numbers: tuple[Tensor, Tensor, Tensor]
    method: str

    def values(self, products: Tensor, gap: Tensor) -> dict[str, Truncated]:
        """Of each tensor by name, with what was fetched."""
        each = zip(self.tensors, products, gap, strict=True)
        return {tensor.name: Truncated(of_one, left_to_gain, self.method) for tensor, of_one, left_to_gain in each}
