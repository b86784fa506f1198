"""What this GPU gives: bytes a second of memory, L2 cache and host link, and rates of fp16 products of our shapes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from bench.gpu.record import Session, Stopwatch, copy_bandwidth
from r2m_kernels._triton import launch

CACHED = 30 * 10**6  # bytes, within the L2 cache of data-centre GPUs
PASSES = 16
LINKED = 2**28  # bytes of pinned memory, which the link takes some milliseconds for
# L, m, k, n of the batched products that truncated residuals of ViT-L/14's largest matrices would be: one with a kept
# residual, and what the combination adds up of three experts' factors.
PRODUCTS = {"XᵀY": (72, 112, 4096, 1024), "Σ LR": (24, 4096, 336, 1024)}


@triton.jit
def read_kernel(source, out, elements, PASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Every program reads all of ``source``, each from a place of its own."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(elements, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(blocks * PASSES):
        where = (step + program * (blocks // programs + 1)) % blocks * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + where, mask=where < elements, other=0.0)
    tl.store(out + program * BLOCK + tl.arange(0, BLOCK), total)


def measured(session: Session) -> dict[str, Any]:
    """Bytes and flops a second; ``None`` each in a rehearsal."""
    stopwatch, device = Stopwatch(session), session.device
    found: dict[str, Any] = {"copy_bytes_per_second": copy_bandwidth(session, stopwatch)}
    config = launch.VectorConfig(False, block=128 if session.rehearsal else 2048, warps=8, stages=3)
    size = 2**10 if session.rehearsal else CACHED // 4
    programs = 2 if session.rehearsal else torch.cuda.get_device_properties(device).multi_processor_count * 2
    source, out = torch.ones(size, device=device), torch.empty(programs, config.block, device=device)
    passes = 1 if session.rehearsal else PASSES
    took = stopwatch.median(
        lambda: launch.start(read_kernel, (programs,), config, source, out, size, PASSES=passes, BLOCK=config.block)
    )
    assert float(out.sum()) == programs * size * passes, "every program has read everything"
    found["l2_bytes_per_second"] = None if took is None else programs * passes * source.nbytes / (took / 1e3)
    there = torch.empty(2**10 if session.rehearsal else LINKED, dtype=torch.uint8, device=device)
    pinned = torch.empty(there.shape, dtype=torch.uint8, pin_memory=not session.rehearsal)
    for name, (target, given) in {"host to GPU": (there, pinned), "GPU to host": (pinned, there)}.items():
        took = stopwatch.median(functools.partial(target.copy_, given, non_blocking=True))
        found[f"{name} bytes_per_second"] = None if took is None else there.nbytes / (took / 1e3)
    for name, (batch, m, k, n) in PRODUCTS.items():
        if session.rehearsal:
            batch, m, k, n = 1, 4, 8, 4
        left = torch.randn(batch, m, k, device=device, dtype=torch.float16)
        right = torch.randn(batch, k, n, device=device, dtype=torch.float16)
        took = stopwatch.median(lambda left=left, right=right: torch.bmm(left, right))  # type: ignore[misc]
        found[f"fp16 {name} flops_per_second"] = None if took is None else 2 * batch * m * k * n / (took / 1e3)
    return found
