"""How fast are whole merges on a GPU, beside full SVDs, ``svd_lowrank`` and our torch backend? Right results first.

    python -m bench.gpu --only merges

State dicts with the matrices of ViT-B/16 and ViT-L/14 lie on the GPU; a time is that of ``merge`` from call to result.
The SVDs are favoured: theirs is the time of the truncations alone, of residuals that are formed already, measured on
one block of one expert and scaled (``extrapolated_from_blocks``); that grows with blocks and experts exactly.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import cost_model
from bench.gpu import checks
from bench.gpu.record import Record, Session, chip_of, table
from r2m_kernels import MergeConfig, _triton, analyze, merge
from r2m_kernels._stream.budget import DEVICE_GROUP_BYTES
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels.truncation import truncate_residuals

StateDict = dict[str, Tensor]
TRUNCATED = MergeConfig.r2m_truncated()
# Of the time left, what a rival may take to be measured whole instead of on one block.
SHARE_OF_TIME = 0.1


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    blocks: int
    width: int
    wide: int
    squares: tuple[str, ...] = ("q", "k", "v", "out")

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of one block's matrices."""
        square = {f"attention.{name}": (self.width, self.width) for name in self.squares}
        return {**square, "mlp.up": (self.wide, self.width), "mlp.down": (self.width, self.wide)}


B16, L14 = Model("ViT-B/16", 12, 768, 3072), Model("ViT-L/14", 24, 1024, 4096)
TINY = Model("tiny", 1, 72, 80, ("q",))  # 72: sides up to 64 are truncated exactly, by other code


def jobs(session: Session) -> list[tuple[Model, int, torch.dtype]]:
    """Most telling first."""
    if session.rehearsal:
        return [(TINY, 2, torch.float32)]
    return [
        (L14, 3, torch.float32),
        (B16, 3, torch.float32),
        (L14, 3, torch.bfloat16),
        (L14, 8, torch.float32),
        (L14, 8, torch.bfloat16),
        (B16, 8, torch.float32),
        (B16, 3, torch.bfloat16),
        (B16, 8, torch.bfloat16),
    ]


def checkpoints(
    model: Model, blocks: int, experts: int, dtype: torch.dtype, device: torch.device
) -> tuple[StateDict, list[StateDict]]:
    """A base and experts whose task vectors have a common part and singular values falling like k^-1/2."""
    source = checks.generator(device, seed=0)
    base: StateDict = {}
    states: list[StateDict] = [{} for _ in range(experts)]
    for block in range(blocks):
        for name, shape in model.shapes().items():
            key = f"blocks.{block}.{name}.weight"
            theta = 0.02 * torch.randn(*shape, generator=source, device=device)
            common = checks.decaying(*shape, source)
            base[key] = theta.to(dtype)
            for state in states:
                state[key] = (theta + 0.02 * (0.6 * common + checks.decaying(*shape, source))).to(dtype)
    return base, states


def first_blocks(state: StateDict, blocks: int) -> StateDict:
    return {name: tensor for name, tensor in state.items() if int(name.split(".")[1]) < blocks}


def same_bits(first: StateDict, second: StateDict) -> bool:
    integers = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(*(one[name].view(integers[one[name].element_size()]) for one in (first, second))) for name in first
    )


def full_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def svd_lowrank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(x, q=rank + 8, niter=2)
    return u[:, :rank] * s[:rank], v[:, :rank].mT


def seconds(session: Session, work: Callable[[], object], repeats: int, warmups: int = 1) -> float | None:
    """Median by the wall clock, the GPU's work included; None in a rehearsal, where the work is done once."""
    for _ in range(0 if session.rehearsal else warmups):
        work()
    times = []
    for _ in range(1 if session.rehearsal else repeats):
        session.synchronize()
        start = time.perf_counter()
        work()
        session.synchronize()
        times.append(time.perf_counter() - start)
    return None if session.rehearsal else statistics.median(times)


def checked(session: Session, model: Model, base: StateDict, experts: list[StateDict]) -> dict[str, Any]:
    """Two runs to the bit; truncation errors of the first block's shapes against the optimum; peak memory."""
    if not session.rehearsal:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.monotonic()
    first = merge(base, experts, TRUNCATED, backend="triton")
    session.synchronize()
    found: dict[str, Any] = {}
    if not session.rehearsal:
        found["first_run_seconds"] = round(time.monotonic() - start, 2)  # it compiles
        found["peak_bytes_beside_inputs"] = torch.cuda.max_memory_allocated() - before
    found["bit_identical"] = same_bits(first, merge(base, experts, TRUNCATED, backend="triton"))
    found["finite"] = all(bool(torch.isfinite(tensor).all()) for tensor in first.values())
    mixing = analyze(base, experts, backend="triton", eta=0).real_subspace.mixing
    found["truncation_over_optimum"] = {}
    for shape in dict.fromkeys(model.shapes().values()):
        name = next(name for name, tensor in base.items() if tensor.shape == shape)
        thetas = [expert[name] for expert in experts]
        rank = truncation_rank(TRUNCATED.rank, shape)
        group = ([name], [base[name]], [[theta] for theta in thetas])
        (factors,) = truncate_residuals(*group, mixing, rank, TRUNCATED, _triton)
        x = checks.residuals(base[name], thetas, mixing)
        excess = checks.truncation_excess(factors.left, factors.right, x)
        found["truncation_over_optimum"]["x".join(map(str, shape))] = excess
    worst = max(found["truncation_over_optimum"].values())
    found["passed"] = found["bit_identical"] and found["finite"] and worst <= checks.TRUNCATION
    return found


def svd_block(session: Session, model: Model, base: StateDict, expert: StateDict) -> dict[str, dict[str, Any]]:
    """Seconds of one expert's truncations in one block, and the error of ``svd_lowrank``."""
    methods = {"full_svd": full_svd, "svd_lowrank": svd_lowrank}
    found: dict[str, dict[str, Any]] = {name: {"seconds": 0.0, "truncation_over_optimum": 0.0} for name in methods}
    shapes = list(model.shapes().values())
    for shape in dict.fromkeys(shapes):
        name = next(name for name, tensor in base.items() if tensor.shape == shape)
        x, rank = expert[name].float() - base[name].float(), truncation_rank(TRUNCATED.rank, shape)
        for method, truncate in methods.items():
            left, right = truncate(x, rank)  # also what loads the library
            excess = checks.truncation_excess(left.unsqueeze(0), right.unsqueeze(0), x.double().unsqueeze(0))
            row = found[method]
            row["truncation_over_optimum"] = max(row["truncation_over_optimum"], excess)
            repeats = 1 if method == "full_svd" else 5
            once = seconds(session, lambda t=truncate, x=x, r=rank: t(x, r), repeats, warmups=0)
            row["seconds"] = None if once is None else row["seconds"] + shapes.count(shape) * once
    return found


def torch_backend(
    session: Session, model: Model, base: StateDict, experts: list[StateDict]
) -> tuple[float | None, int]:
    """Seconds of ``backend="torch"`` for the whole model, and how many blocks were measured for it."""
    part = first_blocks(base, 1), [first_blocks(expert, 1) for expert in experts]
    one = seconds(session, lambda: merge(*part, TRUNCATED, backend="torch"), repeats=1)
    if one is None or one * model.blocks > SHARE_OF_TIME * session.left():
        return None if one is None else one * model.blocks, 1
    whole = seconds(session, lambda: merge(base, experts, TRUNCATED, backend="torch"), repeats=1, warmups=0)
    return whole, model.blocks


def from_host(session: Session, base: StateDict, experts: list[StateDict]) -> dict[str, Any]:
    """Inputs in the CPU's memory, computed on the GPU; and what copying as many bytes from pinned memory takes."""
    host = [{name: tensor.cpu() for name, tensor in state.items()} for state in (base, *experts)]
    took = seconds(session, lambda: merge(host[0], host[1:], TRUNCATED, device="cuda", backend="triton"), repeats=2)
    block = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    into = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    copy = seconds(session, lambda: into.copy_(block, non_blocking=True), repeats=5)
    size = sum(tensor.nbytes for state in host for tensor in state.values())
    assert copy is not None
    return {"seconds": took, "link_bytes_per_second": block.nbytes / copy, "copy_seconds": size / block.nbytes * copy}


def one_job(
    session: Session, model: Model, count: int, dtype: torch.dtype, blocks_of: dict[str, dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    base, experts = checkpoints(model, model.blocks, count, dtype, session.device)
    row = checked(session, model, base, experts)
    row["input_bytes"] = sum(tensor.nbytes for state in (base, *experts) for tensor in state.values())
    if not row["passed"]:
        return row  # no time for a wrong result
    ours = seconds(session, lambda: merge(base, experts, TRUNCATED, backend="triton"), repeats=5)
    row["seconds"] = ours
    if model.name not in blocks_of:
        try:
            blocks_of[model.name] = svd_block(session, model, base, experts[0])
        except Exception as failure:  # a library's SVD that does not converge, say: our own times stand
            row["svd_error"] = str(failure)[-500:]
            blocks_of[model.name] = {}
    row["rivals"] = {}
    for method, block in blocks_of[model.name].items():
        whole = None if block["seconds"] is None else block["seconds"] * model.blocks * count
        error = block["truncation_over_optimum"]
        row["rivals"][method] = {
            "seconds": whole,
            "extrapolated_from_blocks": 1,
            "extrapolated_from_experts": 1,
            "truncation_over_optimum": error,
        }
    try:
        took, measured = torch_backend(session, model, base, experts)
        row["rivals"]["torch backend"] = {"seconds": took}
        if measured < model.blocks:
            row["rivals"]["torch backend"]["extrapolated_from_blocks"] = measured
    except Exception as failure:  # out of memory, say: our own times stand
        row["rivals"]["torch backend"] = {"seconds": None, "error": str(failure)[-500:]}
    if ours is not None:
        for rival in row["rivals"].values():
            rival["over_ours"] = None if rival["seconds"] is None else rival["seconds"] / ours
        chip = chip_of(session)
        if chip is not None:
            shapes = cost_model.Shapes.of(model.name, [tuple(tensor.shape) for tensor in base.values()])
            job = cost_model.Job(count, dtype, session.target)
            costs = cost_model.merge_costs(shapes, job, TRUNCATED.rank, group_bytes=DEVICE_GROUP_BYTES)
            row["floor_seconds"] = cost_model.floor_seconds(costs, chip)
            row["over_floor"] = ours / row["floor_seconds"]
        if (model, count, dtype) == jobs(session)[0] and session.left() > 30:
            row["from_host"] = from_host(session, base, experts)
    return row


def _lines(rows: list[dict[str, Any]]) -> Iterator[list[Any]]:
    for row in rows:
        rivals = row.get("rivals", {})
        ours = row.get("seconds")
        errors = row.get("truncation_over_optimum", {}).values()
        yield [
            row["job"],
            max(errors, default=math.nan),
            None if ours is None else ours * 1e3,
            row.get("over_floor"),
            *[rivals.get(name, {}).get("over_ours") for name in ("full_svd", "svd_lowrank", "torch backend")],
        ]


def run(session: Session, record: Record) -> bool:
    passed, left_out = True, []
    blocks_of: dict[str, dict[str, dict[str, Any]]] = {}
    for model, count, dtype in jobs(session):
        what = f"{model.name} N={count} {str(dtype).removeprefix('torch.')}"
        if session.left() < 12:
            left_out.append(what)
            continue
        try:
            row = one_job(session, model, count, dtype, blocks_of)
        except Exception as failure:  # the other jobs are wanted all the same
            row = {"passed": False, "error": "".join(traceback.format_exception(failure)).strip()[-1500:]}
            print(f"FAILED: {what}: {row['error']}", flush=True)
        passed = passed and row["passed"]
        record.add(job=what, **row)
        gc.collect()
        if not session.rehearsal:
            torch.cuda.empty_cache()
    head = ["merge", "error/optimum", "ms", "x floor", "full SVD / ours", "svd_lowrank / ours", "torch backend / ours"]
    table(head, list(_lines(record.content["rows"])))
    if left_out:
        record.content["left_out"] = left_out
    return record.close(passed, finished=not left_out)
