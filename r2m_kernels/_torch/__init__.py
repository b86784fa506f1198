"""The portable backend: plain PyTorch on any device, a block of rows at a time. See :mod:`r2m_kernels.ops`."""

from r2m_kernels._torch.combine import combine
from r2m_kernels._torch.orthonormalize import orthonormalize
from r2m_kernels._torch.residual_matmul import residual_matmul
from r2m_kernels._torch.task_gram import task_gram

__all__ = ["combine", "orthonormalize", "residual_matmul", "shifted_truncation", "task_gram"]

shifted_truncation = None  # truncation.py's textbook method needs the other operators only
