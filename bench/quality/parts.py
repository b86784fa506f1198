"""What a merge is made of, whole and in float64: what the rules in plain PyTorch are written with.

The package holds no task vector whole; here all of them are, so that a rule is its formula.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from r2m_kernels.heads import head_names
from r2m_kernels.reference.checkpoints import changed, kinds, task_vectors

StateDict = dict[str, Tensor]
Result = TypeVar("Result")
REMEMBERED = 160  # three decompositions of every matrix of the largest network here, some 300 MB
OfMatrix = Callable[[Tensor], Tensor]
"""Task matrices of one tensor, (N, m, n) float64 → what is added to the base's, (m, n)."""


@dataclass(frozen=True)
class Parts:
    """Base, specialists, and their task vectors by kind of tensor.

    Attributes:
        base: the state dict that specialists were trained from.
        experts: theirs.
        tau: name → (N, m, n) float64 of tensors with two dimensions or more, first dimension by the rest; the
            classifier's are not among them.
        vectors: name → (N, 1, elements) float64 of those with fewer dimensions.
        plain: name → the same of classifier and running statistics, which are averaged by every rule here.
    """

    base: Mapping[str, Tensor]
    experts: Sequence[Mapping[str, Tensor]]
    tau: dict[str, Tensor]
    vectors: dict[str, Tensor]
    plain: dict[str, Tensor]

    @classmethod
    def of(cls, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> Parts:
        head = head_names({name: tensor.shape for name, tensor in base.items() if tensor.is_floating_point()})
        names = kinds(base, average=head)
        every = task_vectors(base, experts, names.matrices, [*names.vectors, *names.statistics])
        matrices, vectors, plain = ({name: every[name] for name in some} for some in names)
        return cls(base, experts, matrices, vectors, plain)

    @cached_property
    def grams(self) -> dict[str, Tensor]:
        """Name → (N, N) inner products of the task matrices."""
        return {name: gram(tau) for name, tau in self.tau.items()}

    @cached_property
    def gram(self) -> Tensor:
        """(N, N) over all matrices."""
        return torch.stack(list(self.grams.values())).sum(0)

    @cached_property
    def core(self) -> Tensor:
        """(N,) coefficients of R²M's core: the mean's part in the first right singular vector of the task vectors."""
        return leading_core(self.gram)

    @property
    def gain(self) -> float:
        """g² = mean ‖τ_i‖ / ‖mean τ‖ over matrices: the length that averaging took."""
        mean = float(self.gram.mean().sqrt())
        return float(self.gram.diag().sqrt().mean()) / mean if mean > 0 else 1.0

    def merged(self, changes: Mapping[str, Tensor], vector_scale: float = 1.0) -> StateDict:
        """The base with these changes of matrices, ``vector_scale`` times the mean of vectors, the mean of the rest.

        Returns:
            Names, order and types of the base.
        """
        every = {name: vector_scale * tau.mean(0) for name, tau in self.vectors.items()}
        every |= {name: tau.mean(0) for name, tau in self.plain.items()}
        return in_type_of(self.base, changed(self.base, every | dict(changes)))

    def each(self, of_matrix: OfMatrix, vector_scale: float = 1.0) -> StateDict:
        """:meth:`merged` with a change made tensor by tensor."""
        return self.merged({name: of_matrix(tau) for name, tau in self.tau.items()}, vector_scale)


def in_type_of(base: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> StateDict:
    """A state dict rounded to the base's types."""
    return {name: tensor.to(base[name].dtype) for name, tensor in state.items()}


def gram(tau: Tensor) -> Tensor:
    """(N, …) → (N, N) inner products."""
    rows = tau.flatten(1)
    return rows @ rows.T


def leading_core(gram_: Tensor) -> Tensor:
    """(N, N) Gram → (N,) c = u uᵀ G 1/N / λ, u its first eigenvector, λ its eigenvalue; zeros for zeros."""
    values, vectors = torch.linalg.eigh(gram_)
    u = vectors[:, -1]
    core: Tensor = u * (u @ gram_).mean() / values[-1] if values[-1] > 0 else torch.zeros_like(u)
    return core


def remembered(function: Callable[[Tensor], Result]) -> Callable[[Tensor], Result]:
    """A function of one tensor with its last results kept by content: candidates of a run share most decompositions.

    Nobody writes into a result.
    """
    results: OrderedDict[bytes, Result] = OrderedDict()

    def call(tensor: Tensor) -> Result:
        digest = hashlib.blake2b(repr(tensor.shape).encode())
        digest.update(tensor.contiguous().numpy())
        made = results.pop(digest.digest()) if digest.digest() in results else function(tensor)
        results[digest.digest()] = made
        if len(results) > REMEMBERED:
            results.popitem(last=False)
        return made

    return call


@remembered
def svd(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, m, n) → U (N, m, s), σ (N, s), V (N, n, s)."""
    u, values, vh = torch.linalg.svd(tau, full_matrices=False)
    return u, values, vh.mT


@remembered
def together(vectors: Tensor) -> Tensor:
    """(N, m, r), orthonormal columns each → (m, N·r), the nearest with all columns orthonormal (polar factor)."""
    u, _, vh = torch.linalg.svd(vectors.transpose(0, 1).flatten(1), full_matrices=False)
    polar: Tensor = u @ vh
    return polar


def shared_rank(tau: Tensor) -> int:
    """⌊min(m, n) / N⌋, at least 1: the rank at which all experts' singular vectors fit side by side."""
    return max(1, min(tau.shape[1:]) // len(tau))


def low_rank(tau: Tensor, rank: float) -> Tensor:
    """Each (m, n) cut to rank max(1, ⌈rank · min(m, n)⌉)."""
    # The hair keeps a share that is whole but for rounding from the next rank.
    r = max(1, int(-(-rank * min(tau.shape[1:]) * (1 - 1e-12) // 1)))
    u, values, v = svd(tau)
    cut: Tensor = (u[..., :r] * values[:, None, :r]) @ v[..., :r].mT
    return cut
