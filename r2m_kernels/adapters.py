"""A merge taken apart into one model and an adapter of each expert, or as one adapter of the base (README §6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import combination, low_rank, tensor_checks
from ._stream.loader import Group
from ._stream.parallel import deterministic
from ._stream.run import Run
from ._stream.state_dicts import StateDictSink, StateDictSource
from ._stream.tensors import LowRankSource, TensorSink
from .errors import BadOption
from .progress import Progress
from .terms import ByRows, Linear, LowRank, Terms, Unchanged, kind_of


class Change(NamedTuple):
    """What an expert adds to a matrix: left · right, (m, r) by (r, n), in the compute dtype."""

    left: Tensor
    right: Tensor

    @property
    def square(self) -> float:
        """Its length squared."""
        left, right = (factor.double() for factor in self)
        return float(((left.mT @ left) * (right @ right.mT)).sum())


def truncated(change: Change, rank: int) -> Change:
    """The best change with at most ``rank`` columns."""
    if rank >= change.left.shape[1]:
        return change
    left, right = low_rank.collapsed(change.left.cpu().double(), change.right.cpu().double(), rank)
    return Change(left.to(change.left).contiguous(), right.to(change.right).contiguous())


class Adapters:
    """One model, and what each expert adds to its matrices. Made by :meth:`r2m_kernels.Analysis.adapters`.

    The model is the merge without its truncated residuals: of these matrices the core alone, of all others what the
    merge makes of them. With the changes of all experts added it is the merge. Where core and residuals are the mean
    and what each one has beyond it, as ``MergeConfig.cart()`` has it, with one expert's it is, but for truncation,
    that expert.

    Attributes:
        ranks: matrix → columns r of each expert's change, in the base's order.

    Raises:
        BadOption: there are no truncated residuals, or the change of a matrix is not the sum of the experts'.
    """

    def __init__(self, run: Run, terms: Terms) -> None:
        self._run, self._terms = run, terms.taken_apart()
        findings, config = terms.findings, terms.config
        if config.scale == "column":
            raise BadOption("scale: 'column' lengthens the sum of all experts' changes; expected 'none' or 'layer'")
        planned = [self._terms.planned(tensor) for tensor in findings.plan.tensors]
        self._tensors = {one.name: one for one in planned if one.truncated and kind_of(one, config) is LowRank}
        self.ranks = {name: tensor.rank for name, tensor in self._tensors.items()}
        if not self.ranks or not all(self._term(name).factors for name in [*self.ranks][:1]):
            raise BadOption(
                f"adapters: there are no truncated residuals with eta={config.eta:g}, rank={config.rank} and "
                f"{len(findings.experts)} expert{'s' * (len(findings.experts) > 1)}; expected some"
            )

    def __repr__(self) -> str:
        return f"<Adapters of {', '.join(self._terms.findings.experts)}: {len(self.ranks)} matrices>"

    def model(self, *, dtype: torch.dtype | str | None = None) -> dict[str, Tensor]:
        """The model's state dict, as :meth:`r2m_kernels.Analysis.merge` has the merge's."""
        base = self._run.inputs.base
        sink = StateDictSink(base.devices if isinstance(base, StateDictSource) else {}, self._run.plan.aliases)
        self.write(sink, dtype=dtype)
        return sink.state_dict

    @deterministic
    def write(
        self, sink: TensorSink, *, dtype: torch.dtype | str | None = None, progress: Progress | None = None
    ) -> None:
        """The model into a sink, tensor by tensor."""
        dtype = tensor_checks.output_dtype(dtype)
        combination.write(self._run, self._terms.without_truncated(), sink, dtype, progress)

    @deterministic
    def changes(self, name: str, rank: int | None = None) -> dict[str, Change]:
        """Each expert's change of a matrix, as it enters the merge: matched, weighted, times η.

        Args:
            name: of the matrix.
            rank: of the changes, the best of fewer columns; ``None``: as they are.
        """
        changes = [Change(left.contiguous(), right.contiguous()) for left, right in self._products(name)]
        changes = changes if rank is None else [truncated(change, rank) for change in changes]
        return dict(zip(self._terms.findings.experts, changes, strict=True))

    @deterministic
    def columns(self, name: str, most: int) -> Columns:
        """What the ``most`` largest columns of a matrix's changes hold, for :func:`ranks_within`."""
        products = self._products(name)
        values = [low_rank.singular_values(left.cpu().double(), right.cpu().double()) for left, right in products]
        energies = torch.stack(values).square().sum(dim=0)[:most]
        return Columns(name, sum(self._tensors[name].matrix_shape), energies)

    def _products(self, name: str) -> list[tuple[Tensor, Tensor]]:
        term = self._term(name)
        products, dtype = term.products(self._run.backend.operators, self._run.device), term.factors[0].left.dtype
        return list(zip(products.scaled_left(dtype)[0], products.right[0].to(dtype), strict=True))

    def _term(self, name: str) -> LowRank:
        term = self._terms.of(Group([self._tensors[name]]))
        assert isinstance(term, LowRank)
        return term


class MergedChanges:
    """What a merge adds to matrices, by few columns. Made by :meth:`r2m_kernels.Analysis.changes`.

    Attributes:
        ranks: matrix → Σ r_j of what the experts' changes have, of those of which all are known as
            :class:`LowRankSource` tells them, and that the merge makes of them linearly but for truncation.
    """

    def __init__(self, run: Run, terms: Terms) -> None:
        self._run, self._terms = run, terms
        planned = [terms.planned(tensor) for tensor in terms.findings.plan.of("matrix")]
        known_kinds = (Unchanged, Linear, LowRank, ByRows)
        self._tensors = {one.name: one for one in planned if kind_of(one, terms.config) in known_kinds}
        experts = [one for one in run.inputs.experts if isinstance(one, LowRankSource)]
        known = {name: [one.change_rank(name) for one in experts] for name in self._tensors}
        self.ranks = {
            name: sum(rank for rank in ranks if rank is not None)
            for name, ranks in known.items()
            if len(experts) == len(run.inputs.experts) and None not in ranks
        }

    def __repr__(self) -> str:
        return f"<MergedChanges of {', '.join(self._terms.findings.experts)}: {len(self.ranks)} matrices>"

    @deterministic
    def change(self, name: str, rank: int | None = None) -> Change:
        """What is added to a matrix, float64 on the CPU: with all its columns, or the best with ``rank`` of them."""
        most = self.ranks[name] if rank is None else min(rank, self.ranks[name])
        return Change(*low_rank.collapsed(*self._product(name), most))

    @deterministic
    def columns(self, name: str, most: int) -> Columns:
        """As :meth:`Adapters.columns` has it, of what is added."""
        energies = low_rank.singular_values(*self._product(name)).square()[:most]
        return Columns(name, sum(self._tensors[name].matrix_shape), energies)

    def _product(self, name: str) -> tuple[Tensor, Tensor]:
        tensor, experts = self._tensors[name], self._run.inputs.experts
        m = tensor.matrix_shape[0]
        changes = [[one.read_change(name).double()] for one in experts if isinstance(one, LowRankSource)]
        term, operators, products = self._terms.of(Group([tensor])), self._run.backend.operators, None
        if isinstance(term, ByRows):
            coefficients = term.by_factors(operators, Group([tensor], experts=changes))[1]
        else:
            assert isinstance(term, Linear | LowRank)
            coefficients = term.coefficients
        if isinstance(term, LowRank) and term.factors:
            products = term.products(operators, self._run.device)
        left, right = low_rank.columns(changes, m, coefficients, products, torch.float64)
        return left[0], right[0]


class Columns(NamedTuple):
    """What columns of a matrix's changes hold.

    Attributes:
        name: of the matrix.
        numbers: in a column of one expert's factors, m + n.
        energies: (r,) float64, of all experts' k-th columns together, in any unit that all have; they fall.
    """

    name: str
    numbers: int
    energies: Tensor


def ranks_within(numbers: int, together: Sequence[Sequence[Columns]]) -> dict[str, int]:
    """Ranks that leave out the least energy of all changes, in at most so many numbers: a column of each at least.

    Columns are taken by their energy for each number that they take, over all matrices at once: the optimum, but for
    what is too little for one column more.

    Args:
        numbers: of one expert's factors.
        together: matrices that have one rank, in sequences.

    Returns:
        Matrix → rank, at most its columns.
    """
    padded = [
        torch.nn.utils.rnn.pad_sequence([one.energies for one in group]).sum(dim=1).tolist() for group in together
    ]
    costs = [sum(one.numbers for one in group) for group in together]
    left, found = numbers - sum(costs), [1] * len(costs)
    worth = [(-energy / cost, place) for place, cost in enumerate(costs) for energy in padded[place][1:] if energy > 0]
    for _, place in sorted(worth):
        # After one that does not fit no other of its matrix does: they all cost the same.
        if costs[place] <= left:
            left, found[place] = left - costs[place], found[place] + 1
    return {
        one.name: min(rank, len(one.energies)) for group, rank in zip(together, found, strict=True) for one in group
    }
