"""Which implementation of the operators runs, and why."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, cast

import torch

from . import checks
from ._interface import Operators
from .errors import BackendUnavailable, BadOption

NAMES = ("auto", "torch", "native", "triton")
CPU = torch.device("cpu")


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
        """Whether it wants tensors of one shape in groups, each a launch."""
        return self.operators.traits.groups_tensors

    @property
    def independent_pairs(self) -> bool:
        """Whether a Gram entry depends on its two experts alone, so that it is known in any other company too."""
        return self.operators.traits.independent_pairs


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
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on with all devices that there are
        raise BackendUnavailable(f"device '{value}' cannot be used here: {reason}") from None


def choose(name: str, device: torch.device) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the fastest one that runs on ``device``.

    Raises:
        InvalidInput: no such backend.
        BackendUnavailable: it was asked for by name and cannot run here; a named backend never falls back.
    """
    if name not in NAMES:
        checks.choice("backend", name, NAMES)
    if name == "torch":
        return _backend("torch", "asked for by name")
    # Every call of an operator asks: a device is compared, since the text of its type takes microseconds to make.
    if name == "native" or (name == "auto" and (device == CPU or device.type == "cpu")):
        return _on_cpu(name, device)
    missing = _why_not_triton(device)
    if name == "triton":
        if missing:
            raise BackendUnavailable(f"backend 'triton' {missing}; use backend='torch' or 'auto'")
        return _on_gpu("asked for by name", device)
    if missing:
        return _backend("torch", f"the Triton backend {missing}")
    return _on_gpu(f"the fastest one this version has for {device.type}", device)


def _on_cpu(name: str, device: torch.device) -> Backend:
    """The native backend; for ``"auto"`` the torch backend where that cannot run and need not."""
    if device != CPU and device.type != "cpu":
        raise BackendUnavailable(f"backend 'native' runs on CPUs and not on '{device.type}'; use backend='auto'")
    library = _module("_native.library")
    try:
        loaded = library.load()
    except BackendUnavailable as error:
        if name == "native" or library.policy() == "require":
            raise BackendUnavailable(f"backend 'native': {error}") from None
        return _backend("torch", str(error))
    return _native(name, library.VARIANTS[loaded.variant])


def _on_gpu(reason: str, device: torch.device) -> Backend:
    """The Triton backend, and what became of kernels that were compiled before."""
    told = [reason, _module("_triton.ahead").fill(device)]
    if device.type == "cuda" and _module("_triton.launch").slow_in_float64(device):
        told.append("this GPU is slow in float64, in which Gram matrices are summed and bases orthonormalized")
    return _backend("triton", "; ".join(filter(None, told)))


@functools.cache
def _native(name: str, variant: str) -> Backend:
    why = "asked for by name" if name == "native" else "the fastest one for cpu"
    return _backend("native", f"{why} ({variant} kernels)", variant)


@functools.cache
def _backend(name: str, reason: str, variant: str = "") -> Backend:
    variant = " ".join(part for part in (variant, torch.backends.cpu.get_cpu_capability()) if part)
    return Backend(name, reason, variant, cast(Operators, _module(f"_{name}")))


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def _why_not_triton(device: torch.device) -> str:
    """Why the Triton backend cannot run on ``device``, as what follows its name; empty where it can."""
    try:
        launch = importlib.import_module("._triton.launch", __package__)
    except ImportError as error:
        return f"needs the package triton, which cannot be imported ({error})"
    if device.type == "cuda":
        return launch.why_not(device) or _tried(device)
    if device.type == "cpu" and launch.INTERPRETED:
        return ""
    return f"runs on CUDA and ROCm GPUs and not on '{device.type}' (device='cuda' chooses one)"


@functools.cache
def _tried(device: torch.device) -> str:
    """Whether the smallest kernel is compiled and launched on a GPU: once in a process, and why not if so."""
    ahead, sums = _module("_triton.ahead"), _module("_triton.sums")
    try:
        ahead.fill(device)
        sums.sum_rows(torch.ones(1, 1, dtype=torch.float64, device=device))
    except Exception as error:  # compilers, drivers and file systems raise what they like
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return (
            f"cannot compile or launch a kernel on '{device}' ({reason[:200]}); it needs a C compiler (CC), a cache "
            "that can be written (TRITON_CACHE_DIR) and free GPU memory"
        )
    return ""
