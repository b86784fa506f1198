"""The truncated residuals of every matrix, at the analyzed rank or any smaller one, wherever they are kept."""

from __future__ import annotations

import threading
from dataclasses import replace

from torch import Tensor

from . import low_rank
from ._stream.factors import Factors
from ._stream.plan import PlannedTensor
from ._stream.run import Run
from .config import MergeConfig
from .findings import Findings
from .norm_matching import any_residual
from .truncation import truncate_residuals


class ResidualFactors:
    """The truncated residuals of every matrix, at the analyzed rank or any smaller one."""

    def __init__(self, findings: Findings, run: Run) -> None:
        self._findings, self._run = findings, run
        analyzed = {name: truncated.products for name, truncated in findings.truncated.items()}
        self._products = {_asked(findings.config): analyzed}
        self._late: dict[tuple[str, int], Factors] = {}
        self._lengths: dict[tuple[str, int], Tensor] = {}
        self._lock = threading.Lock()

    def of(self, tensor: PlannedTensor, rows: slice | None = None, columns: slice | None = None) -> Factors | None:
        """Factors at the tensor's rank; ``None`` where nothing is truncated, or there are no residuals.

        Args:
            rows: some of the left factors' alone.
            columns: with rows: some of the right factors' alone.
        """
        if rows is not None and self._stored(tensor):
            return self._run.factors.part(tensor.name, rows, columns or slice(None)).truncated(tensor.rank)
        whole = self._whole(tensor)
        if whole is None or rows is None:
            return whole
        return replace(whole, left=whole.left[:, rows], right=whole.right[:, :, columns or slice(None)])

    def lengths(self, tensor: PlannedTensor) -> Tensor | None:
        """‖row of F_i‖ of a tensor that comes in parts: (N, m) float64, worked out once."""
        key, operators = (tensor.name, tensor.rank), self._run.backend.operators
        with self._lock:
            if key not in self._lengths:
                # Where a device computes, lengths of what is kept elsewhere are its own, too.
                if self._stored(tensor) and not operators.traits.groups_tensors:
                    self._lengths[key] = self._run.factors.row_lengths(*key)
                elif (whole := self._whole(tensor)) is not None:
                    left, right = (side.to(self._run.device).unsqueeze(0) for side in (whole.left, whole.right))
                    self._lengths[key] = operators.row_lengths(
                        left, right, whole.orthogonal_rows, whole.orthonormal_rows
                    )[0]
            return self._lengths.get(key)

    def _stored(self, tensor: PlannedTensor) -> bool:
        """Whether the store has the factors, of which the first are those at the tensor's rank."""
        store = self._run.factors
        return tensor.name in store and store.leading(tensor.name, tensor.rank)

    def _whole(self, tensor: PlannedTensor) -> Factors | None:
        if tensor.name in self._run.factors:
            return self._run.factors.get(tensor.name).truncated(tensor.rank)
        mixing = self._findings.real.mixing
        if tensor.whole or not any_residual(mixing):
            return None
        if tensor.apart:  # asked for once
            return self._truncated(tensor, mixing)
        # Analyzed at full rank, where factors were not needed, and asked for at a smaller one: truncated now.
        key = (tensor.name, tensor.rank)
        if key not in self._late:
            self._late[key] = self._truncated(tensor, mixing)
        return self._late[key]

    def _truncated(self, tensor: PlannedTensor, mixing: Tensor) -> Factors:
        factored, operators = tensor.factored, self._run.backend.operators
        group = self._run.loader.load([tensor], with_base=not factored, factored=factored)
        if factored:
            m, dtype = tensor.matrix_shape[0], group.compute_dtype
            (made,) = low_rank.truncate(group.experts, m, mixing, tensor.rank, dtype).each()
            return made
        config = self._findings.config
        (found,) = truncate_residuals(group.names, group.bases, group.experts, mixing, tensor.rank, config, operators)
        return found

    def products(self, config: MergeConfig) -> dict[str, Tensor]:
        """⟨F_il, F_jl⟩ of every matrix tensor at the config's rank: (N, N) float64 by name.

        Where rows are weighted, their diagonals alone, (N,).
        """
        if config.eta == 0:
            return {}
        matrices, asked, alone = self._findings.matrices(config), _asked(config), config.row_power > 0
        if asked not in self._products:
            shared = {
                tensor.name: factors.energies() if alone else factors.inner_products()
                for tensor in matrices
                if self._run.owns(tensor) and (factors := self.of(tensor)) is not None
            }
            self._products[asked] = self._run.processes.gather(shared)
        known = self._findings.residual_energies if alone else self._findings.residual_grams
        return {**self._products[asked], **{tensor.name: known[tensor.name] for tensor in matrices if tensor.whole}}


def _asked(config: MergeConfig) -> str:
    """What decides ranks and products, as text: 1 (rank one) and 1.0 (full rank) are the same key otherwise."""
    return repr((config.rank, config.ranks, config.truncate, config.whole_up_to, config.row_power > 0))
