"""What the steps find of a merge, as plain data between them and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._stream.plan import Plan, PlannedTensor, residual_rank
from .config import MergeConfig
from .errors import BadOption, quoted
from .fields import FREE_FIELDS
from .gram import ordered_sum
from .real_subspace import RealSubspace


@dataclass(frozen=True)
class Truncated:
    """What is known of one tensor's truncation beside the factors.

    Attributes:
        products: (N, N) float64, ⟨F_i, F_j⟩; where rows are weighted their diagonal alone, (N,), which is all that is
            asked for there.
        gap, method: of :class:`r2m_kernels._stream.factors.Factors`.
    """

    products: Tensor
    gap: Tensor | None
    method: str

    @property
    def energies(self) -> Tensor:
        """(N,) float64, ‖F_i‖²."""
        return self.products if self.products.ndim == 1 else self.products.diag()

    def plain(self) -> dict[str, Any]:
        """As plain values, for journals and other processes."""
        gap = None if self.gap is None else self.gap.tolist()
        return {"products": self.products.tolist(), "gap": gap, "method": self.method}

    @classmethod
    def from_plain(cls, value: dict[str, Any]) -> Truncated:
        """From :meth:`plain`."""
        gap = None if value["gap"] is None else torch.tensor(value["gap"], dtype=torch.float64)
        return cls(torch.tensor(value["products"], dtype=torch.float64), gap, value["method"])


@dataclass(frozen=True)
class Strength:
    """How strong core and residual term enter.

    Attributes:
        core_scale: λ.
        eta: η.
        core_norm: ‖λ τ_core‖ over matrix tensors.
        residual_norm: ‖Σ w_i s_i F_i‖ over matrix tensors, or ‖Σ W_i ∘ F_i‖ where rows are weighted, 0 where it is
            rounding; ``None`` of the latter before the term was made, as rows pass.
        cancelled: whether residuals cancel so far that a relative eta is kept from blowing up what is left.
    """

    core_scale: float
    eta: float
    core_norm: float
    residual_norm: float | None
    cancelled: bool = False


@dataclass(frozen=True)
class Residuals:
    """Step 4's numbers for one configuration.

    Attributes:
        norms: (N,) n, of each specialist's residuals.
        scales: (N,) s, which make them equal.
        energies: tensor name → (N,) float64, ‖F_il‖² of every matrix tensor.
        strength: λ and η.
    """

    norms: Tensor
    scales: Tensor
    energies: Mapping[str, Tensor]
    strength: Strength


@dataclass(frozen=True)
class Findings:
    """What steps 1–3 found.

    Attributes:
        config: the options they ran with.
        experts: their names, in order.
        plan: every tensor and its role.
        grams: tensor name → (N, N) float64 Gram matrix of every matrix and vector tensor.
        base_squares: tensor name → ‖θ₀‖² of each of which it is known, to 1e-5 of itself: those that are merged by
            factors come when they are written.
        real: coefficients of the core, the mixing, eigenvalues and gap.
        truncated: tensor name → what is known of its truncation.
        thresholds: (N,) float32, the smallest magnitude that TIES keeps of each expert; ``None`` for other methods.
    """

    config: MergeConfig
    experts: list[str]
    plan: Plan
    grams: Mapping[str, Tensor]
    base_squares: dict[str, float]
    real: RealSubspace
    truncated: Mapping[str, Truncated]
    thresholds: Tensor | None

    @cached_property
    def matrix_gram(self) -> Tensor:
        """(N, N) float64, ⟨τ_i, τ_j⟩ over matrix tensors."""
        return self._gram_of("matrix")

    @cached_property
    def vector_gram(self) -> Tensor:
        """The same over vector tensors."""
        return self._gram_of("vector")

    def _gram_of(self, role: str) -> Tensor:
        # Sums over tensors run in the order of names: the order in the file must not touch a bit.
        names = sorted(tensor.name for tensor in self.plan.tensors if tensor.role == role)
        return ordered_sum([self.grams[name] for name in names], len(self.experts), len(self.experts))

    @cached_property
    def residual_grams(self) -> Mapping[str, Tensor]:
        """(N, N) float64, ⟨X_i, X_j⟩ of each matrix tensor before truncation: Mᵀ G_l M."""
        names = [tensor.name for tensor in self.plan.of("matrix")]
        if not names:
            return {}
        grams, mixing = torch.stack([self.grams[name] for name in names]), self.real.mixing.expand(len(names), -1, -1)
        # A problem of its own each: a single product of all might round one by its place among them.
        return dict(zip(names, torch.bmm(torch.bmm(mixing.mT, grams), mixing), strict=True))

    @cached_property
    def residual_energies(self) -> Mapping[str, Tensor]:
        """(N,) float64, ‖X_i‖² of each matrix tensor before truncation."""
        grams = self.residual_grams
        return dict(zip(grams, torch.stack([*grams.values()]).diagonal(dim1=1, dim2=2), strict=True)) if grams else {}

    def at(self, tensor: PlannedTensor, config: MergeConfig) -> PlannedTensor:
        """A tensor with the truncation rank that it has under other options."""
        if tensor.role != "matrix":
            return tensor
        return tensor.at(residual_rank(config, tensor.name, tensor.spec.shape, len(self.experts)))

    def matrices(self, config: MergeConfig) -> list[PlannedTensor]:
        """Matrix tensors with their ranks under these options, largest first."""
        return [self.at(tensor, config) for tensor in self.plan.of("matrix")]

    def truncation_of(self, tensor: PlannedTensor, config: MergeConfig) -> Truncated | None:
        """How a tensor was truncated; ``None`` at other ranks than analyzed."""
        return self.truncated.get(tensor.name) if self.at(tensor, config).rank == tensor.rank else None

    def check(self, config: MergeConfig) -> None:
        """Whether these findings serve a merge with other options.

        Raises:
            BadOption: an option differs that they depend on, or a rank is larger than analyzed.
        """
        free = FREE_FIELDS if self.config.spectrum == "truncate" else FREE_FIELDS - {"rank", "ranks"}
        analyzed, asked = self.config.to_dict(), config.to_dict()
        for field in analyzed:
            if field not in free and analyzed[field] != asked[field]:
                raise BadOption(
                    f"{field}: this analysis was made with {getattr(self.config, field)!r} and cannot be merged with "
                    f"{getattr(config, field)!r}; analyze again"
                )
        if config.eta != 0 and self.config.eta == 0:
            raise BadOption("eta: this analysis was made with eta=0, without residuals; analyze again")
        for tensor in self.plan.of("matrix"):
            rank = self.at(tensor, config).rank
            if rank > tensor.rank:
                raise BadOption(
                    f"rank: tensor {quoted(tensor.name)} was analyzed at rank {tensor.rank} and cannot be merged at "
                    f"{rank}; analyze again"
                )
