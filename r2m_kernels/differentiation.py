"""Steps 4 and 5 as a function of their numbers that autograd can differentiate, so that someone can learn them.

The result has the bits of the merge with the same numbers: kernels compute it, and derivatives come from the formulas
in plain PyTorch. What no kernel needs, such as a mean of statistics, is the merge's own and constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import low_rank, norm_matching, ops, tensor_checks
from ._interface import Operators
from ._stream import parallel
from ._stream.loader import Group
from ._stream.run import Run
from ._stream.state_dicts import StateDictSink, StateDictSource
from .combination import ROLES, CombinationStep
from .config import MergeConfig
from .errors import BadOption, quoted
from .findings import Findings
from .progress import Progress, ProgressEvent
from .residual_factors import ResidualFactors
from .row_weights import row_shares
from .terms import ByRows, Linear, LowRank, Term, Terms, Unchanged, kind_of

# What makes a tensor something else than a sum of core and residuals.
NOT_SUMS = ("scale", "elementwise", "core_spectrum", "descent_steps")
TINY = torch.finfo(torch.float64).tiny


class Numbers(NamedTuple):
    """Numbers of a merge that can be learned; what is ``None`` is what the merge finds, or its options say.

    Each is a number of its own: with another mixing, say, scales stay what they are.

    Attributes:
        core_scale, eta: instead of the options of these names: tensors of one element.
        scales: (N,) s, by which residuals are matched (``Analysis.residuals().scales``).
        mixing: (N, N) M, residual i = Σ_j M[j, i] τ_j (``Analysis.real_subspace.mixing``); of whole residuals alone.
    """

    core_scale: Tensor | None = None
    eta: Tensor | None = None
    scales: Tensor | None = None
    mixing: Tensor | None = None

    def checked(self, count: int) -> Numbers:
        """In float64 on the CPU, with their history.

        Raises:
            BadOption: one is no tensor of finite numbers, or of another shape.
        """
        found = {}
        for name, shape in (("core_scale", ()), ("eta", ()), ("scales", (count,)), ("mixing", (count, count))):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise BadOption(f"{name}: expected a tensor, got {type(value).__name__}")
            tensor_checks.floating(name, value)
            value = value.reshape(()) if shape == () and value.numel() == 1 else value
            tensor_checks.same_shape(name, value, shape)
            if not bool(torch.isfinite(value.detach()).all()):
                raise BadOption(f"{name}: expected finite numbers, got NaN or Inf")
            found[name] = value.to("cpu", torch.float64)
        return Numbers(**found)


def numbers_of(numbers: Numbers | None, differentiable: bool, dtype: torch.dtype | str | None) -> Numbers | None:
    """The numbers, where any are given.

    Raises:
        BadOption: they are none, there are none to differentiate by, or a dtype is asked for beside them.
    """
    if numbers is not None and not isinstance(numbers, Numbers):
        raise BadOption(f"numbers: expected r2m_kernels.Numbers, got {type(numbers).__name__}")
    if numbers is None and differentiable:
        raise BadOption(
            "differentiable: expected numbers to differentiate by, such as "
            "numbers=Numbers(eta=torch.tensor(0.5, requires_grad=True)), got none"
        )
    if numbers is not None and dtype is not None:
        raise BadOption(f"dtype: a merge by numbers has the base's dtypes; expected none, got {dtype}")
    return numbers


@parallel.differentiable
def merged(
    run: Run,
    findings: Findings,
    factors: ResidualFactors,
    config: MergeConfig,
    numbers: Numbers,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The merged state dict, with the history of the numbers.

    Args:
        run, findings, factors: of an analysis.
        config: of the merge.
        numbers: instead of what it says and they found.
        progress: as a merge has it.

    Raises:
        BadOption: there are no derivatives by these numbers.
    """
    numbers = numbers.checked(len(findings.experts))
    _refuse(run, findings, config, numbers)
    findings.check(config)
    # A tensor stands for a number, whose history it brings along.
    strength = {"core_scale": cast(float, numbers.core_scale), "eta": cast(float, numbers.eta)}
    residuals = norm_matching.match(findings, factors.products(config), config, scales=numbers.scales, **strength)
    if numbers.mixing is not None:
        findings = replace(findings, real=replace(findings.real, mixing=numbers.mixing))
    terms = Terms(findings, residuals, config, factors.of, factors.lengths, run.factors.rows)
    base = run.inputs.base
    sink = StateDictSink(base.devices if isinstance(base, StateDictSource) else {}, run.plan.aliases)
    specs = run.plan.output_specs(base.specs, None)
    sink.begin(specs)
    step = CombinationStep(run, terms, sink, specs)
    tensors, total, done = run.plan.of(*ROLES), sum(map(run.inputs.nbytes, run.plan.of(*ROLES))), 0
    for index, planned in enumerate(tensors, 1):
        tensor = terms.planned(planned)
        group = step.over.load(run.loader, [tensor])
        if tensor.role in ("matrix", "vector") and kind_of(tensor, terms.config) is not Unchanged:
            result = _made(terms.of(group), run, group)
            step.refuse_non_finite([tensor], result.detach().abs().amax().reshape(1))
            for name in (tensor.name, *run.plan.tied.get(tensor.name, ())):
                sink.write(name, result)
        else:
            with torch.no_grad():
                step.settled([([tensor], step.work(group))])
        done += run.inputs.nbytes(tensor)
        if progress is not None:
            progress(ProgressEvent(step.over.name, index, len(tensors), done, total))
    return sink.state_dict


def _made(term: Term, run: Run, group: Group) -> Tensor:
    (base, experts), operators, backend = group.inputs(0), run.backend.operators, run.backend.name
    if isinstance(term, Linear) or (isinstance(term, LowRank) and not term.factors):
        return ops.combine(base, experts, term.coefficients, backend=backend)
    if isinstance(term, LowRank):
        weighing = cast(Operators, _Weighing(operators))
        left, right, scale = replace(term, rounded=False).products(weighing, base.device)
        scale = torch.ones(len(experts), dtype=torch.float64) if scale is None else scale
        if term.rounded:
            return _of_rounded(operators, group, term.coefficients, left, right, scale)
        return ops.combine(base, experts, term.coefficients, left[0], right[0], scale, backend=backend)
    assert isinstance(term, ByRows)
    return _by_rows(term, operators, group)


def _of_rounded(
    operators: Operators, group: Group, coefficients: Tensor, left: Tensor, right: Tensor, scale: Tensor
) -> Tensor:
    """What is added of rounded factors, with the derivatives of the same before they were rounded."""
    base, experts = group.inputs(0)

    def summed(coefficients: Tensor, left: Tensor, scale: Tensor) -> Tensor:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
        given = low_rank.Products(left, right, scale).rounded()
        operators.combine(group.bases, group.experts, coefficients, *given, [out])
        return out

    def formula(coefficients: Tensor, left: Tensor, scale: Tensor) -> Tensor:
        theta, dtype = base.to(left.dtype), left.dtype
        changes = torch.stack([one.to(dtype) - theta for one in experts]).flatten(1)
        total = (coefficients.to(changes) @ changes).view(base.shape)
        added = ((left * scale.to(left).view(-1, 1, 1)) @ right).sum(dim=(0, 1))
        return (theta + total + added.view(base.shape)).to(base.dtype)

    return _as_formula(summed, formula, coefficients, left, scale)


class _Weighing:
    """A backend's operators, of which ``weigh_rows`` has derivatives by scales and factors."""

    def __init__(self, operators: Operators) -> None:
        self._operators = operators

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operators, name)

    def weigh_rows(
        self,
        left: Tensor,
        lengths: Tensor,
        weights: Tensor,
        scales: Tensor,
        power: float,
        factors: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """See :class:`r2m_kernels._interface.Operators`."""

        def kernel(scales: Tensor, factors: Tensor) -> Tensor:
            return self._operators.weigh_rows(left, lengths, weights, scales, power, factors, dtype)

        def formula(scales: Tensor, factors: Tensor) -> Tensor:
            shares = row_shares(lengths.clamp_min(TINY), weights, scales, power) * factors.to(lengths).view(-1, 1)
            return (left * shares.to(left.dtype).unsqueeze(-1)).to(dtype)

        return _as_formula(kernel, formula, scales, factors)


def _by_rows(term: ByRows, operators: Operators, group: Group) -> Tensor:
    base, experts = group.inputs(0)
    dtype, power, weights = group.compute_dtype, term.rows.power, term.rows.weights
    (known,) = term.grams
    rows = operators.row_grams(group.bases, group.experts).rows if known is None else known.to(base.device)[None]

    def coefficients(core: Tensor, mixing: Tensor, scales: Tensor, eta: Tensor) -> Tensor:
        return operators.row_coefficients(rows, core, mixing, weights, scales, float(eta), power, dtype)[0]

    def their_formula(core: Tensor, mixing: Tensor, scales: Tensor, eta: Tensor) -> Tensor:
        """(m, N): c_j + η Σ_i M_ji W_ri, where ‖row r of X_i‖² = Σ_jk M_ji M_ki ⟨row r of τ_j, of τ_k⟩."""
        pairs = torch.tril_indices(len(core), len(core))
        products = torch.where(pairs[0] == pairs[1], 1.0, 2.0).unsqueeze(1) * mixing[pairs[0]] * mixing[pairs[1]]
        squares = products.T.to(rows.device) @ rows[0]
        shares = row_shares(squares.clamp_min(TINY).sqrt(), weights, scales, power)
        found = core.to(rows.device) + eta.to(rows.device) * (mixing.to(rows.device) @ shares).T
        return found.to(dtype)

    def summed(chosen: Tensor) -> Tensor:
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
        operators.combine(group.bases, group.experts, chosen.unsqueeze(0), None, None, None, [out])
        return out

    def sum_formula(chosen: Tensor) -> Tensor:
        theta, by_row = base.to(dtype), (-1, *[1] * (base.ndim - 1))
        changes = [chosen[:, j].reshape(by_row) * (one.to(dtype) - theta) for j, one in enumerate(experts)]
        return torch.stack(changes).sum(0).add(theta).to(base.dtype)

    eta = torch.as_tensor(term.eta, dtype=torch.float64)
    chosen = _as_formula(coefficients, their_formula, term.core, term.mixing, term.rows.scales, eta)
    return _as_formula(summed, sum_formula, chosen)


class _AsFormula(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*inputs)
        return kernel(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        wanted = ctx.needs_input_grad[2:]
        inputs = [one.detach().requires_grad_(some) for one, some in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            result = ctx.formula(*inputs)
        chosen = [one for one, some in zip(inputs, wanted, strict=True) if some]
        found = iter(torch.autograd.grad(result, chosen, grad))
        return (None, None, *(next(found) if some else None for some in wanted))


def _as_formula(kernel: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What a kernel computes, with the derivatives, once, of the same in plain PyTorch."""
    result: Tensor = _AsFormula.apply(kernel, formula, *inputs)  # type: ignore[no-untyped-call]
    return result


def _refuse(run: Run, findings: Findings, config: MergeConfig, numbers: Numbers) -> None:
    """Whether a merge has derivatives by these numbers.

    Raises:
        BadOption: it is no sum of core and residuals, or not by one of them; or inputs require gradients, or are
            adapters.
    """
    for name in NOT_SUMS:
        value, plain = getattr(config, name), getattr(MergeConfig(), name)
        if value != plain and (name, value) != ("scale", "layer"):
            raise BadOption(
                f"{name}: expected {plain!r} where numbers are given, for a sum of core and residuals, got {value!r}"
            )
    for source in run.inputs.sources:
        if isinstance(source, StateDictSource) and source.differentiated is not None:
            raise BadOption(
                f"{source.label}: tensor {quoted(source.differentiated)} requires gradients, and a merge has none for "
                "what it merges; expected detached tensors"
            )
    tensors = findings.matrices(config)
    if any(tensor.factored for tensor in tensors):
        raise BadOption("experts: adapters have no derivatives; expected whole state dicts")
    if config.eta == 0 and any(one is not None for one in (numbers.eta, numbers.scales, numbers.mixing)):
        raise BadOption("eta: 0 leaves no residuals to learn anything of; expected another one")
    if numbers.eta is not None and float(numbers.eta.detach()) == 0:
        raise BadOption("eta: at 0 residuals are left out, and it has no derivative; expected another value")
    if numbers.scales is not None and config.eta_mode == "relative":
        raise BadOption("scales: a relative eta depends on them without a derivative; expected another eta_mode")
    truncated = next((one for one in tensors if not one.whole and config.eta != 0), None)
    if numbers.mixing is not None and truncated is not None:
        raise BadOption(
            f"mixing: truncation has no derivative, and tensor {quoted(truncated.name)} is cut to rank "
            f"{truncated.rank}; expected rank=1.0, which keeps residuals whole"
        )
