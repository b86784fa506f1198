"""A merge taken apart into one model and an adapter of each expert, or as one adapter of the base (README §6)."""

from __future__ import annotations

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
    def changes(self, name: str) -> dict[str, Change]:
        """Each expert's change of a matrix, as it enters the merge: matched, weighted, times η."""
        left, right, scale = self._term(name).products(self._run.backend.operators, self._run.device)
        lefts = left[0] * scale.to(left).view(-1, 1, 1)
        changes = (Change(*(one.contiguous() for one in pair)) for pair in zip(lefts, right[0], strict=True))
        return dict(zip(self._terms.findings.experts, changes, strict=True))

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
        tensor, experts = self._tensors[name], self._run.inputs.experts
        m, most = tensor.matrix_shape[0], self.ranks[name] if rank is None else min(rank, self.ranks[name])
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
        return Change(*low_rank.collapsed(left[0], right[0], most))
