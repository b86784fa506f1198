"""Orthonormal bases of blocks of columns."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are decomposed at once where there are several times as many, and of how many columns at least.
PANEL_ROWS, PANEL_RATIO = 2048, 4


def orthonormalize(y: Tensor, *, overwrite: bool = False) -> Tensor:
    """Householder QR: stable for any conditioning; blocks that are all zero give zeros."""
    if y.dtype not in (torch.float32, torch.float64):
        y = y.float()
    blocks = y.flatten(0, -3) if y.ndim > 2 else y.unsqueeze(0)
    result = blocks if overwrite else torch.empty_like(blocks, memory_format=torch.contiguous_format)
    for index, block in enumerate(blocks):
        lowest, highest = block.aminmax() if block.numel() else (torch.zeros(()), torch.zeros(()))
        largest = torch.maximum(highest, -lowest)
        if largest == 0:
            result[index] = 0.0
        else:
            _decompose(block.div_(largest) if overwrite else block / largest, result[index])
    return result.reshape(y.shape)


def _decompose(block: Tensor, out: Tensor) -> None:
    """Q of a block whose largest entry is 1: neither squares of large ones overflow nor those of small ones vanish.

    Of a tall one panel by panel, whose triangles are decomposed then: what LAPACK copies is a panel.
    """
    rows, columns = block.shape
    count = rows // max(PANEL_ROWS, PANEL_RATIO * columns)
    if count < 2:
        out.copy_(torch.linalg.qr(block).Q)
        return
    panels = [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]
    triangles = []
    for panel in panels:
        q, triangle = torch.linalg.qr(block[panel])
        out[panel] = q
        triangles.append(triangle)
        del q  # before the next one is made
    turns = torch.linalg.qr(torch.cat(triangles)).Q.split(columns)
    for panel, turn in zip(panels, turns, strict=True):
        out[panel] = out[panel] @ turn
