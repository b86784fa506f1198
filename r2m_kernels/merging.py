"""R²M in its five steps, over state dicts, modules or any source of tensors.

1. :mod:`gram`: how the specialists' task vectors τ_i = θ_i − θ₀ lie to one another, N × N numbers a tensor;
2. :mod:`real_subspace`: the *Real* component they share, and the mixing that leaves each one's *Fake residual*;
3. :mod:`truncation`: residuals truncated to low rank, layer by layer;
4. :mod:`norm_matching`: one norm for all residuals, so that no generator dominates;
5. :mod:`combination`: θ₀ + core + residuals, rounded once.

No task vector or residual is ever held whole: steps 1 and 3 read the inputs and keep N × N numbers and low-rank
factors, step 5 reads them again and writes. What carries a step over checkpoints is ``_stream/``.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from . import (
    combination,
    differentiation,
    elements,
    gram,
    norm_matching,
    report,
    screening,
    tensor_checks,
    truncation,
)
from ._interface import Operators
from ._stream.budget import Inputs
from ._stream.parallel import deterministic
from ._stream.plan import Plan
from ._stream.processes import Journal, KeptFactors, ProcessGroup
from ._stream.run import Run, RunOptions, StepRecord
from ._stream.schedule import Pass
from ._stream.state_dicts import Checkpoint, Experts, StateDictSink, StateDictSource, open_checkpoints
from ._stream.tensors import TensorSink, TensorSource
from .adapters import Adapters, MergedChanges
from .config import MergeConfig, checked
from .differentiation import Numbers
from .errors import printable
from .fields import Screened
from .findings import Findings, Residuals, Truncated
from .overrides import Overrides
from .progress import Progress
from .real_subspace import real_subspace
from .residual_factors import ResidualFactors
from .screening import Screening
from .summary import Report
from .terms import Terms


def merge(
    base: Checkpoint,
    experts: Experts,
    config: MergeConfig | None = None,
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
    screen: Screened | None = None,
    differentiable: bool = False,
    numbers: Numbers | None = None,
    **overrides: Unpack[Overrides],
) -> dict[str, Tensor]:
    """Merge specialists fine-tuned from one base into one state dict (R²M, arXiv 2509.24367).

    Args:
        base: θ₀, a state dict or module; also a compiled or parallel one, whatever the experts are.
        experts: θ_1 … θ_N: a sequence, or name → state dict or module.
        config: options; default ``MergeConfig.r2m()``.
        device: where to compute; default: where the base's tensors are.
        backend: ``"auto"`` or a backend by name, which then never falls back.
        memory_budget: bytes, or text such as "4GiB", for what is held (r2m_kernels/README.md §10).
        dtype: dtype of the floating-point outputs, or its name; default: each tensor's dtype in the base.
        progress: called with a :class:`ProgressEvent` as tensors are done, such as :class:`ProgressLines`.
        screen: what becomes of experts that :func:`screen` suspects: ``"refuse"``: DoesNotFit; ``"leave-out"``: they
            are, with a warning; ``None``: nobody looks.
        differentiable: whether the result keeps the graph to ``numbers``; all inputs stay in memory with it.
        numbers: instead of what the options say and the merge finds, so that they can be learned (docs/python.md). Of
            sums of core and residuals alone, in the base's dtypes; a derivative through a row's weights is a first one.
        overrides: fields of :class:`MergeConfig`.

    Returns:
        Names, shapes, dtypes and order of the base (then the extras, with ``extra="average"``), on the base's devices.
        Inputs are never modified.

    Raises:
        InvalidInput: checkpoints that do not fit, NaN or Inf (named by expert and tensor), bad options.
        BackendUnavailable: the named backend cannot run here.

    Examples:
        >>> base = {"w": torch.zeros(2, 2)}
        >>> experts = {"fs": {"w": torch.eye(2)}, "fr": {"w": torch.ones(2, 2)}}
        >>> merge(base, experts, MergeConfig.weight_average())["w"]
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    config = checked(config, MergeConfig.r2m()).replace(**overrides)
    dtype = tensor_checks.output_dtype(dtype)  # before the work, not after it
    differentiation.numbers_of(numbers, differentiable, dtype)
    how: dict[str, Any] = {
        "device": device,
        "backend": backend,
        "memory_budget": memory_budget,
        "progress": progress,
    }
    if screen is not None:
        experts, config = _screened(base, experts, config, screen, how)
    analysis = analyze(base, experts, config, **how)
    return analysis.merge(dtype=dtype, progress=progress, differentiable=differentiable, numbers=numbers)


def screen(
    base: Checkpoint,
    experts: Experts,
    config: MergeConfig | None = None,
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    progress: Progress | None = None,
    processes: ProcessGroup | None = None,
) -> Screening:
    """Which experts do not look like specialists of this base, as the others do: step 1 alone, one pass over them.

    Arguments and errors are :func:`analyze`'s; of ``config`` counts what it says of names.

    Examples:
        >>> base, eye = {"w": torch.eye(2) * 9}, torch.eye(2)
        >>> experts = {"fs": {"w": eye * 10}, "fr": {"w": eye * 10}, "efs": {"w": torch.tensor([[9.9, 0.3], [0, 10]])}}
        >>> screen(base, experts).suspects
        {'fr': "its task vector has cosine 1.000 with another's: the same specialist twice"}
    """
    asked = checked(config, MergeConfig.r2m())
    names = {name: getattr(asked, name) for name in ("exclude", "keep", "average", "extra", "head")}
    analysis = analyze(
        base,
        experts,
        MergeConfig.weight_average().replace(**names),
        device=device,
        backend=backend,
        memory_budget=memory_budget,
        progress=progress,
        processes=processes,
    )
    return analysis.screening()


def _screened(
    base: Checkpoint, experts: Experts, config: MergeConfig, mode: str, how: dict[str, Any]
) -> tuple[dict[str, TensorSource], MergeConfig]:
    """Experts and configuration without those that are suspected, which are refused if ``mode`` says so."""
    _, named = open_checkpoints(base, experts)
    found = screen(base, named, config, **how)
    kept = found.kept(mode)
    for line in found.told:
        warnings.warn(f"left out: {line}", stacklevel=3)
    if config.weights is not None:
        weights = dict(zip(named, config.weights, strict=True))
        config = config.replace(weights=tuple(weights[name] for name in kept))
    return {name: named[name] for name in kept}, config


@deterministic
def analyze(
    base: Checkpoint,
    experts: Experts,
    config: MergeConfig | None = None,
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    memory_budget: int | str | None = None,
    spill_directory: str | Path | None = None,
    progress: Progress | None = None,
    processes: ProcessGroup | None = None,
    journal: Journal | None = None,
    kept: KeptFactors | None = None,
    **overrides: Unpack[Overrides],
) -> Analysis:
    """Steps 1–3 once; the result merges at any smaller rank, other eta, core scale or norm matching for step 5's cost.

    The maths: r2m_kernels/README.md §2–§4.

    Arguments and errors are :func:`merge`'s; ``base`` and ``experts`` may also be :class:`TensorSource` objects, and
    :class:`RunOptions` has the rest. With ``eta=0`` nothing is truncated. Several ``processes`` that call this alike
    share the work: then each one's :meth:`Analysis.write` writes tensors of its own.

    Examples:
        >>> base, experts = {"w": torch.zeros(20, 20)}, [{"w": torch.eye(20)}, {"w": torch.ones(20, 20)}]
        >>> analysis = analyze(base, experts, rank=0.5)
        >>> weaker = analysis.merge(eta=0.3, rank=0.25)
        >>> weaker["w"].shape
        torch.Size([20, 20])
    """
    config = checked(config, MergeConfig.r2m()).replace(**overrides)
    options = RunOptions(device, backend, memory_budget, spill_directory, processes, journal, kept)
    run = Run(Inputs(*open_checkpoints(base, experts)), config, options, passes)
    # 1. How the task vectors lie to one another.
    found = run.each(gram.GramStep(run, config), progress)
    grams, squares = gram.tasks_and_bases(found)
    # 2. What they share, and the mixing that leaves the residuals.
    real = real_subspace(gram.weighted(grams, run.plan, config, len(run.inputs.named)), config)
    # 3. Residuals cut to low rank. A mixing that is rounding leaves residuals that are rounding: nothing to truncate.
    truncated: dict[str, Truncated] = {}
    if config.eta != 0 and norm_matching.any_residual(real.mixing):
        truncated = run.each(truncation.TruncationStep(run, config, real.mixing, grams), progress)
    thresholds = elements.thresholds(run, config, progress)  # of TIES, which has another step 3
    return Analysis(
        run, Findings(config, list(run.inputs.named), run.plan, grams, squares, real, truncated, thresholds)
    )


class Analysis:
    """What steps 1–3 found, ready to be merged at the cost of steps 4 and 5. Made by :func:`analyze`.

    It reads its inputs again at every merge: they must not change in between (``model.state_dict()`` shares memory with
    the model). A smaller rank takes the leading components, which is near-optimal but not bit for bit what an analysis
    at that rank gives. A tensor that was analyzed at its full rank has no factors yet: the first merge at a smaller one
    truncates it, and keeps the factors in memory.

    Attributes:
        config, experts, plan, grams, matrix_gram, vector_gram: of :class:`Findings`.
        base_squares: tensor name → ‖θ₀‖² of every matrix and vector, to 1e-5 of itself.
        real_subspace, gram: coefficients of the core, mixing, eigenvalues and gap; (N, N) float64 G = Σ γ_l G_l.
        backend, device: who computed it, why and where.
        notes: sentences on what was understood in another way than it was given: names of wrapped modules.

    It cannot be pickled: it reads its inputs again, and keeps factors in a file.
    """

    def __init__(self, run: Run, findings: Findings) -> None:
        self._run, self._findings, self._factors = run, findings, ResidualFactors(findings, run)
        self.config, self.experts, self.plan = findings.config, findings.experts, findings.plan
        self.real_subspace, self.gram, self.grams = findings.real, findings.real.gram, dict(findings.grams)
        self.matrix_gram, self.vector_gram = findings.matrix_gram, findings.vector_gram
        self.backend, self.device = run.backend, run.device
        self._residual_norms: dict[str, float] = {}  # of what was written, where rows are weighted: by its options
        self.notes = tuple(note for source in run.inputs.experts for note in getattr(source, "notes", ()))

    def __repr__(self) -> str:
        return (
            f"<Analysis of {len(self.experts)} experts ({', '.join(map(printable, self.experts))}): {self.plan!r}, "
            f"{self.config!r}, {self.backend.name} on {self.device}>"
        )

    def merge(
        self,
        config: MergeConfig | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        progress: Progress | None = None,
        differentiable: bool = False,
        numbers: Numbers | None = None,
        **overrides: Unpack[Overrides],
    ) -> dict[str, Tensor]:
        """The merged state dict for these options or the analysis's own; :func:`merge` has the rest.

        Raises:
            InvalidInput: an option differs that the analysis depends on, or the rank is larger than analyzed.
        """
        config = checked(config, self.config).replace(**overrides)
        numbers = differentiation.numbers_of(numbers, differentiable, dtype)
        if numbers is not None:
            with contextlib.nullcontext() if differentiable else torch.no_grad():
                return differentiation.merged(self._run, self._findings, self._factors, config, numbers, progress)
        base = self._run.inputs.base
        sink = StateDictSink(base.devices if isinstance(base, StateDictSource) else {}, self.plan.aliases)
        self.write(sink, config, dtype=dtype, progress=progress)
        return sink.state_dict

    @deterministic
    def write(
        self,
        sink: TensorSink,
        config: MergeConfig | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Steps 4 and 5 into a sink, tensor by tensor. Errors are :meth:`merge`'s."""
        dtype = tensor_checks.output_dtype(dtype)
        config = checked(config, self.config)
        terms = self._terms(config)
        self._residual_norms[repr(config.to_dict())] = combination.write(self._run, terms, sink, dtype, progress)

    @property
    @deterministic
    def base_squares(self) -> dict[str, float]:
        """See the class. Of tensors that are merged by factors it is found as they are written, or read for it here."""
        known = self._findings.base_squares
        for tensor in self.plan.tensors:
            if tensor.factored and tensor.name not in known:
                known[tensor.name] = combination.base_square(self._run, tensor)
        return dict(known)

    def adapters(self, config: MergeConfig | None = None, **overrides: Unpack[Overrides]) -> Adapters:
        """The merge taken apart: one model, and what each expert adds to its matrices, by few columns.

        Raises:
            InvalidInput: as :meth:`merge`; or there are no truncated residuals with these options.
        """
        return Adapters(self._run, self._terms(checked(config, self.config).replace(**overrides)))

    def changes(self, config: MergeConfig | None = None, **overrides: Unpack[Overrides]) -> MergedChanges:
        """What the merge adds to matrices that experts changed by few columns, as such a product itself."""
        return MergedChanges(self._run, self._terms(checked(config, self.config).replace(**overrides)))

    @deterministic
    def _terms(self, config: MergeConfig) -> Terms:
        # 4. One norm for all residuals.
        residuals = self.residuals(config)
        # 5. What each tensor is made of.
        return Terms(self._findings, residuals, config, self._factors.of, self._factors.lengths, self._run.factors.rows)

    @deterministic
    def residuals(self, config: MergeConfig | None = None) -> Residuals:
        """Norms n, scales s, λ and η for these options."""
        config = checked(config, self.config)
        self._findings.check(config)
        return norm_matching.match(self._findings, self._factors.products(config), config)

    def report(self, config: MergeConfig | None = None) -> Report:
        """All that is known of the merge, as plain JSON values (keys: docs/files.md). Printed, it is in words.

        Where rows are weighted, the residual term's norm is measured as it is added: it is known of what was written.
        """
        config = checked(config, self.config)
        measured = self._residual_norms.get(repr(config.to_dict()))
        residuals = norm_matching.with_norm(self.residuals(config), measured, self._findings)
        return report.report(self._findings, residuals, self.base_squares, config, self._run)

    @deterministic
    def screening(self) -> Screening:
        """What tells an expert from the others, and whom it makes a suspect (README §7)."""
        return screening.screen(self._findings, self.base_squares, self._run.inputs)

    @property
    def steps(self) -> list[StepRecord]:
        """Time and bytes of each step so far, the last write included."""
        return list(self._run.records.values())

    @property
    def spilled_bytes(self) -> int:
        """Bytes of low-rank factors that went to disk."""
        return self._run.factors.spilled_bytes

    @property
    def elsewhere(self) -> list[str]:
        """Tensors that other processes write."""
        return [tensor.name for tensor in self.plan.tensors if not self._run.owns(tensor)]


def passes(plan: Plan, config: MergeConfig, operators: Operators) -> list[Pass]:
    """All passes over the tensors that a merge makes, as they are known before it."""
    return [
        gram.gram_pass(plan, config, operators),
        truncation.truncation_pass(plan, config, operators),
        *elements.count_passes(plan, config),
        combination.combination_pass(plan.of(*combination.ROLES), config),
    ]
