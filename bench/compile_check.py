"""Does every kernel compile for every target in every configuration that can be chosen, and to what? No GPU needed.

    python -m bench.compile_check [--json FILE] [--target sm_90 ...] [--processes 2]

The operators themselves are run, on small CPU tensors, over all situations that lead to another configuration; their
launches are caught and compiled for each target instead. So what is built here is what a GPU would be given: the same
arguments, alignments and constants. The machine code is then inspected: registers, spills, shared memory, matrix
instructions, 128-bit loads. Exit code 1 if a kernel spills, needs more shared memory than the chip has, lacks the
matrix instruction that its configuration declares, has operands of 16 bits and uses a slower one, or, where everything
is aligned, has no 128-bit load.

With ``--json`` nothing is compiled for a target that the file says passed with these very sources and this Triton.
Otherwise Triton's own cache makes the second run quick: it is keyed by source, target and options.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from elftools.elf.elffile import ELFFile
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bench.gpu.cases import cases
from r2m_kernels import _backends, _triton
from r2m_kernels._interface import Effort, ResidualGroup
from r2m_kernels._triton import ahead, launch, units
from r2m_kernels._triton.addresses import SCALE
from r2m_kernels._triton.orthonormalize import Blocks

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the gate and its occupancy bound need to know of a target."""

    target: GPUTarget
    architecture: str  # as the disassembler names it; of AMD's the compiler gives assembly
    mma: str  # the matrix instruction to expect
    wide_load: str
    shared_limit: int  # bytes a program may have
    shared_total: int  # bytes of one multiprocessor
    registers: int  # 32-bit registers of one multiprocessor
    threads: int  # resident on one multiprocessor
    warp_mma: str = ""  # a warp's matrix instruction, where warp groups have a faster one


KIB = 1024
NVIDIA_LOAD = r"\bLDG(?:STS)?\.\S*128"
CHIPS = {
    # 99 KiB: sm_80's configurations also serve 8.6, 8.9 and 12.x.
    "sm_80": Limits(GPUTarget("cuda", 80, 32), "SM80", r"\bHMMA\b", NVIDIA_LOAD, 99 * KIB, 164 * KIB, 65536, 2048),
    # Both of its instructions: a warp group's wants 64 rows, and in tf32x3 an H200 was faster with fewer, a warp's.
    "sm_90": Limits(
        *(GPUTarget("cuda", 90, 32), "SM90a", r"\bHG?MMA\b", NVIDIA_LOAD, 227 * KIB, 228 * KIB, 65536, 2048),
        warp_mma=r"\bHMMA\b",
    ),
    "sm_100": Limits(
        GPUTarget("cuda", 100, 32), "SM100a", r"\bUTC\w*MMA\b", NVIDIA_LOAD, 227 * KIB, 228 * KIB, 65536, 2048
    ),
    "gfx942": Limits(
        GPUTarget("hip", "gfx942", 64),
        "",  # the compiler gives assembly
        r"\bv_mfma_",
        r"\b(?:global|buffer)_load_dwordx4",
        65536,
        65536,
        131072,
        2048,
    ),
}


@dataclasses.dataclass
class Launch:
    """One caught launch: what to compile and what was chosen."""

    kernel: Any
    config: launch.Config
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def compiled(self) -> Any:
        """For the active driver's target; nothing is run."""
        options = launch.options(self.config)
        return self.kernel.run(*self.arguments, **self.constants, **options, grid=(1,), warmup=True)

    def declares_mma(self, target: str) -> bool:
        """Whether its products belong on the matrix units: not float64 ones, nor plain float32 on NVIDIA."""
        if not isinstance(self.config, launch.MatmulConfig) or self.constants.get("COMPUTE") != triton.language.float32:
            return False
        return self.config.precision != "ieee" or CHIPS[target].target.backend == "hip"

    def described(self) -> dict[str, Any]:
        """The configuration and the constants that are not in it, as plain values."""
        constants = {
            name.lower(): value if isinstance(value, bool | int | str) else str(value)
            for name, value in self.constants.items()
            if name not in _CONFIGURED
        }
        return {**dataclasses.asdict(self.config), **constants}


# Constants that a configuration names too.
_CONFIGURED = {"PRECISION", "DOT", "ROWS", "INNER", "COLUMNS", "EXPERTS", "INPUTS", "ALIGNED", "STEPS", "BLOCK"}
_CONFIGURED |= {"DIAGONAL", "SIDE", "PIECES"}


class CompileOnly:
    """Stands in for the GPU's driver: it names a target and has no device."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return launch.TARGETS.index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.target].target


def situations() -> Iterator[Callable[[], object]]:
    """Operator calls on small tensors that lead to every configuration."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for count in (3, 8):
            for shape in ((32, 64), (31, 63)):  # of the second neither rows nor the whole are 16-byte vectors
                yield from (case.call for case in cases(shape, dtype, count, CPU))
                for sides in (shape, shape[::-1]):  # and those kernels that truncation alone launches
                    base, mixing = torch.zeros(sides, dtype=dtype), torch.eye(count, dtype=torch.float64)
                    numbers = (torch.zeros(1, dtype=torch.int64), torch.ones(1, count, dtype=torch.float64))
                    group = ResidualGroup([base], [[base]] * count, *numbers, 16)
                    for again in ({}, {"few_directions": True}, {"carefully": True}):
                        effort = Effort(2, 0, None, **again)
                        yield functools.partial(_triton.shifted_truncation, [group], mixing, effort)
    base, mixing = torch.zeros(144, 144), torch.eye(3, dtype=torch.float64)  # and tiles for ranks beyond 128
    numbers = (torch.zeros(1, dtype=torch.int64), torch.ones(1, 3, dtype=torch.float64))
    group = ResidualGroup([base], [[base]] * 3, *numbers, 136)
    for carefully in (False, True):
        yield functools.partial(_triton.shifted_truncation, [group], mixing, Effort(2, 0, None, carefully=carefully))
    base = torch.zeros(512, 512)
    group = ResidualGroup([base], [[base]] * 3, *numbers, 64)  # and two steps, whose energies are no series everywhere
    yield functools.partial(_triton.shifted_truncation, [group], mixing, Effort(2, 0, None))
    odd = Blocks([(1, 16, 63)], CPU)  # and rows of length 1 that are no whole vectors
    yield functools.partial(units.unit_rows, odd, odd.vectors(torch.float16), vector_scale=SCALE)


def launches(target: str) -> list[Launch]:
    """Every launch that can happen on a target, each configuration and specialization once."""
    caught: dict[str, Launch] = {}

    def catch(kernel: Any, grid: Any, config: launch.Config, *arguments: Any, **constants: Any) -> None:
        one = Launch(kernel, config, arguments, constants)
        binder = kernel.device_caches[driver.active.get_current_device()][4]
        _, specialization, _ = binder(*arguments, **constants, **launch.options(config))
        caught.setdefault(f"{kernel.__name__} {specialization} {config}", one)

    driver.set_active(CompileOnly(target))
    with (
        mock.patch.object(launch, "start", catch),
        mock.patch.object(launch, "target_of", return_value=target),
        mock.patch.object(_backends, "_why_not_triton", return_value=""),
    ):
        for situation in situations():
            situation()
    return [caught[key] for key in sorted(caught)]  # every process sees the same order


@dataclasses.dataclass
class Compiled:
    """What became of a launch: its kernel, or the error; seconds of compilation."""

    launch: Launch
    kernel: Any
    seconds: float
    error: str = ""


def inspected(target: str, caught: list[Launch]) -> list[dict[str, Any]]:
    """Compile launches and read their machine code."""
    driver.set_active(CompileOnly(target))
    all_compiled = [_compiled(one) for one in caught]
    right = [one for one in all_compiled if not one.error]
    if CHIPS[target].target.backend == "cuda":
        codes = disassembled([_instructions(one.kernel.asm["cubin"]) for one in right], CHIPS[target].architecture)
    else:
        codes = [one.kernel.asm["amdgcn"] for one in right]
    broken = [
        {"kernel": one.launch.kernel.__name__, "target": target, "config": one.launch.described(), "error": one.error}
        for one in all_compiled
        if one.error
    ]
    return [*broken, *(_row(target, *pair) for pair in zip(right, codes, strict=True))]


def _compiled(one: Launch) -> Compiled:
    start = time.perf_counter()
    try:
        kernel = one.compiled()
    except Exception as error:  # a compiler may raise anything; the other kernels' rows are wanted all the same
        return Compiled(one, None, 0.0, f"{type(error).__name__}: {str(error).strip()[-300:]}")
    return Compiled(one, kernel, time.perf_counter() - start)


def _row(target: str, one: Compiled, code: str) -> dict[str, Any]:
    chip, launched, kernel = CHIPS[target], one.launch, one.kernel
    shared = kernel.metadata.shared
    threads = launched.config.warps * chip.target.warp_size
    if chip.target.backend == "cuda":
        usage = _usage(kernel.asm["cubin"])
        registers, spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
    else:
        fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code))
        registers, spills = int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"])
        spills = max(spills, 4 * int(fields["vgpr_spill_count"]))
    held = -(-registers // 8) * 8 * threads
    by_shared = chip.shared_total // shared if shared else chip.threads
    return {
        "kernel": launched.kernel.__name__,
        "target": target,
        "config": launched.described(),
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": shared,
        "mma": len(re.findall(chip.mma, code)),
        "warp_mma": len(re.findall(chip.warp_mma, code)) if chip.warp_mma else 0,
        "wide_loads": len(re.findall(chip.wide_load, code)),
        "programs_per_multiprocessor": min(chip.registers // held, by_shared, chip.threads // threads),
        "declares_mma": launched.declares_mma(target),
        "seconds": round(one.seconds, 2),
    }


def _instructions(binary: bytes) -> bytes:
    """Those of the one kernel of an ELF file."""
    (section,) = [one for one in ELFFile(io.BytesIO(binary)).iter_sections() if one.name.startswith(".text.")]
    return bytes(section.data())


def disassembled(codes: list[bytes], architecture: str) -> list[str]:
    """Text of each kernel's instructions, all in one run: the tool starts in .3 s and takes .02 s a kernel."""
    ends = list(itertools.accumulate(map(len, codes)))
    lines: list[list[str]] = [[] for _ in codes]
    for line in _nvidia_tool("nvdisasm", b"".join(codes), "--no-dataflow", "--binary", architecture).splitlines():
        address = re.match(r"\s*/\*([0-9a-f]{4,})\*/", line)  # bytes from the start of the first kernel
        if address:
            lines[bisect.bisect_right(ends, int(address[1], 16))].append(line)
    return ["\n".join(one) for one in lines]


def _usage(binary: bytes) -> dict[str, int]:
    printed = _nvidia_tool("cuobjdump", binary, "--dump-resource-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}


def _nvidia_tool(name: str, content: bytes, *options: str) -> str:
    """What a tool that comes with Triton prints of a file's content."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def failures(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row, in words."""
    if "error" in row:
        return [f"does not compile ({row['error']})"]
    problems = []
    limit = CHIPS[row["target"]].shared_limit
    if row["spill_bytes"]:
        problems.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > limit:
        problems.append(f"needs {row['shared_bytes']} bytes of shared memory, the chip has {limit}")
    if row["declares_mma"] and not row["mma"]:
        problems.append("has no matrix instruction")
    if row["warp_mma"] and row["config"].get("precision") in ("fp16", "bf16"):
        problems.append("leaves products to the matrix instruction of single warps")
    if row["config"]["aligned"] and not row["wide_loads"]:
        problems.append("has no 128-bit load")
    return problems


def _share(part: tuple[list[str], int, int]) -> list[dict[str, Any]]:
    targets, index, parts = part
    return [row for target in targets for row in inspected(target, launches(target)[index::parts])]


def check(targets: list[str], processes: int) -> list[dict[str, Any]]:
    """A row for every kernel, configuration and target; compiled in several processes."""
    parts = 4 * processes  # more parts than processes: some take longer
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rows = [
            row
            for share in pool.imap_unordered(_share, [(targets, i, parts) for i in range(parts)], 1)
            for row in share
        ]
    return sorted(rows, key=lambda row: (row["kernel"], row["target"], json.dumps(row["config"])))


def sources() -> str:
    """A hash of what rows depend on: kernels and their launches, these operator calls and checks, Triton's version."""
    here, digest = Path(__file__), hashlib.sha256(f"{triton.__version__} {ahead.sources()}".encode())
    for path in (here, here.with_name("gpu") / "cases.py"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def known(path: Path | None) -> list[dict[str, Any]]:
    """Rows in the file of an earlier run, of targets for which these sources passed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return []
    rows = content["kernels"] if content.get("sources") == sources() else []
    failed = {row["target"] for row in rows if failures(row)}
    return [row for row in rows if row["target"] not in failed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--target", action="append", choices=launch.TARGETS, help="default: all of them")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if launch.INTERPRETED:
        print("TRITON_INTERPRET is set: there is nothing to compile", file=sys.stderr)
        return 2
    targets = options.target or list(launch.TARGETS)
    start = time.perf_counter()
    old = known(options.json)
    passed = {row["target"] for row in old}
    missing = [target for target in targets if target not in passed]
    new = check(missing, options.processes) if missing else []
    for row in (row for row in new if "error" not in row):
        print(
            f"{row['kernel']:28} {row['target']:7} registers {row['registers']:4} shared {row['shared_bytes']:7} "
            f"mma {row['mma']:4} wide loads {row['wide_loads']:3} {row['seconds']:5.1f} s  "
            + " ".join(f"{name}={value}" for name, value in row["config"].items())
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"triton": triton.__version__, "sources": sources(), "kernels": [*old, *new]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    bad = [(row, failure) for row in new for failure in failures(row)]
    for row, failure in bad:
        print(f"FAILED: {row['kernel']} on {row['target']} {failure}: {row['config']}")
    counts = collections.Counter(row["target"] for row in (*old, *new))
    covered = ", ".join(f"{target} {counts[target]}" + " before" * (target in passed) for target in targets)
    print(
        f"Triton {triton.__version__}: kernels compiled and inspected: {covered}, {len(bad)} failures, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
