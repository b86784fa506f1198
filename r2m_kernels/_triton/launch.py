"""How every kernel is launched: small frozen configurations, chosen by pure functions of what is launched.

Tile sizes stand in ``launch.json``, by operator, target and variant; ``python -m bench.tune`` rewrites it on a GPU.
Nothing is tuned at run time. ``python -m bench.compile_check`` builds and inspects every configuration that can be
chosen, by running the operators with :func:`start` replaced.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources, PTXASError

from ..errors import BackendUnavailable

Precision = Literal["fp16", "bf16", "tf32x3", "ieee"]

# Targets with tile sizes of their own; other GPUs use those of the nearest: see `target_of`.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# Of NVIDIA GPUs: Ampere, the first with tf32 and bf16 matrix units.
OLDEST_CAPABILITY = 8
# A100, H100 and H200, B200. 8.6, 8.9, 10.3 and 12.x do 1/64 of their float32 rate.
FAST_FLOAT64 = ((8, 0), (9, 0), (10, 0))

# Whether kernels run on CPU tensors, in Triton's interpreter, for tests: decided when they are imported.
# What Triton raises where a GPU has too little shared memory or its compiler fails; not mistakes in arguments.
_REFUSALS = (OutOfResources, PTXASError)
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Inputs (beside the base) whose loads a residual kernel unrolls; more are read in a loop.
UNROLLED_INPUTS = 3

# Of one launch: CUDA's grids have at most 65,535 programs in their second dimension. A multiple of 16, so that parts
# of arguments start as their wholes do at 16 bytes.
MOST_TENSORS = 65_520


@dataclass(frozen=True)
class GramConfig:
    """``task_gram``: a program sums ``steps`` blocks of ``block`` elements.

    ``diagonal``: experts make one block only (N ≤ 4; aligned tensors).
    """

    aligned: bool
    diagonal: bool
    steps: int
    block: int
    warps: int
    stages: int


@dataclass(frozen=True)
class MatmulConfig:
    """A product on the matrix units, a tile of ``rows`` × ``columns`` a program, ``inner`` of the sum at a time.

    ``precision`` is that of the operands; ``experts`` residuals are served by one program; ``inputs`` > 0 unrolls the
    loop over that many inputs.
    """

    precision: Precision
    aligned: bool
    rows: int
    inner: int
    columns: int
    warps: int
    stages: int
    experts: int = 1
    inputs: int = 0
    pieces: int = 1

    @property
    def input_precision(self) -> str:
        """What ``tl.dot`` is told: operands of 16 bits have no choice left."""
        return "ieee" if self.precision in ("fp16", "bf16") else self.precision


@dataclass(frozen=True)
class VectorConfig:
    """Element-wise kernels and plain sums: ``block`` elements at a time."""

    aligned: bool
    block: int
    warps: int
    stages: int


Config = GramConfig | MatmulConfig | VectorConfig


def start(kernel: Any, grid: tuple[int, ...], config: Config, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument. Every launch of this package goes through here.

    A grid's second dimension is the tensors of a group; what there is of each tensor has it as its first dimension,
    and nothing else is as long as a group of more than a launch may have.

    Raises:
        BackendUnavailable: this GPU or its compiler cannot do it.
    """
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for part, some in parts(grid, arguments):
            try:
                kernel[part](*some, **constants, **options(config))
            except _REFUSALS as error:
                name = getattr(kernel, "__name__", "a kernel")
                raise BackendUnavailable(
                    f"backend 'triton' cannot run {name} on '{device}': {str(error).strip().partition(chr(10))[0]}; "
                    "backend='torch' (--backend torch) needs no compiler"
                ) from error


def parts(grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Iterator[tuple[tuple[int, ...], tuple[Any, ...]]]:
    """A launch as several, none of more tensors than :data:`MOST_TENSORS`."""
    if len(grid) == 1 or grid[1] <= MOST_TENSORS:
        yield grid, arguments
        return
    for first in range(0, grid[1], MOST_TENSORS):
        last = min(first + MOST_TENSORS, grid[1])
        of_part = (
            one[first:last] if isinstance(one, torch.Tensor) and one.shape[:1] == grid[1:2] else one
            for one in arguments
        )
        yield (grid[0], last - first), tuple(of_part)


def options(config: Config) -> dict[str, Any]:
    """What Triton's compiler is told beside the constants."""
    # Fused multiply-adds are the default today and announced to change: rounding bounds here allow both.
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


def why_not(device: torch.device) -> str:
    """Why no kernels are there for a GPU, as what follows the backend's name; empty where they are."""
    if torch.version.hip is None:
        old = torch.cuda.get_device_capability(device)[0] < OLDEST_CAPABILITY
        return f"needs a GPU of compute capability {OLDEST_CAPABILITY}.0 or newer" if old else ""
    name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    known = [target for target in TARGETS if target.startswith("gfx")]
    # Others differ in more than tile sizes: waves of 32, or no matrix instructions for these types.
    return "" if name in known else f"is compiled for AMD's {', '.join(known)} and not for {name}"


def slow_in_float64(device: torch.device) -> bool:
    """Whether a GPU does one float64 operation for 32 and more of float32, as chips for other markets do."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) not in FAST_FLOAT64


def multiplied(operand: tl.dtype, compute: tl.dtype) -> tl.dtype:
    """What operands are where they meet.

    The interpreter would sum products of 16-bit operands in 16 bits: there they are rounded and widened.
    """
    return compute if INTERPRETED else operand


def target_of(device: torch.device) -> str:
    """The entry of :data:`TARGETS` for a device; CPU tensors are the interpreter's, which takes any."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"  # the only one that `why_not` lets pass
    major = torch.cuda.get_device_capability(device)[0]
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory and warp-level matrix instructions: sm_80's tiles fit that.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def full_precision(target: str) -> Precision:
    """float32-grade products on the matrix units."""
    return "ieee" if target == "gfx942" else "tf32x3"


def task_gram(target: str, dtype: torch.dtype, count: int, aligned: bool) -> GramConfig:
    """For N = ``count`` experts of ``dtype``."""
    # Sizes that are no whole number of vectors are rare: they share one variant.
    variant = f"{8 * dtype.itemsize}-bit" if aligned else "general"
    return GramConfig(aligned, aligned and count <= 4, **tiles("task_gram", target, variant))


def residual_matmul(target: str, compute: torch.dtype, precision: str, aligned: bool, count: int) -> MatmulConfig:
    """For N = ``count`` experts, computed in ``compute``; never with less precision than asked for.

    Built is the target's full precision, which stands for every other one. Rows that are not whole 16-byte vectors, an
    m that is no multiple of 4, and ``ieee`` on NVIDIA share the variant ``general``: no matrix units there, loads as
    wide as any address allows.
    """
    if compute == torch.float64:
        return MatmulConfig("ieee", False, **tiles("residual_matmul", target, "float64"))
    full = full_precision(target)
    if not aligned or (precision == "ieee" and full != "ieee"):
        return MatmulConfig("ieee", False, **tiles("residual_matmul", target, "general"))
    if count <= UNROLLED_INPUTS:
        return MatmulConfig(full, True, inputs=UNROLLED_INPUTS, **tiles("residual_matmul", target, full))
    return MatmulConfig(full, True, **tiles("residual_matmul", target, full + "/many"))


def form_residuals(target: str, aligned: bool) -> VectorConfig:
    """Tiles of ``block`` rows and columns, which are read and written once."""
    return VectorConfig(aligned, **tiles("form_residuals", target, "aligned" if aligned else "general"))


def residual_product(target: str, compute: torch.dtype, aligned: bool, rank: int) -> MatmulConfig:
    """A truncation's products with residuals that are kept as operands, of up to ``rank`` vectors each."""
    if compute == torch.float64:
        return MatmulConfig("ieee", False, **tiles("residual_product", target, "float64"))
    if not aligned:
        return MatmulConfig("fp16", False, **tiles("residual_product", target, "general"))
    narrow = MatmulConfig("fp16", True, **tiles("residual_product", target, "fp16"))
    if rank <= narrow.rows:
        return narrow
    # Where a tile does not hold all vectors residuals are loaded again for each: tiles of twice the size load less.
    return MatmulConfig("fp16", True, **tiles("residual_product", target, "fp16/wide"))


def residual_gram(target: str) -> MatmulConfig:
    """Gram matrices of residuals that are kept as float16 operands, all sides whole vectors."""
    return MatmulConfig("fp16", True, **tiles("residual_gram", target, "fp16"))


def combine_matrix(target: str, compute: torch.dtype, aligned: bool) -> MatmulConfig:
    """For sums carried in ``compute``."""
    if compute == torch.float64:
        return MatmulConfig("ieee", False, **tiles("combine_matrix", target, "float64"))
    full = full_precision(target)
    return MatmulConfig(full, aligned, **tiles("combine_matrix", target, full if aligned else "general"))


def combine_rounded(target: str, aligned: bool, count: int) -> MatmulConfig:
    """For bfloat16 factors of N = ``count`` experts, and float32 sums."""
    inputs = UNROLLED_INPUTS if count <= UNROLLED_INPUTS else 0
    return MatmulConfig(
        "bf16", aligned, inputs=inputs, **tiles("combine_rounded", target, "bf16" if aligned else "general")
    )


def combine_vector(target: str, aligned: bool) -> VectorConfig:
    """Whatever the dtypes."""
    return VectorConfig(aligned, **tiles("combine_vector", target, "aligned" if aligned else "general"))


def sums() -> VectorConfig:
    """Float64 sums of partial results: too small to be worth a table."""
    return VectorConfig(False, block=256, warps=4, stages=1)


def vectors_gram(target: str, aligned: bool) -> MatmulConfig:
    """Gram matrices of blocks of vectors, float64."""
    return MatmulConfig("ieee", aligned, **tiles("vectors_gram", target, "float64"))


def factor_products(target: str, aligned: bool) -> MatmulConfig:
    """As :func:`vectors_gram`; with wide loads Triton 3.6.0 spills on sm_100."""
    return vectors_gram(target, aligned and target != "sm_100")


def inverse_factor() -> VectorConfig:
    """Blocks of ``block`` rows and columns: a matrix lies in the L2 cache, and there are as many as programs."""
    return VectorConfig(False, block=32, warps=4, stages=1)


def triangular_product(target: str, compute: torch.dtype, aligned: bool) -> MatmulConfig:
    """Triangular matrices times blocks of vectors."""
    if compute == torch.float64:
        return MatmulConfig("ieee", False, **tiles("triangular_product", target, "float64"))
    full = full_precision(target)
    return MatmulConfig(full, aligned, **tiles("triangular_product", target, full if aligned else "general"))


def unit_rows(target: str, aligned: bool) -> VectorConfig:
    """Rows divided by their lengths, the first ``block`` numbers of each in registers."""
    return VectorConfig(aligned, **tiles("unit_rows", target, "aligned" if aligned else "general"))


def units_gram(target: str) -> MatmulConfig:
    """Gram matrices of unit rows, which are whole vectors whatever their length."""
    return MatmulConfig("fp16", True, **tiles("units_gram", target, "fp16"))


def units_factor(target: str) -> MatmulConfig:
    """Inverse factors of those, by blocks of ``rows`` rows and columns."""
    full = full_precision(target)
    return MatmulConfig(full, True, **tiles("units_factor", target, full))


def units_product(target: str) -> MatmulConfig:
    """Triangular matrices times unit rows."""
    return MatmulConfig("fp16", True, **tiles("units_product", target, "fp16"))


@functools.cache
def table() -> dict[str, Any]:
    """The content of ``launch.json``: operator → target → variant → tile sizes."""
    text = resources.files(__package__).joinpath("launch.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def tiles(operator: str, target: str, variant: str) -> dict[str, int]:
    """Tile sizes from ``launch.json``."""
    entry: dict[str, int] = table()[operator][target][variant]
    return entry
