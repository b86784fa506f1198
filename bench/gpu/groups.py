"""Groups of tensors on the device, and what is timed on them: for :mod:`bench.gpu.operators` and its neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu import checks
from bench.gpu.record import Session
from bench.operator_costs import Job, StepCost
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels._triton.orthonormalize import Blocks

RANK = 0.1


@dataclasses.dataclass
class GroupOf:
    """Tensors of one shape on the device, and everything the operators take beside them."""

    job: Job
    bases: list[Tensor]
    experts: list[list[Tensor]]
    mixing: Tensor
    k: int
    basis: Tensor  # rows: (L, N, k, short side), of length about 1
    product: Tensor  # the same on the long side

    @classmethod
    def made(cls, session: Session, shape: tuple[int, int], job: Job, size: int, rank: float = RANK) -> GroupOf:
        """``size`` tensors."""
        source = checks.generator(session.device, seed=shape[0] + job.experts)
        pairs = [checks.inputs(shape, job.dtype, job.experts, source) for _ in range(size)]
        k = truncation_rank(rank, shape)
        basis, product = (
            torch.randn(size, job.experts, k, side, generator=source, device=session.device)
            for side in (min(shape), max(shape))
        )
        basis, product = basis / min(shape) ** 0.5, product / max(shape) ** 0.5
        bases, experts = [base for base, _ in pairs], [[others[j] for _, others in pairs] for j in range(job.experts)]
        return cls(job, bases, experts, checks.mixing_of(job.experts), k, basis, product)

    @property
    def tall(self) -> bool:
        m, n = self.bases[0].shape
        return m >= n

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Rows on the side of the first dimension and of the second, of length about 1."""
        return (self.product, self.basis) if self.tall else (self.basis, self.product)

    def tensor(self, index: int) -> tuple[Tensor, list[Tensor]]:
        return self.bases[index], [expert[index] for expert in self.experts]

    def worst(self, judge: Callable[[int], float]) -> float:
        """Of the tensors whose results are compared with float64: the first and the last."""
        return max(judge(index) for index in {0, len(self.bases) - 1})


@dataclasses.dataclass
class Timed:
    """One operator on one group."""

    operator: str
    call: Callable[[], Any]
    judge: Callable[[Any], float]  # of what the call returns: largest error / bound
    costs: list[StepCost]
    kernels_only: bool = True  # whether Triton kernels do all the work


def laid(vectors: Tensor, blocks: Blocks, rows: Tensor) -> Tensor:
    """Vectors filled with rows (L, N, k, length)."""
    blocks.of_sorts(vectors)[0].copy_(rows.flatten(0, 1))
    return vectors
