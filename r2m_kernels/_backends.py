"""Which implementation of the operators runs, and why."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from r2m_kernels import _checks
from r2m_kernels.errors import BackendUnavailable, InvalidInput

NAMES = ("auto", "torch", "native", "triton")


class Operators(Protocol):
    """What a backend module provides: the heavy part of each step; arguments are as :mod:`r2m_kernels.ops` checks."""

    def task_gram(self, bases: Sequence[Tensor], experts: Sequence[Sequence[Tensor]]) -> Tensor: ...

    def residual_matmul(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        mixing: Tensor,
        rhs: Tensor,
        transpose: bool = False,
        precision: str = "ieee",
    ) -> Tensor: ...

    def orthonormalize(self, y: Tensor) -> Tensor: ...

    def combine(
        self,
        base: Tensor,
        experts: Sequence[Tensor],
        core: Tensor,
        left: Tensor | None,
        right: Tensor | None,
        scale: Tensor | None,
        out: Tensor,
    ) -> None: ...


@dataclass(frozen=True)
class Backend:
    """A chosen backend: its name, the reason for the choice (for the report) and its operators."""

    name: str
    reason: str
    operators: Operators


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
        raise InvalidInput(f"device: expected one such as cpu, cuda or cuda:1, got '{value}'")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise BackendUnavailable(f"device '{value}' cannot be used here: {reason}") from None
    return device


def choose(name: str, device: torch.device) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the fastest one that runs on ``device``.

    Raises:
        InvalidInput: no such backend.
        BackendUnavailable: it was asked for by name and cannot run here; a named backend never falls back.
    """
    _checks.choice("backend", name, NAMES)
    if name in ("native", "triton"):
        raise BackendUnavailable(
            f"backend '{name}' is not part of this version of r2m_kernels; use backend='torch' or 'auto'"
        )
    reason = "asked for by name" if name == "torch" else f"the one backend this version has for {device.type}"
    return Backend("torch", reason, cast(Operators, importlib.import_module("r2m_kernels._torch")))
