"""The operators beside plain PyTorch, for `kernels benchmark`: three task vectors of a 1024 × 4096 layer.

References are float32 as well, and results are checked against them to the runner's tolerance of 0.01.
"""

import torch
from kernels.benchmark import Benchmark

EXPERTS, ROWS, COLUMNS, RANK = 3, 1024, 4096, 64


class Operators(Benchmark):
    """Each as a workload."""

    seed = 0

    def setup(self):
        """A base, experts near it, and factors of a residual."""
        self.base = torch.randn(ROWS, COLUMNS, device=self.device)
        self.experts = [self.base + 0.01 * torch.randn(ROWS, COLUMNS, device=self.device) for _ in range(EXPERTS)]
        self.core = torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64)
        self.mixing = torch.eye(EXPERTS, dtype=torch.float64) - 1 / EXPERTS
        self.right = torch.randn(EXPERTS, COLUMNS, RANK, device=self.device) / COLUMNS**0.5

    def _tasks(self):
        return torch.stack([expert - self.base for expert in self.experts])

    def benchmark_task_gram(self):
        """⟨τ_i, τ_j⟩, divided by about ‖τ‖²."""
        experts = [[expert] for expert in self.experts]
        self.out = self.kernel.ops.task_gram([self.base], experts)[0] / (1e-4 * ROWS * COLUMNS)

    def verify_task_gram(self):
        """The same by a product of matrices."""
        tasks = self._tasks().flatten(1)
        return (tasks @ tasks.T).double().cpu() / (1e-4 * ROWS * COLUMNS)

    def benchmark_combine(self):
        """θ₀ plus the core."""
        self.out = self.kernel.ops.combine(self.base, self.experts, self.core)

    def verify_combine(self):
        """The same in three passes."""
        return self.base + torch.einsum("i,imn->mn", self.core.to(self.base), self._tasks())

    def benchmark_residual_matmul(self):
        """Residuals times a thin matrix, without a residual stored."""
        self.out = self.kernel.ops.residual_matmul(self.base, self.experts, self.mixing, self.right)

    def verify_residual_matmul(self):
        """The same with residuals stored."""
        residuals = torch.einsum("ji,jmn->imn", self.mixing.to(self.base), self._tasks())
        return torch.bmm(residuals, self.right)
