"""The Triton backend: fused kernels for CUDA and ROCm. See :mod:`r2m_kernels.ops`."""

from r2m_kernels._triton.combine import combine
from r2m_kernels._triton.orthonormalize import orthonormalize
from r2m_kernels._triton.residual_matmul import residual_matmul
from r2m_kernels._triton.task_gram import task_gram
from r2m_kernels._triton.truncate import shifted_truncation

__all__ = ["combine", "orthonormalize", "residual_matmul", "shifted_truncation", "task_gram"]
