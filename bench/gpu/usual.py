"""What people run: the default, every method, few and many experts, networks with statistics, adapters, other places.

    python -m bench.gpu --only usual

The most telling first. A time is that of a whole merge from call to result, after two that gave the same bits; with it
go bytes that were read, peak memory, and what the cost model predicts where it knows the merge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench import cost_model, host_cost, operator_costs
from bench.cases import StateDict, block_shapes, checkpoints
from bench.cost_model import DTYPES, Job, Shapes
from bench.gpu import checks
from bench.gpu.merges import same_bits, seconds
from bench.gpu.record import Record, Session, predicting_chip, table
from r2m_kernels import MergeConfig, analyze
from r2m_kernels._stream.budget import DEVICE_GROUP_BYTES
from r2m_kernels.config import OFFERED
from r2m_kernels.streaming import TensorSpec

# A rehearsal walks through each way once.
REHEARSED = ("default", "default, inputs in files", "average, inputs on the host", "rows", "ties")
MANY_BYTES = 2**34  # of inputs: checked once, timed thrice


@dataclasses.dataclass(frozen=True)
class Usual:
    """A merge.

    Attributes:
        model: of :data:`MODELS`.
        config: how to merge.
        experts, dtype: of the inputs.
        place: where they lie: "gpu", "host" or "files".
    """

    name: str
    model: str
    config: MergeConfig
    experts: int = 3
    dtype: str = "float32"
    place: str = "gpu"


def _vectors(width: int) -> dict[str, tuple[int, ...]]:
    sizes = {"attention.bias": (4 * width,), "mlp.up.bias": (4 * width,), "mlp.down.bias": (width,)}
    return {**sizes, "norm1": (width,), "norm2": (width,)}


def _tower(blocks: int, width: int, count: int, source: torch.Generator, dtype: torch.dtype) -> list[StateDict]:
    """Matrices of a Transformer's blocks, and a few vectors each."""
    base, experts = checkpoints(blocks, count, source, block_shapes(width), dtype)
    return _with_vectors(
        [base, *experts], {f"{block}.{k}": s for block in range(blocks) for k, s in _vectors(width).items()}, source
    )


def _with_vectors(
    states: list[StateDict], shapes: Mapping[str, tuple[int, ...]], source: torch.Generator
) -> list[StateDict]:
    for state in states:
        kind = next(iter(state.values()))
        for name, shape in shapes.items():
            state[name] = (0.02 * torch.randn(shape, generator=source, device=source.device)).to(kind.dtype)
    return states


def _cnn(layers: int, width: int, count: int, source: torch.Generator, dtype: torch.dtype) -> list[StateDict]:
    """Convolutions, each with batch normalization."""
    shapes = host_cost.cnn(layers, width)

    def made(scale: float, around: StateDict | None) -> StateDict:
        state: StateDict = {}
        for name, shape in shapes.items():
            if not shape:
                state[name] = torch.tensor(100 if around is None else 101, device=source.device)
                continue
            noise = scale * torch.randn(shape, generator=source, device=source.device)
            state[name] = (noise if around is None else around[name].float() + noise).to(dtype)
        return state

    base = made(0.02, None)
    return [base, *(made(0.002, base) for _ in range(count))]


def _lora(blocks: int, width: int, count: int, source: torch.Generator, dtype: torch.dtype) -> list[StateDict]:
    """Adapters of rank 2, added to the base's matrices."""
    base, _ = checkpoints(blocks, 0, source, block_shapes(width), dtype)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=source, device=source.device)

    def adapted(theta: Tensor) -> Tensor:
        return (theta.float() + 0.002 * random(len(theta), 2) @ random(2, theta.shape[1])).to(dtype)

    return [base, *({name: adapted(theta) for name, theta in base.items()} for _ in range(count))]


Maker = Callable[[int, torch.Generator, torch.dtype], list[StateDict]]
MODELS: dict[str, Maker] = {
    "ViT-L/14": functools.partial(_tower, 24, 1024),
    "ViT-B/16": functools.partial(_tower, 12, 768),
    "2 blocks": functools.partial(_tower, 2, 768),
    "CNN": functools.partial(_cnn, 160, 256),
    "LoRA": functools.partial(_lora, 24, 1024),
}
TINY: dict[str, Maker] = {
    **dict.fromkeys(("ViT-L/14", "ViT-B/16", "2 blocks"), functools.partial(_tower, 1, 4)),
    "CNN": functools.partial(_cnn, 2, 8),
    "LoRA": functools.partial(_lora, 1, 4),
}


def jobs(session: Session) -> Iterator[Usual]:
    """Most telling first."""
    default = MergeConfig.r2m()
    truncated, rows = MergeConfig.r2m(rank=0.1, row_power=0.0), MergeConfig.r2m(rank=1.0)
    for model in ("ViT-L/14", "ViT-B/16"):
        yield Usual("default", model, default)
        yield Usual("default", model, default, dtype="bfloat16")
        if session.rehearsal:
            break
    yield Usual("default, inputs on the host", "ViT-L/14", default, place="host")
    yield Usual("default, inputs in files", "ViT-L/14", default, place="files")
    yield Usual("average", "ViT-L/14", MergeConfig.weight_average())
    yield Usual("average, inputs on the host", "ViT-L/14", MergeConfig.weight_average(), place="host")
    yield Usual("rows", "ViT-L/14", rows)
    yield Usual("rank 0.1", "ViT-L/14", truncated)
    yield Usual("rank 0.1 by rows", "ViT-L/14", MergeConfig.r2m(rank=0.1))
    yield Usual("default", "CNN", default)
    yield Usual("rows", "CNN", rows)
    yield Usual("default", "LoRA", default)
    for count in (1, 2, 8, 16):
        if not session.rehearsal or count in (1, 2):
            yield Usual("default", "ViT-B/16", default, experts=count)
    for name, method in OFFERED.items():
        if name != "r2m" and (not session.rehearsal or name == "ties"):
            yield Usual(name, "2 blocks", method.configure({}))


class File:
    """A safetensors file that is read straight into the reader's memory, as ``r2m`` reads it: a source of tensors."""

    def __init__(self, label: str, path: Path) -> None:
        self.label, self._path = label, path
        self.aliases: Mapping[str, str] = {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        kinds = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self.specs = {
            name: TensorSpec(tuple(entry["shape"]), DTYPES[kinds[entry["dtype"]]]) for name, entry in entries.items()
        }
        self._starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}

    def in_blocks(self, name: str) -> bool:
        return True

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """See :class:`r2m_kernels.streaming.DirectSource`."""
        memory, at = memoryview(out.view(torch.uint8).numpy()), self._starts[name] + start * out.dtype.itemsize
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            while memory:
                count = os.preadv(descriptor, [memory], at)
                memory, at = memory[count:], at + count
        finally:
            os.close(descriptor)

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, dtype=self.specs[name].dtype)
        self.read_into(name, start, out)
        return out

    def read_block(self, name: str, start: int, length: int, step: int, count: int) -> Tensor:
        return torch.stack(
            [self.read_elements(name, start + i * step, start + i * step + length) for i in range(count)]
        )

    def read(self, name: str) -> Tensor:
        return self.read_elements(name, 0, self.specs[name].numel).view(self.specs[name].shape)


@contextlib.contextmanager
def placed(states: list[StateDict], place: str) -> Iterator[list[Any]]:
    """The same where they are wanted: state dicts, or sources of tensors in files."""
    if place == "gpu":
        yield states
        return
    host = [{name: tensor.cpu() for name, tensor in state.items()} for state in states]
    states.clear()  # what the GPU had
    if place == "host":
        yield host
        return
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, f"{index}.safetensors") for index in range(len(host))]
        for path, state in zip(paths, host, strict=True):
            save_file(state, path)
        yield [File(path.name, path) for path in paths]


def predicted_seconds(session: Session, job: Usual, shapes: list[tuple[int, ...]]) -> float | None:
    """Of kernels and the link, where the cost model knows what the merge launches."""
    chip, config = predicting_chip(session), job.config
    by_rows = config.row_power > 0 and config.eta != 0
    whole = config.eta != 0 and config.rank == 1.0
    if chip is None or job.model not in ("ViT-L/14", "ViT-B/16") or (whole and not by_rows):
        return None
    model, how = Shapes.of(job.model, shapes), Job(job.experts, DTYPES[job.dtype], session.target)
    costs = cost_model.merge_costs(model, how, config.rank, group_bytes=DEVICE_GROUP_BYTES, by_rows=by_rows)
    if config.eta == 0:
        flat = [(m * n, count) for m, n, count in model.matrices] + list(model.vectors)
        known = [cost for cost in costs if cost.step in ("transfer", "task Gram")]
        costs = known + [operator_costs.combine_vector_cost(*one, how) for one in flat]
    total = sum(cost.predicted_seconds(chip) for cost in costs if not cost.link_bytes)
    if job.place == "gpu":
        return total
    # Results go the other way meanwhile, and kernels work.
    return max(total, sum(cost.link_bytes for cost in costs) / chip.host_link)


def one_job(session: Session, job: Usual) -> dict[str, Any]:
    made = (TINY if session.rehearsal else MODELS)[job.model]
    states = made(job.experts, checks.generator(session.device, seed=0), DTYPES[job.dtype])
    size = sum(tensor.nbytes for state in states for tensor in state.values())
    shapes = [tuple(tensor.shape) for tensor in states[0].values()]
    row: dict[str, Any] = {"input_bytes": size, "tensors": len(shapes)}
    device = None if session.rehearsal else session.device
    with placed(states, job.place) as (base, *experts):

        def merged() -> Any:
            return analyze(base, experts, job.config, backend="triton", device=device)

        start = time.monotonic()
        analysis = merged()
        first = analysis.merge()
        session.synchronize()
        row["first_run_seconds"] = None if session.rehearsal else round(time.monotonic() - start, 2)  # it compiles
        row["bytes_read"] = [step.bytes_read for step in analysis.steps]
        del analysis
        if not session.rehearsal:
            torch.cuda.reset_peak_memory_stats()
        row["bit_identical"] = same_bits(first, merged().merge())
        if not session.rehearsal:
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["finite"] = all(bool(torch.isfinite(one).all()) for one in first.values() if one.is_floating_point())
        del first
        row["passed"] = row["bit_identical"] and row["finite"]
        if row["passed"]:
            repeats = 3 if size > MANY_BYTES or job.place != "gpu" else 5
            work = functools.partial(_whole, merged)
            row["seconds"] = None if session.rehearsal else seconds(session, work, repeats=repeats, warmups=0)
    row["predicted_seconds"] = predicted_seconds(session, job, shapes)
    return row


def _whole(analyzed: Callable[[], Any]) -> Any:
    return analyzed().merge()


def run(session: Session, record: Record) -> bool:
    for job in jobs(session):
        if session.rehearsal and job.name not in REHEARSED:
            continue
        what = f"{job.name}, {job.model}, N={job.experts} {job.dtype}"
        if record.time_for(what, 8):
            record.attempt(functools.partial(one_job, session, job), job=what)
            gc.collect()
            session.free_cache()
    lines = []
    for row in record.rows:
        milliseconds = [None if row.get(key) is None else row[key] * 1e3 for key in ("seconds", "predicted_seconds")]
        lines.append([row["job"], *milliseconds, row.get("tensors"), row.get("input_bytes", 0) / 1e9])
    table(["merge", "ms", "predicted ms", "tensors", "GB"], lines)
    return record.close()
