"""How fast is the default merge on a GPU, beside full SVDs, ``svd_lowrank``, our torch backend? Right results first.

    python -m bench.gpu --only merges

State dicts with the matrices of ViT-B/16 and ViT-L/14 lie on the GPU; a time is that of ``merge`` from call to result.
The SVDs are favoured: theirs is the time of the truncations alone, of residuals that are formed already, measured on
one block of one expert and scaled (``extrapolated_from_blocks``); that grows with blocks and experts exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench import cost_model, rivals
from bench.cases import StateDict, block_shapes, checkpoints, first_blocks
from bench.gpu import checks
from bench.gpu.record import Record, Session, predicting_chip, table
from r2m_kernels import MergeConfig, _triton, analyze, merge
from r2m_kernels._stream.budget import DEVICE_GROUP_BYTES
from r2m_kernels._stream.plan import truncation_rank
from r2m_kernels.truncation import truncate_residuals

DEFAULT = MergeConfig.r2m()  # of these models no matrix is a head
SVDS = {"full_svd": (rivals.full_svd, 1), "svd_lowrank": (rivals.svd_lowrank, 5)}  # and how often it is timed
# Of the time left, what a rival may take to be measured whole instead of on one block.
SHARE_OF_TIME = 0.1


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A model whose blocks are alike."""

    name: str
    blocks: int
    shapes: Mapping[str, tuple[int, int]]  # of one block's matrices


B16, L14 = Transformer("ViT-B/16", 12, block_shapes(768)), Transformer("ViT-L/14", 24, block_shapes(1024))
# Sides beyond 64: up to that they are truncated exactly, by other code.
TINY = Transformer("tiny", 1, {"attention.q": (72, 72), "mlp.up": (80, 72), "mlp.down": (72, 80)})


def jobs(session: Session) -> list[tuple[Transformer, int, torch.dtype]]:
    """Most telling first."""
    if session.rehearsal:
        return [(TINY, 2, torch.float32)]
    single, half = torch.float32, torch.bfloat16
    first = [(L14, 3, single), (B16, 3, single), (L14, 3, half), (L14, 8, single), (L14, 8, half)]
    return [*first, (B16, 8, single), (B16, 3, half), (B16, 8, half)]


def same_bits(first: StateDict, second: StateDict) -> bool:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(*(one[name].view(integers[one[name].element_size()]) for one in (first, second))) for name in first
    )


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


def _one_of_each(shapes: list[tuple[int, int]], base: StateDict) -> dict[tuple[int, int], str]:
    """Shape → the first tensor that has it."""
    return {shape: next(name for name, tensor in base.items() if tensor.shape == shape) for shape in shapes}


def checked(session: Session, model: Transformer, base: StateDict, experts: list[StateDict]) -> dict[str, Any]:
    """Two runs to the bit; truncation errors of the first block's shapes against the optimum; peak memory."""
    if not session.rehearsal:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.monotonic()
    first = merge(base, experts, DEFAULT, backend="triton")
    session.synchronize()
    row: dict[str, Any] = {}
    if not session.rehearsal:
        row["first_run_seconds"] = round(time.monotonic() - start, 2)  # it compiles
        row["peak_bytes_beside_inputs"] = torch.cuda.max_memory_allocated() - before
    row["bit_identical"] = same_bits(first, merge(base, experts, DEFAULT, backend="triton"))
    row["finite"] = all(bool(torch.isfinite(tensor).all()) for tensor in first.values())
    mixing = analyze(base, experts, backend="triton", eta=0).real_subspace.mixing
    excess: dict[str, float] = {}
    for shape, name in _one_of_each(list(model.shapes.values()), base).items():
        thetas = [expert[name] for expert in experts]
        rank = truncation_rank(DEFAULT.rank, shape)
        group = ([name], [base[name]], [[theta] for theta in thetas])
        (factors,) = truncate_residuals(*group, mixing, rank, DEFAULT, _triton)
        x = checks.residuals(base[name], thetas, mixing)
        excess["x".join(map(str, shape))] = checks.truncation_excess(factors.left, factors.right, x)
    row["truncation_over_optimum"] = excess
    row["passed"] = row["bit_identical"] and row["finite"] and max(excess.values()) <= checks.TRUNCATION
    return row


def svd_block(session: Session, model: Transformer, base: StateDict, expert: StateDict) -> dict[str, dict[str, Any]]:
    """Seconds of one expert's truncations in one block by rivals, and their errors."""
    rows: dict[str, dict[str, Any]] = {name: {"seconds": 0.0, "truncation_over_optimum": 0.0} for name in SVDS}
    shapes = list(model.shapes.values())
    for shape, name in _one_of_each(shapes, base).items():
        x, rank = expert[name].float() - base[name].float(), truncation_rank(DEFAULT.rank, shape)
        for method, (truncate, repeats) in SVDS.items():
            left, right = truncate(x, rank)  # also what loads the library
            excess = checks.truncation_excess(left.unsqueeze(0), right.unsqueeze(0), x.double().unsqueeze(0))
            row = rows[method]
            row["truncation_over_optimum"] = max(row["truncation_over_optimum"], excess)
            once = seconds(session, functools.partial(truncate, x, rank), repeats, warmups=0)
            row["seconds"] = None if once is None else row["seconds"] + shapes.count(shape) * once
    return rows


def torch_backend(session: Session, model: Transformer, base: StateDict, experts: list[StateDict]) -> dict[str, Any]:
    """Seconds of ``backend="torch"`` for the whole model, measured on one block where all of them take too long."""
    part = first_blocks(base, 1), [first_blocks(expert, 1) for expert in experts]
    one = seconds(session, lambda: merge(*part, DEFAULT, backend="torch"), repeats=1)
    if one is None or one * model.blocks > SHARE_OF_TIME * session.left():
        return {"seconds": None if one is None else one * model.blocks, "extrapolated_from_blocks": 1}
    whole = seconds(session, lambda: merge(base, experts, DEFAULT, backend="torch"), repeats=1, warmups=0)
    return {"seconds": whole}


def beside_rivals(
    session: Session,
    model: Transformer,
    states: tuple[StateDict, list[StateDict]],
    blocks: dict[str, dict[str, dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """What others take for the same merge; ``blocks`` keeps each model's SVDs. A rival that fails is told with why."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        if model.name not in blocks:
            blocks[model.name] = svd_block(session, model, states[0], states[1][0])
        for method, block in blocks[model.name].items():
            whole = None if block["seconds"] is None else block["seconds"] * model.blocks * len(states[1])
            scaled = {"extrapolated_from_blocks": 1, "extrapolated_from_experts": 1}
            rows[method] = {**block, "seconds": whole, **scaled}
    except Exception as failure:  # a library's SVD that does not converge, say: our own times stand
        rows |= {method: {"seconds": None, "error": str(failure)[-500:]} for method in SVDS}
    try:
        rows["torch backend"] = torch_backend(session, model, *states)
    except Exception as failure:  # out of memory, say
        rows["torch backend"] = {"seconds": None, "error": str(failure)[-500:]}
    return rows


def one_job(
    session: Session,
    model: Transformer,
    count: int,
    dtype: torch.dtype,
    blocks: dict[str, dict[str, dict[str, Any]]],
) -> dict[str, Any]:
    source = checks.generator(session.device, seed=0)
    base, experts = checkpoints(model.blocks, count, source, model.shapes, dtype)
    row = checked(session, model, base, experts)
    row["input_bytes"] = sum(tensor.nbytes for state in (base, *experts) for tensor in state.values())
    if not row["passed"]:
        return row  # no time for a wrong result
    ours = row["seconds"] = seconds(session, lambda: merge(base, experts, DEFAULT, backend="triton"), repeats=5)
    chip = predicting_chip(session)
    if chip is not None:
        shapes = cost_model.Shapes.of(model.name, [tuple(tensor.shape) for tensor in base.values()])
        job = cost_model.Job(count, dtype, session.target)
        costs = cost_model.merge_costs(shapes, job, DEFAULT.rank, group_bytes=DEVICE_GROUP_BYTES)
        row["floor_seconds"] = cost_model.floor_seconds(costs, chip)
        row["predicted_seconds"] = sum(cost.predicted_seconds(chip) for cost in costs if not cost.link_bytes)
    row["rivals"] = beside_rivals(session, model, (base, experts), blocks)
    if ours is not None:
        for rival in row["rivals"].values():
            rival["over_ours"] = None if rival["seconds"] is None else rival["seconds"] / ours
        if chip is not None:
            row["over_floor"] = ours / row["floor_seconds"]
    return row


def run(session: Session, record: Record) -> bool:
    blocks: dict[str, dict[str, dict[str, Any]]] = {}
    record.content["rank"] = DEFAULT.rank
    for model, count, dtype in jobs(session):
        what = f"{model.name} N={count} {str(dtype).removeprefix('torch.')}"
        if record.time_for(what, 12):
            record.attempt(functools.partial(one_job, session, model, count, dtype, blocks), job=what)
            gc.collect()
            session.free_cache()
    head = ["merge", "error/optimum", "ms", "x floor", "full SVD / ours", "svd_lowrank / ours", "torch backend / ours"]
    lines = []
    for row in record.rows:
        errors, ours, others = row.get("truncation_over_optimum", {}), row.get("seconds"), row.get("rivals", {})
        over = [others.get(name, {}).get("over_ours") for name in (*SVDS, "torch backend")]
        worst = max(errors.values(), default=math.nan)
        lines.append([row["job"], worst, None if ours is None else ours * 1e3, row.get("over_floor"), *over])
    table(head, lines)
    return record.close()
