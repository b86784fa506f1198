"""What steps 1–3 found, and steps 4 and 5 made from it for any strength and any smaller rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import combination, gram, norm_matching, tensor_checks, update_scale
from . import elements as elementwise
from . import report as diagnostics
from . import spectra as spectral_maps
from ._backends import Backend
from ._stream.blocks import BLOCK_ELEMENTS, block_height
from ._stream.compatibility import Plan, PlannedTensor, residual_rank
from ._stream.engine import Cut, Engine, Group, Progress, StepRecord
from ._stream.parallel import deterministic
from ._stream.spill import FactorStore
from ._stream.tensors import PartialSink, StateDictSink, StateDictSource, TensorSink, compute_dtype, dtype_name
from .config import FREE_FIELDS, MergeConfig, checked
from .errors import BadOption, NotFinite, R2MError, quoted
from .real_subspace import RealSubspace
from .row_weights import weighted_factors
from .truncation import Factors, truncate_residuals


@dataclass(frozen=True)
class Truncated:
    """What is known of one tensor's truncation beside the factors.

    Attributes:
        products: (N, N) float64, ⟨F_i, F_j⟩.
        gap, method: of :class:`r2m_kernels.truncation.Factors`.
    """

    products: Tensor
    gap: Tensor | None
    method: str

    @classmethod
    def of(cls, factors: Factors) -> Truncated:
        """From the factors themselves."""
        return cls(factors.inner_products(), factors.gap, factors.method)

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
class Residuals:
    """Steps 4 and 5's numbers for one configuration."""

    norms: Tensor  # (N,) n
    scales: Tensor  # (N,) s
    strength: combination.Strength


class Analysis:
    """What steps 1–3 found, ready to be merged at the cost of step 5. Made by :func:`analyze`.

    It reads its inputs again at every merge: they must not change in between (``model.state_dict()`` shares memory with
    the model). A smaller rank takes the leading components, which is near-optimal but not bit for bit what an analysis
    at that rank gives. A tensor that was analyzed at its full rank has no factors yet: the first merge at a smaller one
    truncates it, and keeps the factors in memory.

    Attributes:
        config: the options it was made with; its rank is the largest that can be merged.
        experts: their names, in order.
        plan: every tensor and its role.
        real_subspace: coefficients of the core, the mixing, eigenvalues and gap.
        matrix_gram: (N, N) float64, ⟨τ_i, τ_j⟩ over matrix tensors.
        vector_gram: the same over vector tensors.
    """

    def __init__(
        self,
        config: MergeConfig,
        experts: list[str],
        plan: Plan,
        subspace: RealSubspace,
        matrix_gram: Tensor,
        vector_gram: Tensor,
        grams: dict[str, Tensor],
        truncations: dict[str, Truncated],
        thresholds: Tensor | None,
        engine: Engine,
        store: FactorStore,
    ) -> None:
        self.config = config
        self.experts = experts
        self.plan = plan
        self.real_subspace = subspace
        self.matrix_gram = matrix_gram
        self.vector_gram = vector_gram
        self._grams = grams
        self._engine = engine
        self._store = store
        inner = {name: truncated.products for name, truncated in truncations.items()}
        self._inner_at: dict[str, dict[str, Tensor]] = {_ranks(config): inner}
        self._truncations = truncations
        self._thresholds = thresholds
        self._late: dict[tuple[str, int], Factors] = {}

    @property
    def gram(self) -> Tensor:
        """(N, N) float64: G = Σ γ_l G_l."""
        return self.real_subspace.gram

    @property
    def per_tensor(self) -> list[dict[str, Any]]:
        """Role, shape, rank and kept energy of every tensor; see :meth:`report`."""
        return diagnostics.tensor_rows(self, self.config, self._inner_products(self.config))

    @property
    def backend(self) -> Backend:
        """Who computed it, and why."""
        return self._engine.backend

    @property
    def device(self) -> torch.device:
        """Where it was computed."""
        return self._engine.device

    @property
    def steps(self) -> list[StepRecord]:
        """Time and bytes of each step so far, the last write included."""
        return list(self._engine.steps.values())

    @property
    def spilled_bytes(self) -> int:
        """Bytes of low-rank factors that went to disk."""
        return self._store.spilled_bytes

    @property
    def elsewhere(self) -> list[str]:
        """Tensors that other members of the team write."""
        return [tensor.name for tensor in self.plan.tensors if not self._engine.owns(tensor)]

    @property
    def grams(self) -> dict[str, Tensor]:
        """(N, N) float64 Gram matrix of every matrix and vector tensor."""
        return dict(self._grams)

    def tensor_gram(self, name: str) -> Tensor:
        """(N, N) float64 Gram matrix of one matrix or vector tensor."""
        return self._grams[name]

    def residual_gram(self, name: str) -> Tensor:
        """(N, N) float64, ⟨X_i, X_j⟩ of one matrix tensor before truncation: Mᵀ G_l M."""
        mixing = self.real_subspace.mixing
        return mixing.T @ self._grams[name] @ mixing

    def truncation_of(self, tensor: PlannedTensor, config: MergeConfig) -> Truncated | None:
        """How a tensor was truncated; None at other ranks than analyzed."""
        return self._truncations.get(tensor.name) if self.rank_of(tensor.name, config) == tensor.rank else None

    def rank_of(self, name: str, config: MergeConfig) -> int:
        """Truncation rank of one matrix tensor under these options."""
        return residual_rank(config, name, self._engine.base.specs[name].shape, len(self.experts))

    def merge(
        self, config: MergeConfig | None = None, *, dtype: torch.dtype | None = None, **overrides: Any
    ) -> dict[str, Tensor]:
        """The merged state dict for these options or the analysis's own; :func:`merge` has the rest.

        Raises:
            InvalidInput: an option differs that the analysis depends on, or the rank is larger than analyzed.
        """
        source = self._engine.base
        devices = source.devices if isinstance(source, StateDictSource) else {}
        sink = StateDictSink(devices, self.plan.aliases)
        settings = self._settings(config)
        self.write(sink, settings.replace(**overrides), dtype=dtype)
        return sink.state_dict

    @deterministic
    def write(
        self,
        sink: TensorSink,
        config: MergeConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Step 5 into a sink, tensor by tensor. Errors are :meth:`merge`'s."""
        settings = self._settings(config)
        if dtype is not None:
            tensor_checks.floating_dtype("dtype", dtype)
        residuals = self.residuals(settings)
        specs = self.plan.output_specs(self._engine.base.specs, dtype)
        engine = self._engine
        trouble: Exception | None = None
        try:
            sink.begin(specs)
        except (R2MError, OSError) as error:
            trouble = error
        engine.team.gather({}, trouble)  # nobody writes before all is laid out

        def combine(group: Group) -> list[None]:
            dtypes = [specs[name].dtype for name in group.names]
            for tensor, merged in zip(group.tensors, self._merged(group, settings, residuals, dtypes), strict=True):
                for name in [tensor.name, *self.plan.tied.get(tensor.name, ())]:
                    if group.part is None:
                        sink.write(name, merged)
                    else:
                        assert isinstance(sink, PartialSink)
                        sink.write_elements(name, group.part.start, merged.reshape(-1))
            return [None] * len(group.tensors)

        partial = isinstance(sink, PartialSink)
        cut = Cut(lambda tensor: self._granule(tensor, settings) if partial else None, lambda tensor, values: None)
        roles = self.plan.of("matrix", "vector", "statistic", "copied", "extra")
        engine.over("combination", roles, combine, progress, cut=cut, resume=True)

    @deterministic
    def residuals(self, config: MergeConfig | None = None) -> Residuals:
        """Norms n, scales s, λ and η for these options."""
        settings = self._settings(config)
        self._check(settings)
        inner = self._inner_products(settings)
        count, weights = len(self.experts), self.real_subspace.weights
        matrix = gram.ordered_sum([inner[name] for name in sorted(inner)], count)
        center = torch.eye(count, dtype=torch.float64) - weights
        vector = center @ self.vector_gram @ center.T
        longest = _longest(self.matrix_gram + self.vector_gram)
        norms = norm_matching.residual_norms(matrix.diag() + vector.diag(), longest)
        scales = norm_matching.matching_scales(norms, weights, settings.norm_match)
        core = self.real_subspace.core
        core_norm = float((core @ self.matrix_gram @ core).clamp_min(0).sqrt())
        longest = _longest(self.matrix_gram)
        restored = update_scale.gain(self.matrix_gram, weights)
        strength = combination.strength(settings, core_norm, restored, matrix, scales, weights, longest)
        return Residuals(norms, scales, strength)

    def report(self, config: MergeConfig | None = None) -> dict[str, Any]:
        """Everything a user may ask about the merge, as plain JSON values; README §7 lists the keys."""
        settings = self._settings(config)
        return diagnostics.report(self, settings, self.residuals(settings), self._inner_products(settings))

    def _settings(self, config: MergeConfig | None) -> MergeConfig:
        return self.config if config is None else checked(config)

    def _check(self, config: MergeConfig) -> None:
        ours, theirs = self.config.to_dict(), config.to_dict()
        free = FREE_FIELDS if self.config.spectrum == "truncate" else FREE_FIELDS - {"rank", "ranks"}
        for field in ours:
            if field not in free and ours[field] != theirs[field]:
                raise BadOption(
                    f"{field}: this analysis was made with {getattr(self.config, field)!r} and cannot be merged with "
                    f"{getattr(config, field)!r}; analyze again"
                )
        if config.eta != 0 and self.config.eta == 0:
            raise BadOption("eta: this analysis was made with eta=0, without residuals; analyze again")
        for tensor in self.plan.of("matrix"):
            rank = self.rank_of(tensor.name, config)
            if rank > tensor.rank:
                raise BadOption(
                    f"rank: tensor {quoted(tensor.name)} was analyzed at rank {tensor.rank} and cannot be merged at "
                    f"{rank}; analyze again"
                )

    def _inner_products(self, config: MergeConfig) -> dict[str, Tensor]:
        """⟨F_il, F_jl⟩ of every matrix tensor at the config's rank."""
        if config.eta == 0:
            return {}
        rank = _ranks(config)
        if rank not in self._inner_at:
            found = {
                tensor.name: factors.inner_products()
                for tensor in self.plan.of("matrix")
                if self._engine.owns(tensor) and (factors := self._factors(tensor, config)) is not None
            }
            self._inner_at[rank] = self._engine.team.gather(found)
        whole = {
            tensor.name: self.residual_gram(tensor.name)
            for tensor in self.plan.of("matrix")
            if self._kept_whole(tensor, config)
        }
        return {**self._inner_at[rank], **whole}

    def _granule(self, tensor: PlannedTensor, config: MergeConfig) -> int | None:
        """Elements of the blocks that the combination works in; None where it needs the tensor whole."""
        if tensor.role != "matrix" or config.elementwise != "none":
            return BLOCK_ELEMENTS
        if config.core_spectrum == "flat" or config.scale == "column":
            return None  # all singular values, all rows of a column
        linear = self._kept_whole(tensor, config) and (config.row_power == 0 or config.eta == 0)
        if linear or config.eta == 0:
            return BLOCK_ELEMENTS
        return block_height(*tensor.matrix_shape) * tensor.matrix_shape[1]

    def _kept_whole(self, tensor: PlannedTensor, config: MergeConfig) -> bool:
        return self.rank_of(tensor.name, config) == min(tensor.matrix_shape) and not tensor.mapped

    def _factors(self, tensor: PlannedTensor, config: MergeConfig) -> Factors | None:
        """Truncated residuals at the config's rank; None where there are none, or nothing is truncated."""
        rank = self.rank_of(tensor.name, config)
        if tensor.name in self._store:
            return self._store.get(tensor.name).truncated(rank)
        if self._kept_whole(tensor, config) or not norm_matching.any_residual(self.real_subspace.mixing):
            return None
        # Analyzed at full rank, where factors were not needed, and asked for at a smaller one: truncated now.
        key = (tensor.name, rank)
        if key not in self._late:
            group = self._engine.load([tensor])
            mixing, operators = self.real_subspace.mixing, self._engine.backend.operators
            (self._late[key],) = truncate_residuals(
                group.names, group.bases, group.experts, mixing, rank, self.config, operators
            )
        return self._late[key]

    def _merged(
        self, group: Group, config: MergeConfig, residuals: Residuals, dtypes: list[torch.dtype]
    ) -> list[Tensor]:
        """The merged tensors of a group, whose role and rank are one; of a part, its elements."""
        first, engine = group.tensors[0], self._engine
        if first.role == "copied":
            return [engine.read(engine.base, tensor, group.part).clone() for tensor in group.tensors]
        if first.role in ("statistic", "extra"):
            weights = self.real_subspace.weights
            means = (engine.mean_of_experts(tensor, weights, group.part) for tensor in group.tensors)
            return _in_range(group.names, [mean.to(dtype) for mean, dtype in zip(means, dtypes, strict=True)])
        # Contiguous, whatever the base's strides: `empty_like` would keep a transposed or channels-last layout.
        outs = [
            torch.empty(base.shape, dtype=dtype, device=base.device)
            for base, dtype in zip(group.bases, dtypes, strict=True)
        ]
        if first.role == "matrix" and config.scale != "none":
            for index in range(len(group.tensors)):
                self._combine_scaled(group.single(index), config, residuals, outs[index])
        else:
            self._combine(group, config, residuals, outs)
        return _in_range(group.names, outs)

    def _combine_scaled(self, group: Group, config: MergeConfig, residuals: Residuals, out: Tensor) -> None:
        """One matrix with its change scaled as a whole or by columns."""
        if config.scale == "layer":
            gain = update_scale.gain(self._grams[group.names[0]], self.real_subspace.weights)
            strength = residuals.strength
            strength = replace(strength, core_scale=gain * strength.core_scale, eta=gain * strength.eta)
            self._combine(group, config, replace(residuals, strength=strength), [out])
            return
        base, experts = group.inputs(0)
        wide = torch.empty(out.shape, dtype=compute_dtype([base, *experts]), device=out.device)
        self._combine(group, config, residuals, [wide])
        self._engine.backend.operators.match_columns(base, experts, wide, self.real_subspace.core.abs(), out)

    def _combine(self, group: Group, config: MergeConfig, residuals: Residuals, outs: list[Tensor]) -> None:
        """Step 5 for tensors of one role, shape and rank."""
        first, part = group.tensors[0], group.part
        strength, scales, shares = residuals.strength, residuals.scales, self.real_subspace.weights
        if config.elementwise != "none":
            self._combine_elements(group, config, strength.core_scale, outs)
            return
        core, mixing = self.real_subspace.core, self.real_subspace.mixing
        left = right = scale = None
        by_row = config.row_power > 0 and strength.eta != 0
        if first.role == "vector":
            weights = combination.vector_coefficients(scales, shares, strength.core_scale, strength.eta)
        elif by_row and self._kept_whole(first, config):
            group, outs = (group, outs) if part is None else _in_rows(group, outs)
            combine_rows, core_part = self._engine.backend.operators.combine_rows, strength.core_scale * core
            for index, out in enumerate(outs):
                base, experts = group.inputs(index)
                combine_rows(base, experts, core_part, mixing, shares, scales, strength.eta, config.row_power, out)
            return
        elif self._kept_whole(first, config):
            weights = combination.full_rank_coefficients(
                core, mixing, scales, shares, strength.core_scale, strength.eta
            )
        else:
            weights = combination.matrix_coefficients(core, strength.core_scale)
            found = [self._factors(tensor, config) for tensor in group.tensors] if strength.eta != 0 else []
            factors = [one for one in found if one is not None]
            if factors:
                lefts = [one.left for one in factors]
                if by_row:
                    weighted = (shares, scales, config.row_power)
                    lefts = [weighted_factors(one.left, one.right, *weighted) for one in factors]
                if part is not None:
                    group, outs = _in_rows(group, outs)
                    columns = first.matrix_shape[1]
                    lefts = [one[:, part.start // columns : part.stop // columns] for one in lefts]
                left = _stacked([one.to(self.device).mT for one in lefts]).mT  # rows, as kernels have them
                right = _stacked([one.right.to(self.device) for one in factors])
                scale = strength.eta * (torch.ones_like(scales) if by_row else shares * scales)
        if first.role == "matrix" and config.core_spectrum == "flat":
            for index, out in enumerate(outs):
                base, experts = group.inputs(index)
                change = spectral_maps.flattened(base, experts, len(core) * weights)
                out.copy_((base.double() + change.view(base.shape)).to(out.dtype))
            return
        self._engine.backend.operators.combine(group.bases, group.experts, weights, left, right, scale, outs)

    def _combine_elements(self, group: Group, config: MergeConfig, core_scale: float, outs: list[Tensor]) -> None:
        for index, (name, out) in enumerate(zip(group.names, outs, strict=True)):
            base, experts = group.inputs(index)
            weights, thresholds = self.real_subspace.weights, self._thresholds
            shape, start = group.tensors[index].spec.shape, 0 if group.part is None else group.part.start
            elementwise.combine(name, base, experts, out, weights, core_scale, config, thresholds, shape, start)


def _in_rows(group: Group, outs: list[Tensor]) -> tuple[Group, list[Tensor]]:
    """A part of a matrix, which is whole rows, and its output as rows."""
    columns = group.tensors[0].matrix_shape[1]
    base, experts = group.inputs(0)
    rows = [[expert.view(-1, columns)] for expert in experts]
    return replace(group, bases=[base.view(-1, columns)], experts=rows), [out.view(-1, columns) for out in outs]


def _stacked(factors: list[Tensor]) -> Tensor:
    """Those of several tensors as one; of a single one without a copy."""
    return factors[0].unsqueeze(0) if len(factors) == 1 else torch.stack(factors)


def _in_range(names: list[str], merged: list[Tensor]) -> list[Tensor]:
    # Smallest and largest are NaN or Inf if any element is, and take one read. One wait for the device.
    extremes = torch.stack([torch.stack(torch.aminmax(tensor)) for tensor in merged]).tolist()
    for name, tensor, bounds in zip(names, merged, extremes, strict=True):
        if not all(map(math.isfinite, bounds)):
            raise NotFinite(
                f"tensor {quoted(name)}: merged values exceed the range of {dtype_name(tensor.dtype)}; ask for a wider "
                "dtype or smaller core_scale and eta"
            )
    return merged


def _ranks(config: MergeConfig) -> str:
    """What decides the ranks, as text: 1 (rank one) and 1.0 (full rank) are the same key otherwise."""
    return repr((config.rank, config.ranks))


def _longest(squares: Tensor) -> float:
    """max_j ‖τ_j‖ from a Gram matrix."""
    return float(squares.diag().max().clamp_min(0).sqrt())
