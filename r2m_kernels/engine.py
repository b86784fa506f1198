"""Carries a step over all tensors: reads them, moves them to the device, spreads the work over threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from r2m_kernels import gram
from r2m_kernels._backends import Backend
from r2m_kernels._parallel import for_each, workers
from r2m_kernels.compatibility import Plan, PlannedTensor
from r2m_kernels.errors import InvalidInput
from r2m_kernels.tensors import TensorSource

R = TypeVar("R")


@dataclass(frozen=True)
class ProgressEvent:
    """One more tensor done. ``step`` is "task Gram", "truncation" or "combination"; counts are of that step."""

    step: str
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int


Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class StepRecord:
    """What a step cost: wall seconds, bytes of the inputs it reads."""

    step: str
    seconds: float
    bytes_read: int


class Engine:
    """Reads tensors, moves them to the device and spreads the work."""

    def __init__(
        self,
        base: TensorSource,
        experts: list[TensorSource],
        plan: Plan,
        device: torch.device,
        backend: Backend,
        budget: int | None,
        exact: bool,
    ) -> None:
        self.base, self.experts, self.device, self.backend = base, experts, device, backend
        self._exact = exact
        self.steps: dict[str, StepRecord] = {}
        # Threads are for CPUs: a GPU has one queue of work.
        self._limit: int | None = None if device.type == "cpu" else 1
        if budget is not None:
            largest = max((self._bytes(tensor) for tensor in plan.tensors), default=1)
            share = max(1, budget // 2 // max(1, largest))
            self._limit = share if self._limit is None else min(self._limit, share)

    def inputs(self, tensor: PlannedTensor) -> tuple[Tensor, list[Tensor]]:
        """The base's tensor and the experts', on the device."""
        name = tensor.name
        return self.base.read(name).to(self.device), [source.read(name).to(self.device) for source in self.experts]

    def mean_of_experts(self, tensor: PlannedTensor) -> Tensor:
        """Plain mean of the experts' tensors, float64: θ₀ plus rounded differences could turn a variance negative."""
        total = torch.zeros(tensor.spec.shape, dtype=torch.float64)
        for source in self.experts:
            total += source.read(tensor.name).to("cpu", torch.float64)
        return total / len(self.experts)

    def gram(self, tensor: PlannedTensor) -> Tensor:
        """Step 1 for one tensor; refuses NaN and Inf, which a Gram matrix cannot hide."""
        if tensor.role in ("statistic", "extra"):
            sources = self.experts if tensor.role == "extra" else [self.base, *self.experts]
            self._refuse_non_finite(tensor, ((source.label, source.read(tensor.name)) for source in sources))
            return torch.zeros(0, 0, dtype=torch.float64)
        base, experts = self.inputs(tensor)
        precise = self._exact or tensor.role != "matrix" or tensor.full_rank
        result = gram.task_gram(base, experts, self.backend.operators, precise=precise)
        if not bool(torch.isfinite(result).all()):
            labels = [self.base.label, *(source.label for source in self.experts)]
            self._refuse_non_finite(tensor, zip(labels, [base, *experts], strict=True))
            raise InvalidInput(
                f"tensor '{tensor.name}': the differences from the base are too large to be squared and summed"
            )
        return result

    def over(
        self,
        step: str,
        tensors: list[PlannedTensor],
        function: Callable[[PlannedTensor], R],
        progress: Progress | None,
    ) -> dict[str, R]:
        """Apply a step to every tensor, several at once; a tensor too large for one thread's share goes alone.

        Alone means that its own blocks are spread over the threads instead; the result is the same to the bit.
        """
        start = time.perf_counter()
        total = sum(self._bytes(tensor) for tensor in tensors)
        elements = sum(tensor.spec.numel for tensor in tensors)
        alone = [tensor for tensor in tensors if tensor.spec.numel * workers() > elements]
        shared = [tensor for tensor in tensors if tensor.spec.numel * workers() <= elements]
        results: dict[str, R] = {}
        done = 0

        def finished() -> Iterator[tuple[PlannedTensor, R]]:
            for tensor in alone:
                yield tensor, function(tensor)
            yield from zip(shared, for_each(function, shared, self._limit), strict=True)

        for tensor, result in finished():
            results[tensor.name] = result
            done += self._bytes(tensor)
            if progress is not None:
                progress(ProgressEvent(step, len(results), len(tensors), done, total))
        self.steps[step] = StepRecord(step, time.perf_counter() - start, total)
        return results

    def _bytes(self, tensor: PlannedTensor) -> int:
        """Bytes read for a tensor: the base's and every expert's, each in its own dtype."""
        sources = [self.base] if tensor.role == "copied" else [self.base, *self.experts]
        return sum(source.specs[tensor.name].nbytes for source in sources if tensor.name in source.specs)

    def _refuse_non_finite(self, tensor: PlannedTensor, labelled: Iterable[tuple[str, Tensor]]) -> None:
        for label, content in labelled:
            bad = int((~torch.isfinite(content)).sum())
            if bad:
                raise InvalidInput(
                    f"{label}: tensor '{tensor.name}' holds NaN or Inf in {bad} of {content.numel()} elements"
                )
