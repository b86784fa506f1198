"""The portable backend: plain PyTorch on any device, a block of rows at a time. See :mod:`r2m_kernels.ops`."""

from r2m_kernels._torch.combine import combine
from r2m_kernels._torch.orthonormalize import orthonormalize
from r2m_kernels._torch.residual_matmul import residual_matmul
from r2m_kernels._torch.task_gram import gram_elements, task_gram
from r2m_kernels._torch.truncate import shifted_truncation, truncation_width

__all__ = [
    "combine",
    "gram_elements",
    "orders_components",
    "orthonormalize",
    "residual_matmul",
    "shifted_truncation",
    "takes_tolerance",
    "task_gram",
    "truncation_width",
]

orders_components = True
takes_tolerance = True
