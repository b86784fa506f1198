"""The five steps in order (4 and 5 through :mod:`r2m_kernels.analysis`), over state dicts, modules or any source.

No task vector or residual is ever held whole: steps 1 and 3 read the inputs and keep N × N numbers and low-rank
factors, step 5 reads them again and writes. Nothing here depends on the order of tensors or the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _backends, checks, gram, norm_matching, tensor_checks
from . import elements as elementwise
from ._stream import compatibility
from ._stream.compatibility import Plan
from ._stream.engine import Cut, Engine, Group, Progress, ProgressEvent
from ._stream.parallel import deterministic
from ._stream.processes import Journal, ProcessGroup
from ._stream.spill import FactorStore
from ._stream.tensors import StateDictSource, TensorSource, compute_dtype
from .analysis import Analysis, Truncated
from .config import MergeConfig, checked
from .errors import BadOption, quoted
from .real_subspace import layer_weights, real_subspace
from .spectra import map_spectra
from .truncation import truncate_residuals

__all__ = ["Analysis", "Checkpoint", "Progress", "ProgressEvent", "analyze", "merge"]

StateDict = Mapping[str, Tensor]
Checkpoint = StateDict | nn.Module | TensorSource


def merge(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint] | Sequence[Checkpoint],
    config: MergeConfig | None = None,
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> dict[str, Tensor]:
    """Merge specialists fine-tuned from one base into one state dict (R²M, arXiv 2509.24367).

    Args:
        base: θ₀, a state dict or module.
        experts: θ_1 … θ_N: a sequence, or name → state dict or module.
        config: options; default ``MergeConfig.r2m()``.
        device: where to compute; default: where the base's tensors are.
        backend: ``"auto"`` or a backend by name, which then never falls back.
        memory_budget: bytes, or text such as "4GiB", for tensors in flight, low-rank factors and inputs that are kept
            (README §10). Factors beyond it go to the system's temporary directory; what is truncated is held whole.
        dtype: dtype of the floating-point outputs; default: each tensor's dtype in the base.
        overrides: fields of :class:`MergeConfig`.

    Returns:
        Names, shapes, dtypes and order of the base (then the extras, with ``extra="average"``), on the base's devices.
        Inputs are never modified.

    Raises:
        InvalidInput: checkpoints that do not fit, NaN or Inf (named by expert and tensor), bad options.
        BackendUnavailable: the named backend cannot run here.
    """
    settings = _settings(config, overrides)
    if dtype is not None:  # before the work, not after it
        tensor_checks.floating_dtype("dtype", dtype)
    analysis = analyze(base, experts, settings, device=device, backend=backend, memory_budget=memory_budget)
    return analysis.merge(dtype=dtype)


@deterministic
def analyze(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint] | Sequence[Checkpoint],
    config: MergeConfig | None = None,
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    spill_directory: str | Path | None = None,
    progress: Progress | None = None,
    team: ProcessGroup | None = None,
    journal: Journal | None = None,
    **overrides: Any,
) -> Analysis:
    """Steps 1–3 once; the result merges at any smaller rank, other eta, core scale or norm matching for step 5's cost.

    Arguments and errors are :func:`merge`'s. ``base`` and ``experts`` may also be :class:`TensorSource` objects.
    ``spill_directory`` takes the factors that exceed ``memory_budget``. With ``eta=0`` nothing is truncated.

    Several processes that call this alike, each with its member of a ``team``, share the work: then each one's
    :meth:`Analysis.write` writes tensors of its own. ``journal`` is told of all that is found, and asked for what a
    former run of the same merge found.
    """
    settings = _settings(config, overrides)
    if not isinstance(experts, Mapping | Sequence) or isinstance(experts, str):
        raise BadOption(f"experts: expected a sequence or a mapping by name, got {type(experts).__name__}")
    source = _as_source("base", base)
    named = experts if isinstance(experts, Mapping) else {f"expert{i}": item for i, item in enumerate(experts)}
    sources = {name: _as_source(f"expert '{name}'", item) for name, item in named.items()}
    plan = compatibility.plan(source, sources, settings)
    if device is None:
        device = _device_of(source, plan)
    budget = None if memory_budget is None else checks.byte_size("memory_budget", memory_budget)
    where = _backends.usable_device(device)
    chosen = _backends.choose(backend, where)
    engine = Engine(source, list(sources.values()), plan, where, chosen, budget, settings, team, journal)

    on_device = None if engine.device_budget is None else engine.device_budget // 2
    store = FactorStore(None if engine.shares is None else engine.shares.factors, spill_directory, on_device)
    if engine.spill > 0:
        store.reserve(engine.spill)

    # Step 1. Sums over tensors run in the order of names: the order in the file must not touch a bit.
    grams = engine.grams(plan.of("matrix", "vector", "statistic", "extra"), progress)
    matrices = sorted(tensor.name for tensor in plan.of("matrix"))
    vectors = sorted(tensor.name for tensor in plan.of("vector"))
    count = len(sources)
    # Step 2.
    gammas = layer_weights([grams[name] for name in matrices], settings)
    weighted = [gamma * grams[name] for gamma, name in zip(gammas, matrices, strict=True)]
    real = real_subspace(gram.ordered_sum(weighted, count), settings)
    # Step 3. A mixing that is rounding leaves residuals that are rounding: nothing to truncate.
    truncations: dict[str, Truncated] = {}
    if settings.eta != 0 and norm_matching.any_residual(real.mixing):
        # Largest first: the last thread to finish then has a small one in hand.
        truncated = [tensor for tensor in plan.of("matrix") if tensor.truncated]
        truncated.sort(key=lambda tensor: -tensor.spec.numel)

        def truncate(group: Group) -> Sequence[Any]:
            known = [grams[name] for name in group.names]
            rank, operators = group.tensors[0].rank, chosen.operators
            arguments = (group.names, group.bases, group.experts, real.mixing, rank, settings, operators, known)
            factors = truncate_residuals(*arguments)
            dtype = compute_dtype([group.bases[0], *(expert[0] for expert in group.experts)])
            factors = map_spectra(factors, settings, dtype)
            for name, of_tensor in zip(group.names, factors, strict=True):
                store.put(name, of_tensor)
            return [Truncated.of(of_tensor).plain() for of_tensor in factors]

        # Factors are not written down: a tensor that is not merged yet is truncated again, the same to the bit.
        merged, past = engine.journal.known("combination"), engine.journal.known("truncation")
        known = {name: value for name, value in past.items() if name in merged}
        values = engine.over("truncation", truncated, truncate, progress, known=known)
        truncations = {name: Truncated.from_plain(value) for name, value in values.items()}
    thresholds = _thresholds(engine, plan, settings, progress) if settings.elementwise == "ties" else None
    matrix_gram = gram.ordered_sum([grams[name] for name in matrices], count)
    vector_gram = gram.ordered_sum([grams[name] for name in vectors], count)
    return Analysis(
        settings, list(sources), plan, real, matrix_gram, vector_gram, grams, truncations, thresholds, engine, store
    )


def _thresholds(engine: Engine, plan: Plan, settings: MergeConfig, progress: Progress | None) -> Tensor:
    """The smallest magnitude that TIES keeps of each expert: (N,) float32."""
    tensors = plan.of("matrix", "vector")
    known = engine.journal.known("thresholds").get("all")
    # All members take the same way: one that sees an older journal would wait for others that do not count.
    known = engine.team.gather({str(engine.team.member): known})["0"]
    if known is not None:
        return torch.tensor(known, dtype=torch.float32)
    elements = sum(tensor.spec.numel for tensor in tensors)
    magnitudes = elementwise.Magnitudes(elements, settings.density, len(engine.experts))

    def count(group: Group) -> list[None]:
        for index in range(len(group.tensors)):
            magnitudes.count(*group.inputs(index))
        return [None] * len(group.tensors)

    cut = Cut(lambda _: elementwise.BLOCK, lambda tensor, values: None)
    engine.over("magnitudes", tensors, count, progress, cut=cut)
    magnitudes.gather(engine.team)
    magnitudes.narrow()
    engine.over("thresholds", tensors, count, progress, cut=cut)
    magnitudes.gather(engine.team)
    thresholds = magnitudes.thresholds()
    if engine.team.member == 0:
        engine.journal.record("thresholds", "all", thresholds.tolist())
    return thresholds


def _settings(config: MergeConfig | None, overrides: Mapping[str, Any]) -> MergeConfig:
    return (MergeConfig.r2m() if config is None else checked(config)).replace(**overrides)


def _as_source(label: str, checkpoint: Checkpoint) -> TensorSource:
    if isinstance(checkpoint, nn.Module):
        checkpoint = checkpoint.state_dict()
    if isinstance(checkpoint, Mapping):
        wrong = next((key for key, value in checkpoint.items() if not isinstance(value, Tensor)), None)
        if wrong is not None:
            raise BadOption(
                f"{label}: expected a state dict of tensors, got {type(checkpoint[wrong]).__name__} for {wrong!r}"
            )
        for name, tensor in checkpoint.items():
            if not isinstance(name, str):
                raise BadOption(f"{label}: expected names of tensors, got {name!r}")
            if tensor.is_meta or tensor.layout is not torch.strided:
                kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
                raise BadOption(f"{label}: expected dense tensors with data, got {quoted(name)} {kind}")
        return StateDictSource(label, checkpoint)
    if not isinstance(checkpoint, TensorSource):
        raise BadOption(f"{label}: expected a state dict, a module or a TensorSource, got {type(checkpoint).__name__}")
    return checkpoint


def _device_of(source: TensorSource, plan: Plan) -> torch.device:
    if isinstance(source, StateDictSource):
        for tensor in plan.tensors:
            if tensor.name in source.devices:
                return source.devices[tensor.name]
    return torch.device("cpu")
