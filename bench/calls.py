"""What calling an operator costs: through ``torch.ops``, beyond the backend's functions, on tensors too small to count.

    python -m bench.calls [--quick]

Both are called in turns, and the difference is the median over pairs of blocks: ``bench/results/kernels_calls.json``.
Direct is what a merge does: the backend's functions on groups that lie ready, into a new tensor where the operator
makes one. All else is the price: the dispatcher, autograd, checks, the choice of a backend, one thread a product. Of
the dispatcher alone tells an operator that takes what ``combine.out`` takes and does nothing.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.machine import RESULTS, machine, write_json
from bench.markdown import table
from r2m_kernels import _backends, _operators

SIZE, EXPERTS, RANK = 8, 3, 2
BLOCKS, QUICK = 400, 2
CALLS = 20  # of a block
BOUND = 15e-6  # seconds
BACKENDS = ("native", "torch")
KEYS = ("direct", "beyond")
NOTHING = "one that does nothing"
Pair = tuple[Callable[[], object], Callable[[], object]]


@functools.cache
def nothing() -> Callable[..., object]:
    """An operator that takes what ``combine.out`` takes, and does nothing where ours begin."""
    library = torch.library.Library("r2m_bench", "FRAGMENT")
    taken = next(one for one in _operators.OPERATORS if one.name == "combine.out")
    library.define(f"nothing{taken.schema}")
    library.impl("nothing", lambda *_: None, "Autograd")
    _kept.append(library)  # what is registered ends with it
    call: Callable[..., object] = torch.ops.r2m_bench.nothing.default
    return call


_kept: list[torch.library.Library] = []


def pairs(backend: str) -> dict[str, Pair]:
    """Of every operator: the backend's functions, and the call through ``torch.ops``."""
    source = torch.Generator().manual_seed(0)
    base, *experts = torch.randn(EXPERTS + 1, SIZE, SIZE, generator=source).unbind()
    numbers = torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64)
    mixing, ones = torch.eye(EXPERTS, dtype=torch.float64) - 1 / EXPERTS, torch.ones_like(numbers)
    left, right = torch.randn(EXPERTS, SIZE, RANK), torch.randn(EXPERTS, RANK, SIZE)
    rhs, y, out = right.mT.contiguous(), torch.randn(SIZE, RANK), torch.empty_like(base)
    bases, group, ours = [base], [[one] for one in experts], _backends.choose(backend, base.device).operators
    lefts, rights, several = left[None], right[None], rhs[None]

    def by_rows(target: torch.Tensor) -> None:
        rows = ours.row_grams(bases, group).rows
        chosen = ours.row_coefficients(rows, numbers, mixing, numbers, ones, 1.0, 3.0, torch.float32)
        ours.combine(bases, group, chosen, None, None, None, [target])

    def made() -> torch.Tensor:
        return torch.empty_like(base)

    call, several_numbers = _operators.CALLS, (numbers, mixing, numbers, ones, 1.0, 3.0)
    return {
        NOTHING: (
            lambda: ours.combine(bases, group, numbers, None, None, None, [out]),
            lambda: (
                nothing()(base, experts, numbers, out, None, None, None, backend),
                ours.combine(bases, group, numbers, None, None, None, [out]),
            ),
        ),
        "task_gram": (lambda: ours.task_gram(bases, group), lambda: call["task_gram"](bases, experts, backend)),
        "residual_matmul": (
            lambda: ours.residual_matmul(bases, group, mixing, several, False, "ieee"),
            lambda: call["residual_matmul"](base, experts, mixing, rhs, False, "ieee", backend),
        ),
        "orthonormalize": (lambda: ours.orthonormalize(y), lambda: call["orthonormalize"](y, backend)),
        "combine": (
            lambda: ours.combine(bases, group, numbers, None, None, None, [made()]),
            lambda: call["combine"](base, experts, numbers, None, None, None, backend),
        ),
        "combine.out": (
            lambda: ours.combine(bases, group, numbers, None, None, None, [out]),
            lambda: call["combine.out"](base, experts, numbers, out, None, None, None, backend),
        ),
        "combine, low rank": (
            lambda: ours.combine(bases, group, numbers, lefts, rights, numbers, [made()]),
            lambda: call["combine"](base, experts, numbers, left, right, numbers, backend),
        ),
        "combine_rows": (
            lambda: by_rows(made()),
            lambda: call["combine_rows"](base, experts, *several_numbers, backend),
        ),
        "combine_rows.out": (
            lambda: by_rows(out),
            lambda: call["combine_rows.out"](base, experts, *several_numbers, out, backend),
        ),
        "match_columns": (
            lambda: ours.match_columns(bases, group, [experts[0].clone()], numbers, [made()]),
            lambda: call["match_columns"](base, experts, experts[0], numbers, backend),
        ),
        "match_columns.out": (
            lambda: ours.match_columns(bases, group, [experts[0].clone()], numbers, [out]),
            lambda: call["match_columns.out"](base, experts, experts[0], numbers, out, backend),
        ),
    }


def seconds(call: Callable[[], object]) -> float:
    """Of one call, the mean of a block."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def measured(blocks: int) -> list[dict[str, Any]]:
    """A row an operator and backend: seconds of both, and the median of what one costs beyond the other."""
    rows = []
    for backend in BACKENDS:
        for operator, (direct, through) in pairs(backend).items():
            seconds(direct), seconds(through)  # once before
            found = [(seconds(direct), seconds(through)) for _ in range(blocks)]
            beyond = statistics.median(more - less for less, more in found)
            medians = dict(zip(("direct", "through"), map(statistics.median, zip(*found, strict=True)), strict=True))
            rows.append({"operator": operator, "backend": backend, **medians, "beyond": beyond})
    return rows


def section(content: dict[str, Any]) -> str:
    """Of docs/kernels.md."""
    where, found = content["machine"], dict[str, dict[str, Any]]()
    for row in content["rows"]:
        found.setdefault(row["operator"], {})[row["backend"]] = row
    rows = [
        [f"`{name}`" if name != NOTHING else name, *(f"{1e6 * of[one][key]:.0f}" for one in BACKENDS for key in KEYS)]
        for name, of in found.items()
    ]
    header = ["operator", *(f"{one}, {key}, µs" for one in BACKENDS for key in KEYS)]
    return f"""## What a call costs

Measured by `python -m bench.calls` (`bench/results/kernels_calls.json`; {where["cpu"]}, {where["threads"]} thread,
torch {where["torch"]}), on matrices of {SIZE} × {SIZE}: a backend's functions called directly, and what `torch.ops.r2m`
takes beyond them. The aim is {1e6 * content["bound"]:.0f} µs. An operator that takes what `combine.out` takes and does
nothing stands first: that is PyTorch's dispatcher, with nothing of ours.

{table(header, rows)}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two blocks each, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(QUICK if options.quick else BLOCKS)
    for row in rows:
        print(f"{row['backend']:8}{row['operator']:20}{1e6 * row['direct']:8.1f} + {1e6 * row['beyond']:5.1f} us")
    if not options.quick:
        write_json(RESULTS / "kernels_calls.json", {"machine": machine(), "bound": BOUND, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
