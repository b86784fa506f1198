"""GPUs by their datasheets, for :mod:`bench.cost_model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["fp64", "fp64 dot", "fp32", "tf32", "tf32x3", "fp16", "bf16"]


@dataclass(frozen=True)
class Chip:
    """A GPU by its datasheet: B/s, and flop/s at dense rates, without sparsity."""

    name: str
    bandwidth: float  # of device memory
    fp64: float  # vector units
    fp64_dot: float  # products: matrix units
    fp32: float  # products as Triton compiles "ieee": vector units on NVIDIA, matrix units on AMD
    tf32: float | None  # None where tl.dot has none
    fp16: float  # and bfloat16
    host_link: float  # in one direction
    l2: float | None  # from the L2 cache to the multiprocessors; no datasheet has it, None: not measured
    target: str  # its entry in _triton/launch.json

    def rate(self, kind: Kind) -> float:
        """Flop/s for products of a kind, tf32x3 being three of tf32; ValueError where the chip has none."""
        if kind in ("tf32", "tf32x3"):
            if self.tf32 is None:
                raise ValueError(f"{self.name} has no {kind} products: plan with kinds that it has")
            return self.tf32 / (3 if kind == "tf32x3" else 1)
        rates = {"fp64": self.fp64, "fp64 dot": self.fp64_dot, "fp32": self.fp32, "fp16": self.fp16, "bf16": self.fp16}
        return rates[kind]


# What kernels of this package load on an H200 at most, but for single ones; an H100 has the same multiprocessors.
HOPPER_L2 = 5.1e12

# Datasheets of A100 80GB SXM, H100 SXM, H200 SXM, the column HGX B200, MI300X, whose rates are its matrix units', and,
# for chips that are slow in float64, GeForce RTX 4090, whose matrix units are no faster at that.
# NVIDIA prints matrix rates with sparsity and PCIe in both directions; both are halved here.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 2.039e12, 9.7e12, 19.5e12, 19.5e12, 156e12, 312e12, 32e9, None, "sm_80"),
        Chip("H100", 3.35e12, 34e12, 67e12, 67e12, 494.5e12, 989.5e12, 64e9, HOPPER_L2, "sm_90"),
        Chip("H200", 4.8e12, 34e12, 67e12, 67e12, 494.5e12, 989.5e12, 64e9, HOPPER_L2, "sm_90"),
        Chip("B200", 7.7e12, 37e12, 37e12, 75e12, 1100e12, 2250e12, 64e9, None, "sm_100"),
        Chip("MI300X", 5.3e12, 81.7e12, 163.4e12, 163.4e12, None, 1307.4e12, 64e9, None, "gfx942"),
        Chip("RTX 4090", 1.008e12, 1.29e12, 1.29e12, 82.6e12, 82.6e12, 165.2e12, 32e9, None, "sm_80"),
    )
}
