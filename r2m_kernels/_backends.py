"""Which implementation of the operators runs, and why."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from . import checks
from .errors import BackendUnavailable, BadOption

NAMES = ("auto", "torch", "native", "triton")
# Of NVIDIA GPUs: Ampere, the first with tf32 and bf16 matrix units.
OLDEST_CAPABILITY = 8


class ShiftedTruncation(Protocol):
    """A backend's fast method for step 3, for L tensors of one shape (README §4).

    Args:
        keys: (L,) int64, what the random numbers of each tensor are made from.
        energies: (L, N) float64, ‖X_li‖² from the task Gram.
        rank: r.
        iterations, oversampling, tolerance: of :class:`r2m_kernels.MergeConfig`.

    Returns:
        Left (L, N, m, r), Right (L, N, r, n): orthonormal on the short side; and on the CPU in float64 the inner
        products ⟨F_li, F_lj⟩ (L, N, N) where they are cheap here, whether each truncation can be relied on (L, N)
        bool, and an estimate of the energy that the best truncation would keep beyond this one's (L, N), NaN where
        there is none.
    """

    def __call__(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        mixing: Tensor,
        keys: Tensor,
        energies: Tensor,
        rank: int,
        iterations: int,
        oversampling: int,
        tolerance: float | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]: ...


class Operators(Protocol):
    """What a backend module provides: the heavy part of each step, for L tensors of one shape at once.

    The Gram's may have any shapes. ``bases`` holds L tensors, ``experts`` N sequences of L tensors; arguments are as
    :mod:`r2m_kernels.ops` checks them, with a leading L where a block belongs to a tensor.
    """

    def task_gram(
        self, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]], precise: bool = False
    ) -> Tensor: ...

    def residual_matmul(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        mixing: Tensor,
        rhs: Tensor,
        transpose: bool = False,
        precision: str = "ieee",
    ) -> Tensor: ...

    def orthonormalize(self, y: Tensor) -> Tensor: ...

    def gram_elements(self, precise: bool) -> int:
        """Elements of a panel: a tensor's Gram is the sum of its panels' in their order, to the bit."""
        ...

    def combine(
        self,
        bases: Sequence[Tensor],
        experts: Sequence[Sequence[Tensor]],
        core: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        scale: Tensor | None,
        outs: Sequence[Tensor],
    ) -> None: ...

    def combine_rows(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        core: Tensor,
        mixing: Tensor,
        weights: Tensor,
        scales: Tensor,
        eta: float,
        power: float,
        out: Tensor,
    ) -> None:
        """θ₀ + Σ_j core_j τ_j + η Σ_i W_i ∘ X_i, W_ri ∝ weights_i ‖row r of scales_i X_i‖^power, Σ_i W_ri = 1.

        The matching scales enter the weights alone: there they keep one generator from dominating, and residuals stay
        as long as they are.

        Args:
            base, experts: θ₀ and N θ_j of one shape (m, …); rows are slices of the first dimension.
            core: (N,) λ c, float64.
            mixing: (N, N) M, X_i = Σ_j M_ji τ_j, float64.
            weights: (N,) w, summing to 1, float64.
            scales: (N,) s, float64.
            eta: η.
            power: p > 0.
            out: where to write, contiguous; rounded once to its dtype.
        """
        ...

    def match_columns(
        self, base: Tensor, experts: Sequence[Tensor], merged: Tensor, counts: Tensor, out: Tensor
    ) -> None:
        """Every column of the merged change scaled to Σ_j counts_j ‖column of τ_j‖ / Σ_j counts_j.

        Args:
            base, experts: θ₀ and N θ_j of one shape (m, …); columns are indices of all dimensions but the first.
            merged: θ* in the compute dtype, contiguous; overwritten.
            counts: (N,), not negative, float64.
            out: where to write, contiguous. A factor is at most :data:`r2m_kernels.update_scale.MOST`; a column that
                did not change stays.
        """
        ...

    def truncation_width(self, rank: int, oversampling: int) -> int:
        """Columns or rows of the blocks that ``shifted_truncation`` works with."""
        ...

    @property
    def shifted_truncation(self) -> ShiftedTruncation: ...

    @property
    def orders_components(self) -> bool:
        """Whether the factors of ``shifted_truncation`` come by descending singular value."""
        ...

    @property
    def takes_tolerance(self) -> bool:
        """Whether ``shifted_truncation`` can stop early."""
        ...


@dataclass(frozen=True)
class Backend:
    """A chosen backend.

    Attributes:
        name: one of :data:`NAMES`.
        reason: for the choice, as the report says it.
        variant: what of the machine its results may depend on, beside the device: another one may round otherwise.
        operators: the implementation.
    """

    name: str
    reason: str
    variant: str
    operators: Operators

    @property
    def groups_tensors(self) -> bool:
        """Whether it takes tensors of one shape together, a launch a group."""
        return self.name == "triton"


def usable_device(value: str | torch.device) -> torch.device:
    """The device called ``value``, tried out.

    Raises:
        InvalidInput: no such device.
        BackendUnavailable: it cannot be used here.
    """
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type == "meta":  # holds no numbers
        raise BadOption(f"device: expected one such as cpu, cuda or cuda:1, got '{value}'")
    try:
        return torch.empty(1, device=device).device  # "cuda" has an index from here on
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise BackendUnavailable(f"device '{value}' cannot be used here: {reason}") from None


def choose(name: str, device: torch.device) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the fastest one that runs on ``device``.

    Raises:
        InvalidInput: no such backend.
        BackendUnavailable: it was asked for by name and cannot run here; a named backend never falls back.
    """
    checks.choice("backend", name, NAMES)
    if name == "torch":
        return _backend("torch", "asked for by name")
    if name == "native" or (name == "auto" and device.type == "cpu"):
        return _on_cpu(name, device)
    missing = _why_not_triton(device)
    if name == "triton":
        if missing:
            raise BackendUnavailable(f"backend 'triton' {missing}; use backend='torch' or 'auto'")
        return _backend("triton", "asked for by name")
    if missing:
        return _backend("torch", f"the Triton backend {missing}")
    return _backend("triton", f"the fastest one this version has for {device.type}")


def _on_cpu(name: str, device: torch.device) -> Backend:
    """The native backend; for ``"auto"`` the torch backend where that cannot run and need not."""
    if device.type != "cpu":
        raise BackendUnavailable(f"backend 'native' runs on CPUs and not on '{device.type}'; use backend='auto'")
    library = importlib.import_module("._native.library", __package__)
    try:
        loaded = library.load()
    except BackendUnavailable as error:
        if name == "native" or library.policy() == "require":
            raise BackendUnavailable(f"backend 'native': {error}") from None
        return _backend("torch", str(error))
    why = "asked for by name" if name == "native" else "the fastest one for cpu"
    variant = library.VARIANTS[loaded.variant]
    return _backend("native", f"{why} ({variant} kernels)", variant)


def _backend(name: str, reason: str, variant: str = "") -> Backend:
    variant = " ".join(part for part in (variant, torch.backends.cpu.get_cpu_capability()) if part)
    return Backend(name, reason, variant, cast(Operators, importlib.import_module(f"._{name}", __package__)))


def _why_not_triton(device: torch.device) -> str:
    """Why the Triton backend cannot run on ``device``, as what follows its name; empty where it can."""
    try:
        launch = importlib.import_module("._triton.launch", __package__)
    except ImportError as error:
        return f"needs the package triton, which cannot be imported ({error})"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < OLDEST_CAPABILITY:
            return f"needs a GPU of compute capability {OLDEST_CAPABILITY}.0 or newer"
        return ""
    if device.type == "cpu" and launch.INTERPRETED:
        return ""
    return f"runs on CUDA and ROCm GPUs and not on '{device.type}' (device='cuda' chooses one)"
