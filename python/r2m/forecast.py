"""What a merge will read, write, hold and take, before any of it is done (``r2m plan``, ``r2m merge --dry-run``).

Bytes follow from headers and the engine's own rules, and are exact but for what the interpreter and libraries hold
besides. Seconds are a prediction from rates measured here within a second; a busy machine or disk has others.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from r2m import machine
from r2m.checkpoints import layout
from r2m.progress import readable_bytes
from r2m_kernels import MergeConfig
from r2m_kernels.errors import quoted
from r2m_kernels.streaming import PlannedTensor, TensorSource, assign, plan_tensors
from r2m_kernels.streaming import budget as planning

_SAMPLE = 2**25  # bytes that a rate is measured on


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: bytes, and flops of truncations. One thread's, but for the disk's.

    Attributes:
        start: seconds until a process begins to work.
    """

    read: float
    write: float
    compute: float
    flops: float
    start: float


@dataclass(frozen=True)
class Share:
    """What falls to one process."""

    read: int  # bytes, over all passes
    used: int  # bytes that pass through the steps, kept ones counted again
    flops: float
    spill: int
    memory: int


@dataclass(frozen=True)
class Forecast:
    """See the module.

    Attributes:
        inputs: bytes of all checkpoints.
        output: bytes of the merged tensors' files, headers included.
        copies: how often they are on the disk in the end: twice where another format is written from them.
        files: how many files those are.
        shares: of each process.
        in_parts: tensors that are merged in parts.
        whole: tensors that exceed their share of the budget and cannot be cut, as their truncation needs all of them.
        budget: bytes for each process.
        free_disk: bytes where the output goes.
    """

    experts: int
    tensors: int
    inputs: int
    output: int
    files: int
    shares: Sequence[Share]
    in_parts: int
    whole: Sequence[str]
    budget: int
    free_disk: int
    copies: int = 1

    @property
    def read(self) -> int:
        """Bytes read by all processes."""
        return sum(share.read for share in self.shares)

    @property
    def disk(self) -> int:
        """Bytes that must be free: the output and what low-rank factors spill."""
        return self.copies * self.output + sum(share.spill for share in self.shares)

    @property
    def enough(self) -> bool:
        """Whether disk and budget suffice."""
        return self.disk <= self.free_disk and not self.whole

    def seconds(self, rates: Rates, cores: int) -> float:
        """Predicted time with all processes on ``cores`` cores of machines that have these rates.

        The slowest process decides. Each has its share of the cores; what is written goes to one disk.
        """
        threads = min(1.0, cores / len(self.shares)) if len(self.shares) > 1 else float(cores)
        threads = max(threads, float(cores // len(self.shares)))
        slowest = max(
            share.read / rates.read + (share.used / rates.compute + share.flops / rates.flops) / threads
            for share in self.shares
        )
        return rates.start + slowest + self.copies * self.output / rates.write


def forecast(
    base: TensorSource,
    experts: Mapping[str, TensorSource],
    config: MergeConfig,
    *,
    directory: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    max_shard_size: int,
    budget: int,
    processes: int = 1,
    threads: int = 1,
    copies: int = 1,
) -> Forecast:
    """Work out what a merge takes.

    Args:
        base, experts, config: what is merged and how.
        directory: an existing one on the file system of the output.
        metadata: of the output's headers.
        dtype: of the output; ``None``: the base's.
        max_shard_size: bytes of tensors per file.
        budget: bytes of working memory for each process.
        processes: how many.
        threads: of each.
        copies: of the merged tensors on the disk.

    Raises:
        InvalidInput: checkpoints that do not fit together.
    """
    plan = plan_tensors(base, experts, config)
    sources = [base, *experts.values()]

    def read(tensor: PlannedTensor) -> int:
        read_from = [base] if tensor.role == "copied" else sources
        return sum(source.specs[tensor.name].nbytes for source in read_from if tensor.name in source.specs)

    def used(tensor: PlannedTensor) -> int:
        """Over all passes; the base's part of a mean of the experts passes once, in the search for NaN."""
        once = base.specs[tensor.name].nbytes if tensor.role == "statistic" else 0
        return read(tensor) * planning.passes(tensor, config) - once

    costs = {tensor.name: planning.cost(tensor, config, read(tensor), len(experts)) for tensor in plan.tensors}
    found, in_parts, whole = [], 0, []
    for hand in assign(costs, processes):
        mine = [tensor for tensor in plan.tensors if tensor.name in hand]
        split = planning.shares(budget, mine, read, len(experts), threads)
        kept = planning.kept(split.kept, mine, read)
        factors = sum(planning.factor_bytes(tensor, len(experts)) for tensor in mine) if config.eta != 0 else 0
        large = [tensor for tensor in mine if planning.working_bytes(tensor, read(tensor)) > split.piece]
        uncut = [tensor for tensor in large if not planning.can_be_cut(tensor, config)]
        in_parts += len(large) - len(uncut)
        over = [tensor for tensor in uncut if planning.working_bytes(tensor, read(tensor)) > split.flight]
        whole += [tensor.name for tensor in over]
        excess = max((planning.working_bytes(tensor, read(tensor)) - split.flight for tensor in over), default=0)
        found.append(
            Share(
                read=sum(read(tensor) if tensor.name in kept else used(tensor) for tensor in mine),
                used=sum(used(tensor) for tensor in mine),
                flops=sum(planning.truncation_flops(tensor, config, len(experts)) for tensor in mine),
                spill=max(0, factors - split.factors),
                memory=split.flight
                + excess
                + min(factors, split.factors)
                + sum(read(tensor) for tensor in mine if tensor.name in kept),
            )
        )
    files = layout.plan_files(plan.output_specs(base.specs, dtype), metadata, max_shard_size, plan.aliases)
    return Forecast(
        experts=len(experts),
        tensors=len(plan.tensors),
        inputs=sum(spec.nbytes for source in sources for spec in source.specs.values()),
        output=sum(file.size for file in files),
        files=len(files),
        shares=found,
        in_parts=in_parts,
        whole=whole,
        budget=budget,
        free_disk=machine.free_disk(directory),
        copies=copies,
    )


def measured_rates(sample: Path, directory: Path) -> Rates:
    """This machine's rates, within about a second.

    Args:
        sample: a file to read from.
        directory: where to write, and leave nothing.
    """
    started = time.perf_counter()
    with sample.open("rb", buffering=0) as file:
        count = len(file.read(_SAMPLE))
    read = count / (time.perf_counter() - started)
    content = bytes(_SAMPLE)
    with tempfile.TemporaryFile(dir=directory) as file:
        started = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        write = _SAMPLE / (time.perf_counter() - started)
    # A step on two experts: differences, their products, and a product of the truncation.
    theta, other = torch.zeros(2**21), torch.ones(2**21)
    square = torch.ones(768, 768)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compute = flops = 0.0
        for _ in range(3):
            started = time.perf_counter()
            tau = other - theta
            torch.dot(tau, tau)
            compute = max(compute, 2 * theta.nbytes / (time.perf_counter() - started))
            started = time.perf_counter()
            _ = square @ square
            flops = max(flops, 2 * 768**3 / (time.perf_counter() - started))
    finally:
        torch.set_num_threads(before)
    # Until now this process has done what every process of a merge does first.
    return Rates(read, write, compute, flops, start=machine.age())


def lines(found: Forecast, rates: Rates, cores: int, out: str) -> list[str]:
    """The forecast for a terminal."""
    size = readable_bytes
    passes = found.read / max(1, found.inputs)
    once = "everything once" if passes <= 1.001 else f"{passes:.2g} times the inputs"
    spill = sum(share.spill for share in found.shares)
    count = len(found.shares)
    each = " for each process" if count > 1 else ""
    parts = f"; {found.in_parts} tensors in parts" if found.in_parts else ""
    text = [
        f"inputs   {found.experts + 1} checkpoints, {found.tensors} tensors, {size(found.inputs)}",
        f"reads    {size(found.read)}, {once}{parts}",
        f"writes   {size(found.output)} in {found.files} file{'s' * (found.files != 1)} to {out}",
        f"memory   {size(max(share.memory for share in found.shares))} at most, of a budget of "
        f"{size(found.budget)}{each}; the process itself takes {size(machine.resident())} besides",
        f"disk     {size(found.disk)} of {size(found.free_disk)} free"
        + (f", {size(spill)} of it for low-rank factors" if spill else ""),
        f"time     about {found.seconds(rates, cores):.1f} s, of which {rates.start:.1f} s to start"
        + (f"; {count} processes on {cores} core{'s' * (cores != 1)}" if count > 1 else ""),
    ]
    if found.disk > found.free_disk:
        text.append(f"too little disk: {size(found.disk)} needed, {size(found.free_disk)} free")
    if found.whole:
        more = f" and {len(found.whole) - 1} more" if found.whole[1:] else ""
        text.append(
            f"over the budget: {quoted(found.whole[0])}{more} cannot be merged in parts; memory counts it whole"
        )
    return text
