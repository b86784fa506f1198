"""Random signs for sketches: a function of a tensor's key and of a place, made where they are needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interface import ResidualGroup
from .._stream.blocks import empty_rows
from . import launch
from .addresses import row_stride


@triton.jit
def mixed_bits(x):
    """A 32-bit hash: every input bit changes half of the output's (two rounds of xor-shift and odd multiplier)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_signs(key, rows, columns):
    """±1 for every (row, column), independent for all practical purposes; a function of the 64-bit key and the two."""
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = mixed_bits(mixed_bits(rows.to(tl.uint32) ^ low) + columns.to(tl.uint32) * 0x9E3779B1 + high)
    return 1.0 - 2.0 * (bits >> 31).to(tl.float32)


@triton.jit(do_not_specialize=["count", "k", "length", "tiles"])
def signs_kernel(keys, out, count, k, length, tiles, BLOCK: tl.constexpr):
    """out[l, i, column, row] = the random sign of row and column with keys[l], of every expert i: (L, N, k, length)."""
    vector, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    signs = random_signs(tl.load(keys + vector // (count * k)), rows, vector % k)
    tl.store(out + vector * row_stride(length) + rows, signs, mask=rows < length)


def signs_of(group: ResidualGroup, keys: Tensor) -> Tensor:
    """Random signs of a tensor's key, the same for all experts: (L, N, k, long side) float32."""
    (size, count), m = group.energies.shape, len(group.bases[0])
    length, config = max(m, group.bases[0].numel() // m), launch.sums()
    out = empty_rows((size, count, group.rank), length, torch.float32, keys.device)
    tiles = -(-length // config.block)
    grid = (size * count * group.rank * tiles,)
    launch.start(signs_kernel, grid, config, keys, out, count, group.rank, length, tiles, BLOCK=config.block)
    return out
