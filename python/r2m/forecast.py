"""What a merge will read, write, hold and take, before any of it is done (``r2m plan``, ``r2m merge --dry-run``).

Bytes follow from headers and the merge's own rules, and are exact but for what the interpreter and libraries hold
besides. Seconds are a prediction from rates measured here within a second; a busy machine or disk has others.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from r2m import machine
from r2m.checkpoints.safetensors_file import plan_files
from r2m.progress import readable_bytes
from r2m_kernels import MergeConfig
from r2m_kernels.errors import printable, quoted
from r2m_kernels.streaming import (
    Backend,
    Inputs,
    Pass,
    PlannedTensor,
    Work,
    budget,
    plan_passes,
    plan_tensors,
    shares,
    whole_bytes,
    work_list,
)

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
class Output:
    """What is written where.

    Attributes:
        directory: an existing one on the file system of the output.
        metadata: of the output's headers.
        dtype: of the floating-point tensors; ``None``: the base's.
        max_shard_size: bytes of tensors per file.
        copies: of the merged tensors on the disk in the end: two where another format is written from them.
        beside: bytes of adapters.
        keeps: whether truncations are kept for merges to come.
    """

    directory: Path
    metadata: Mapping[str, str]
    dtype: torch.dtype | None
    max_shard_size: int
    copies: int = 1
    beside: int = 0
    keeps: bool = False


@dataclass(frozen=True)
class Resources:
    """What a merge has: bytes of working memory for each process, how many there are, and threads of each."""

    budget: int
    processes: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Share:
    """What falls to one process."""

    read: int  # bytes, over all passes
    used: int  # bytes that pass through the steps, kept ones counted again
    flops: float
    spill: int
    memory: int
    works: Mapping[str, Sequence[Work]]  # of every pass, in its order
    in_parts: int  # tensors that are cut, and on no pass needed whole
    over: Sequence[str]  # tensors that need more at once than there is


@dataclass(frozen=True)
class Forecast:
    """See the module.

    Attributes:
        inputs: bytes of all checkpoints.
        output: bytes of the merged tensors' files, headers included, and of adapters.
        files: how many files those are.
        shares: of each process.
        budget: bytes for each process.
        free_disk: bytes where the output goes.
        copies: see :class:`Output`.
        kept: bytes of truncations at most that are kept for merges to come.
    """

    experts: int
    tensors: int
    inputs: int
    output: int
    files: int
    shares: Sequence[Share]
    budget: int
    free_disk: int
    copies: int = 1
    kept: int = 0

    @property
    def read(self) -> int:
        """Bytes read by all processes."""
        return sum(share.read for share in self.shares)

    @property
    def disk(self) -> int:
        """Bytes that must be free: the output, what low-rank factors spill, and what is kept of them."""
        return self.copies * self.output + sum(share.spill for share in self.shares) + self.kept

    @property
    def over(self) -> list[str]:
        """Tensors that need more at once than their share of the budget."""
        return [name for share in self.shares for name in share.over]

    @property
    def in_parts(self) -> int:
        """Tensors that are merged in parts."""
        return sum(share.in_parts for share in self.shares)

    @property
    def enough(self) -> bool:
        """Whether disk and budget suffice."""
        return self.disk <= self.free_disk and not self.over

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


def forecast(inputs: Inputs, config: MergeConfig, backend: Backend, output: Output, resources: Resources) -> Forecast:
    """Work out what a merge takes.

    Args:
        inputs, config: what is merged and how.
        backend: who computes.
        output: what is written where.
        resources: what it may take.

    Raises:
        InvalidInput: checkpoints that do not fit together.
    """
    plan = plan_tensors(inputs.base, inputs.named, config)
    passes = plan_passes(plan, config, backend.operators)
    of_processes = []
    for names in shares(plan, passes, inputs, config, resources.processes):
        tensors = [tensor for tensor in plan.tensors if tensor.name in names]
        whole = whole_bytes(passes, inputs)
        memory = budget.split(resources.budget, tensors, inputs, config, threads=resources.threads, whole=whole)
        works = {}
        for one in passes:
            own = [tensor for tensor in one.tensors if tensor.name in names]
            works[one.name] = work_list(one, own, inputs, memory, resources.threads)
        of_processes.append(_share(tensors, works, passes, memory, inputs, config, resources.threads))
    files = plan_files(
        plan.output_specs(inputs.base.specs, output.dtype), output.metadata, output.max_shard_size, plan.aliases
    )
    return Forecast(
        experts=len(inputs.experts),
        tensors=len(plan.tensors),
        inputs=sum(spec.nbytes for source in inputs.sources for spec in source.specs.values()),
        output=sum(file.size for file in files) + output.beside,
        files=len(files),
        shares=of_processes,
        budget=resources.budget,
        free_disk=machine.free_disk(output.directory),
        copies=output.copies,
        kept=sum(inputs.factor_bytes(tensor, config) for tensor in plan.tensors) if output.keeps else 0,
    )


def _share(
    tensors: Sequence[PlannedTensor],
    works: Mapping[str, Sequence[Work]],
    passes: Sequence[Pass],
    memory: budget.Memory,
    inputs: Inputs,
    config: MergeConfig,
    threads: int,
) -> Share:
    """What falls to a process that works on some tensors, with so many threads."""
    passing: Counter[str] = Counter()
    for one in passes:
        for work in works[one.name]:
            (tensor,) = work.tensors
            times = 1 if work.pace is None else one.reads(tensor, inputs, work.pace)
            passing[tensor.name] += int(times * one.read_bytes(tensor, inputs))

    def used(tensor: PlannedTensor) -> int:
        """Over all passes; the base's part of a mean of the experts passes once, in the search for NaN."""
        once = inputs.base.specs[tensor.name].nbytes if tensor.role == "statistic" else 0
        return passing[tensor.name] - once

    flight, factors = memory.flight or 0, (memory.factors or 0) if config.eta != 0 else 0
    room = memory.stored or flight
    paces = {(name, work.tensors[0].name): work.pace for name in works for work in works[name] if work.pace is not None}
    cut = {work.tensors[0].name for of_pass in works.values() for work in of_pass if work.parts}
    by_name = {tensor.name: tensor for tensor in tensors}
    needed: dict[str, int] = {}
    for one in passes:
        for tensor in one.tensors:
            if tensor.name in by_name and one.block_elements(tensor) is None and (one.name, tensor.name) not in paces:
                taken = one.working_bytes(tensor, inputs)
                taken -= inputs.nbytes(tensor) if tensor.name in memory.kept else 0  # counted there
                needed[tensor.name] = max(needed.get(tensor.name, 0), taken)
    uncut = set(needed)
    for (_, name), pace in paces.items():
        needed[name] = max(needed.get(name, 0), budget.truncation_bytes(by_name[name], inputs, config, pace))
    excess = {name: taken - room for name, taken in needed.items()}
    over = {tensor.name: excess[tensor.name] for tensor in tensors if excess.get(tensor.name, 0) > 0}
    kept = sum(inputs.nbytes(tensor) for tensor in tensors if tensor.name in memory.kept)
    # A matrix that is over has the process for itself, and its figure is to be true, where others' is a bound.
    beside = budget.library_usual(config) if over else budget.library_bytes(threads)
    return Share(
        read=sum(inputs.nbytes(tensor) if tensor.name in memory.kept else used(tensor) for tensor in tensors),
        used=sum(map(used, tensors)),
        flops=sum(budget.truncation_flops(tensor, config, len(inputs.experts)) for tensor in tensors),
        spill=memory.spill,
        memory=beside + room + max(over.values(), default=0) + factors + kept,
        works=works,
        in_parts=len(cut - uncut),
        over=list(over),
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


def lines(forecast: Forecast, rates: Rates, cores: int, out: str) -> list[str]:
    """The forecast for a terminal."""
    size = readable_bytes
    passes = forecast.read / max(1, forecast.inputs)
    once = "everything once" if passes <= 1.001 else f"{passes:.2g} times the inputs"
    spill = sum(share.spill for share in forecast.shares)
    count = len(forecast.shares)
    each = " for each process" if count > 1 else ""
    parts = f"; {forecast.in_parts} tensors in parts" if forecast.in_parts else ""
    text = [
        f"inputs   {forecast.experts + 1} checkpoints, {forecast.tensors} tensors, {size(forecast.inputs)}",
        f"reads    {size(forecast.read)}, {once}{parts}",
        f"writes   {size(forecast.output)} in {forecast.files} file{'s' * (forecast.files != 1)} to {out}",
        f"memory   {size(max(share.memory for share in forecast.shares))} at most, of a budget of "
        f"{size(forecast.budget)}{each}; the process itself takes {size(machine.resident())} besides",
        f"disk     {size(forecast.disk)} of {size(forecast.free_disk)} free"
        + (f", {size(spill)} of it for low-rank factors" if spill else "")
        + (f", {size(forecast.kept)} at most for what is kept of each expert" if forecast.kept else ""),
        f"time     about {forecast.seconds(rates, cores):.1f} s, of which {rates.start:.1f} s to start"
        + (f"; {count} processes on {cores} core{'s' * (cores != 1)}" if count > 1 else ""),
    ]
    if forecast.disk > forecast.free_disk:
        text.append(f"too little disk: {size(forecast.disk)} needed, {size(forecast.free_disk)} free")
    if forecast.over:
        more = f" and {len(forecast.over) - 1} more" if forecast.over[1:] else ""
        text.append(f"over the budget: {quoted(forecast.over[0])}{more} need more at once; memory counts it")
    return text


def work_lines(forecast: Forecast) -> list[str]:
    """Every piece of work of every pass in its order, as it will be run: what, how large, and how it is taken."""
    text = []
    for index, share in enumerate(forecast.shares):
        whose = f" of process {index}" if len(forecast.shares) > 1 else ""
        for name, works in share.works.items():
            text.append(f"{name}{whose}: {len(works)} piece{'s' * (len(works) != 1)} of work")
            text += [f"  {_described(work)}" for work in works]
    return text


def _described(work: Work) -> str:
    tensor = work.tensors[0]
    parts = len(work.parts) * max(1, len(work.columns))
    how = f"in {parts} parts" if parts else "beside others" if work.shared else "on all threads"
    how = how if work.pace is None else "from storage"
    return f"{printable(tensor.name)} {list(tensor.spec.shape)}, {tensor.role}, {how}"
