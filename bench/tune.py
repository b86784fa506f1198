"""Which tile sizes are fastest on this GPU? Proposes a new ``r2m_kernels/_triton/launch.json``.

    python -m bench.tune [--seconds 500] [--out DIR] [--write]

For every operator and variant that this GPU uses, one field of the current configuration is changed at a time, to its
neighbours, or rows and columns of a tile for each other; what does not compile, spills, or gives a wrong result is left
out, and a change stays if the median of the kernel's times on a group of ViT-L/14's matrices falls by more than 3 %.
The proposal, ``launch.proposed.json``, goes to ``--out`` and is written again after every gain; ``--write`` puts it in
place of the table in the sources too. When the time is up it stops with what it has. Run ``python -m
bench.compile_check`` and the tests on what you take over.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import cost_model
from bench.cost_model import Job
from bench.gpu import default_operators
from bench.gpu.groups import RANK, GroupOf, Timed
from bench.gpu.operators import operators
from bench.gpu.record import Record, Session, Stopwatch, caught_launches, table
from bench.machine import RESULTS, ROOT, write_text
from r2m_kernels._triton import launch

TABLE = ROOT / "r2m_kernels" / "_triton" / "launch.json"
GAIN = 0.97
# Smallest and largest value of a field; all but stages and experts are powers of two.
LIMITS = {
    "rows": (16, 256),
    "inner": (16, 128),
    "columns": (16, 256),
    "warps": (2, 8),
    "steps": (1, 32),
    "block": (32, 4096),
    "pieces": (1, 8),
}
SMALL = {"stages": (1, 4), "experts": (1, 4)}
# Registers that a program's sums may take, of 65,536: the rest is for operands and addresses.
ACCUMULATORS = 4 * 64 * 128
# Operators of which one side of a tile is a multiple of the other.
WHOLE = {"residual_gram": ("columns", "rows"), "units_factor": ("rows", "columns")}


@dataclasses.dataclass(frozen=True)
class Knob:
    """An entry of the launch table, and the cases of ``bench.gpu.operators`` whose time it decides.

    Or, ``default``, of ``bench.gpu.default_operators``, at the default's rank.
    """

    operator: str
    variant: str
    job: Job
    timed: tuple[str, ...]
    default: bool = False

    @property
    def rank(self) -> float:
        return cost_model.RANK if self.default else RANK

    def cases(self, group: GroupOf) -> list[Timed]:
        listed = default_operators.operators if self.default else operators
        return [case for case in listed(group) if case.operator in self.timed]


def knobs(target: str) -> list[Knob]:
    """What costs most comes first."""
    full = launch.full_precision(target)
    single, half, many = Job(3, torch.float32, target), Job(3, torch.bfloat16, target), Job(8, torch.float32, target)
    products, of_grams = ("product", "shifted product"), ("sketch of a Gram", "paired product")
    return [
        Knob("residual_product", "fp16", single, of_grams, default=True),
        Knob("residual_gram", "fp16", single, ("Gram of residuals",), default=True),
        Knob("residual_product", "fp16/wide", single, ("final product, float16 vectors",), default=True),
        Knob("units_product", "fp16", single, ("quick pass",), default=True),
        Knob("units_factor", full, single, ("quick pass",), default=True),
        Knob("units_gram", "fp16", single, ("quick pass",), default=True),
        Knob("combine_rounded", "bf16", single, ("combine, default rank, bfloat16 factors",)),
        Knob("residual_product", "fp16", single, products),
        Knob("combine_matrix", full, single, ("combine",)),
        Knob("form_residuals", "aligned", single, ("form residuals",)),
        Knob("task_gram", "32-bit", single, ("task_gram",)),
        Knob("vectors_gram", "float64", single, ("orthonormalize",)),
        Knob("triangular_product", full, single, ("orthonormalize",)),
        Knob("residual_matmul", full, single, ("full product",)),
        Knob("task_gram", "16-bit", half, ("task_gram",)),
        Knob("residual_matmul", full + "/many", many, ("full product",)),
    ]


def neighbours(knob: Knob, tiles: dict[str, int]) -> Iterator[dict[str, int]]:
    """Configurations that differ in one field (rows and columns are one in Gram matrices of vectors); the tile turned.

    Some kernels want tiles of whole blocks on one side: see there.
    """
    if tiles.get("rows") != tiles.get("columns") and knob.operator not in WHOLE:
        yield {**tiles, "rows": tiles["columns"], "columns": tiles["rows"]}
    for field, value in tiles.items():
        if field in SMALL:
            low, high = SMALL[field]
            values = [value + step for step in (-1, 1) if low <= value + step <= high]
        else:
            low, high = LIMITS[field]
            values = [one for one in (value // 2, value * 2) if low <= one <= high]
        for one in values:
            changed = {**tiles, field: one}
            if knob.operator in ("vectors_gram", "units_gram") and field in ("rows", "columns"):
                changed |= {"rows": one, "columns": one}
            larger, smaller = WHOLE.get(knob.operator, ("", ""))
            if larger and changed[larger] % changed[smaller]:
                continue
            sums = changed.get("rows", 1) * changed.get("columns", 1) * changed.get("experts", 1)
            if sums <= ACCUMULATORS and changed != tiles:
                yield changed


def judged(knob: Knob, chosen: list[Timed], stopwatch: Stopwatch, session: Session) -> tuple[float | None, str | None]:
    """Milliseconds of the operator's kernels over its cases, or why this configuration is out of the question."""
    total = 0.0
    for case in chosen:
        try:
            with caught_launches() as caught:
                worst = case.judge(case.call())
            session.synchronize()
        except Exception as failure:  # the compiler may refuse in any way
            if not session.rehearsal:
                torch.cuda.synchronize()  # raises if the GPU is lost, and ends the tuner
            return None, f"{type(failure).__name__}: {str(failure).strip()[:200]}"
        if worst > 1:
            return None, f"error is {worst:.3g} x its bound"
        tuned = [one for one in caught if one.kernel.__name__ == f"{knob.operator}_kernel"]
        if any(one.spills for one in tuned):
            return None, "spills"
        total += stopwatch.median(lambda tuned=tuned: [one.again() for one in tuned], repeats=9, warmups=1) or 0.0
    return (None if session.rehearsal else total), None


def tuned(knob: Knob, stopwatch: Stopwatch, session: Session, group: GroupOf) -> Iterator[dict[str, Any]]:
    """A row a configuration, the current one first; the launch table is left with the fastest."""
    variants = launch.table()[knob.operator][session.target]
    chosen = knob.cases(group)
    best = dict(variants[knob.variant])
    fastest, problem = judged(knob, chosen, stopwatch, session)
    yield {"tiles": best, "milliseconds": fastest, "problem": problem, "kept": problem is None}
    tried, improved = [best], True
    while improved and session.left() > 3:
        improved = False
        for candidate in neighbours(knob, best):
            if candidate in tried or session.left() < 3:
                continue
            tried.append(candidate)
            variants[knob.variant] = candidate
            try:
                milliseconds, problem = judged(knob, chosen, stopwatch, session)
            finally:
                variants[knob.variant] = best
            better = milliseconds is not None and (fastest is None or milliseconds < GAIN * fastest)
            if better:
                best, fastest, improved = candidate, milliseconds, True
                variants[knob.variant] = best
            yield {"tiles": candidate, "milliseconds": milliseconds, "problem": problem, "kept": better}
            if better:
                break  # its neighbours next
            if session.rehearsal and len(tried) > 1:
                return


def run(session: Session, record: Record) -> bool:
    stopwatch, proposal = Stopwatch(session), copy.deepcopy(launch.table())
    path = session.out / "launch.proposed.json"
    if not session.rehearsal:
        write_table(path, proposal)
    shape, size = ((72, 80), 1) if session.rehearsal else ((4096, 1024), 24)
    passed, gains = True, []
    everything = knobs(session.target)
    left = [f"{knob.operator} {knob.variant}" for knob in everything]
    for knob in everything[:2] if session.rehearsal else everything:
        if session.left() < 8:
            break
        left.pop(0)
        group = GroupOf.made(session, shape, knob.job, size, knob.rank)
        first: float | None = None
        fastest: float | None = None
        for index, row in enumerate(tuned(knob, stopwatch, session, group)):
            record.add(operator=knob.operator, variant=knob.variant, experts=knob.job.experts, **row)
            if index == 0:
                # Only the configuration that is in use must work; a candidate may fail in any way.
                first, passed = row["milliseconds"], passed and row["problem"] is None
            if row["kept"]:
                fastest = row["milliseconds"]
                proposal[knob.operator][session.target][knob.variant] = row["tiles"]
                if not session.rehearsal:
                    write_table(path, proposal)
        gain = None if first is None or fastest is None else first / fastest
        tiles = proposal[knob.operator][session.target][knob.variant]
        gains.append(
            [knob.operator, knob.variant, first, fastest, gain, " ".join(f"{k}={v}" for k, v in tiles.items())]
        )
        del group
        session.free_cache()
    record.content["untouched"] = left
    table(["operator", "variant", "ms now", "ms best", "gain", "tiles"], gains)
    return record.close(passed)  # it ends when its time does: what is untouched keeps its tiles


def write_table(path: Path, content: dict[str, Any]) -> None:
    """In the table's own layout, a line a variant, so that a diff shows what changed."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"{\s*([^{}]*?)\s*}", lambda tiles: "{" + " ".join(tiles[1].split()) + "}", text)
    write_text(path, text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--out", type=Path, help="default: $OUT, or bench/results")
    parser.add_argument("--write", action="store_true", help="put the proposal in place of the table in the sources")
    options = parser.parse_args()
    if launch.INTERPRETED or not torch.cuda.is_available():
        print("bench.tune: tile sizes are measured on a GPU, and torch can use none here", file=sys.stderr)
        return 3
    out = (options.out or Path(os.environ.get("OUT") or RESULTS)).resolve()
    session = Session(out, time.monotonic() + options.seconds, rehearsal=False)
    passed = run(session, Record(session, "tuner"))
    if options.write and passed:
        write_table(TABLE, json.loads((out / "launch.proposed.json").read_text(encoding="utf-8")))
        print(f"{TABLE} is rewritten")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
