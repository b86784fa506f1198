"""Orthonormal bases of blocks of columns."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormalize(y: Tensor) -> Tensor:
    """Householder QR: stable for any conditioning; blocks that are all zero give zeros."""
    if y.dtype not in (torch.float32, torch.float64):
        y = y.float()
    blocks = y.flatten(0, -3) if y.ndim > 2 else y.unsqueeze(0)
    result = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    for index, block in enumerate(blocks):
        largest = block.abs().amax() if block.numel() else torch.zeros(())
        # Scaled to 1, so that neither squares of large entries overflow nor those of small ones vanish.
        result[index] = 0.0 if largest == 0 else torch.linalg.qr(block / largest).Q
    return result.reshape(y.shape)
