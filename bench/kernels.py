"""Operators over sizes beside PyTorch and compiled PyTorch, by the tools that people know: GB/s and share of the roof.

    python -m bench.kernels [--quick] [--page]

On a CPU ``torch.utils.benchmark`` measures: ``bench/results/kernels_cpu.json``, ``.csv``, ``.svg`` and, with
``--page``, docs/kernels.md from them. On a GPU ``triton.testing.perf_report`` does, and writes a CSV and a picture of
each operator (it needs pandas and matplotlib). A number stands only where the result was right in the same run.

The roof is the longer of two times: reading every input and writing the result once at the speed of a copy, and the
multiplications and additions at the speed of a square product in float32, both measured in the same run. What fits the
cache is read faster than the copy, so small sizes may pass it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import benchmark

from bench.calls import section
from bench.machine import RESULTS, ROOT, machine, write_json, write_text
from bench.markdown import table
from r2m_kernels import ops

EXPERTS, RANK = 3, 16
SIZES, QUICK = (256, 512, 1024, 2048), (64,)
# Relative to the largest element: both sides compute in float32, and sum up to 2²² terms.
CLOSE = 1e-4
SECONDS = 0.2  # of repeats, each
PROVIDERS = ("r2m", "torch", "torch.compile")
COMMAND = "python -m bench.kernels --page"


class Inputs(NamedTuple):
    """What operators take of one size: matrices of so many rows and columns."""

    base: Tensor
    experts: list[Tensor]
    numbers: Tensor  # (N,), summing to 1
    mixing: Tensor  # (N, N)
    left: Tensor  # (N, m, r)
    right: Tensor  # (N, r, n)
    y: Tensor  # (m, r)

    @classmethod
    def of(cls, size: int, device: str) -> Inputs:
        """Square ones in float32, the same numbers on every device."""
        source = torch.Generator().manual_seed(size)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source).to(device)

        base = random(size, size)
        experts = [base + 0.1 * random(size, size) for _ in range(EXPERTS)]
        numbers = torch.full((EXPERTS,), 1 / EXPERTS, device=device)
        mixing = torch.eye(EXPERTS, device=device) - 1 / EXPERTS
        factors = random(EXPERTS, size, RANK), random(EXPERTS, RANK, size)
        return cls(base, experts, numbers, mixing, *factors, random(size, RANK))


class Operator(NamedTuple):
    """An operator and the same in plain PyTorch.

    Attributes:
        name: in the tables.
        ours: of inputs.
        plain: of the same, as one would write it.
        matrices: of the inputs' size that are read or written at least.
        products: multiplications and additions for each of their elements.
        compare: what of a result must agree; a basis is known by the space that it spans.
    """

    name: str
    ours: Callable[[Inputs], Tensor]
    plain: Callable[[Inputs], Tensor]
    matrices: float
    products: int = 0
    compare: Callable[[Tensor, Inputs], Tensor] = lambda result, _: result


def _changes(x: Inputs) -> Tensor:
    return torch.stack([expert - x.base for expert in x.experts])


def _gram(x: Inputs) -> Tensor:
    flat = _changes(x).flatten(1)
    return flat @ flat.T


def _sum(x: Inputs) -> Tensor:
    return x.base + torch.tensordot(x.numbers, _changes(x), 1)


def _low_rank(x: Inputs) -> Tensor:
    return _sum(x) + ((x.numbers.view(-1, 1, 1) * x.left) @ x.right).sum(0)


def _rows(x: Inputs) -> Tensor:
    residuals = torch.tensordot(x.mixing.T, _changes(x), 1)
    lengths = x.numbers.view(-1, 1) * residuals.norm(dim=2) ** 3
    return _sum(x) + (residuals * (lengths / lengths.sum(0)).unsqueeze(2)).sum(0)


def _columns(x: Inputs) -> Tensor:
    change = x.experts[0] - x.base
    wanted = torch.tensordot(x.numbers, _changes(x).norm(dim=1), 1)
    return x.base + change * (wanted / change.norm(dim=0)).clamp_max(4.0)


def _products(x: Inputs) -> Tensor:
    return torch.tensordot(x.mixing.T, _changes(x), 1) @ x.right.mT


OPERATORS = (
    Operator("task_gram", lambda x: ops.task_gram([x.base], [[one] for one in x.experts])[0], _gram, EXPERTS + 1),
    Operator("combine", lambda x: ops.combine(x.base, x.experts, x.numbers), _sum, EXPERTS + 2),
    Operator(
        f"combine, rank {RANK}",
        lambda x: ops.combine(x.base, x.experts, x.numbers, x.left, x.right, x.numbers),
        _low_rank,
        EXPERTS + 2,
        2 * EXPERTS * RANK,
    ),
    Operator(
        "combine_rows",
        lambda x: ops.combine_rows(x.base, x.experts, x.numbers, x.mixing, x.numbers, x.numbers.sign(), 1.0, 3.0),
        _rows,
        EXPERTS + 2,
    ),
    Operator(
        "match_columns",
        lambda x: ops.match_columns(x.base, x.experts, x.experts[0], x.numbers),
        _columns,
        EXPERTS + 2,
    ),
    Operator(
        "residual_matmul",
        lambda x: ops.residual_matmul(x.base, x.experts, x.mixing, x.right.mT),
        _products,
        EXPERTS + 1,
        2 * EXPERTS * RANK,
    ),
    Operator(
        "orthonormalize",
        lambda x: ops.orthonormalize(x.y),
        lambda x: torch.linalg.qr(x.y).Q,
        0.0,  # tall: its bytes are those of two (m, r)
        compare=lambda q, x: q @ (q.T @ x.y) - x.y + q.T.new_ones(()),
    ),
)


def floor(operator: Operator, x: Inputs, bandwidth: float, rate: float) -> tuple[float, float]:
    """Bytes that must move, and the seconds under which nobody can be."""
    moved = operator.matrices * x.base.nbytes + (2 * x.y.nbytes if operator.matrices == 0 else 0)
    work = operator.products * x.base.numel() or (4 * x.y.numel() * RANK if operator.matrices == 0 else 0)
    return moved, max(moved / bandwidth, work / rate)


def calls(operator: Operator) -> dict[str, Callable[[Inputs], Tensor]]:
    """By provider; compiled once for all sizes."""
    compiled = torch.compile(operator.plain, fullgraph=True, dynamic=True)
    return dict(zip(PROVIDERS, (operator.ours, operator.plain, compiled), strict=True))


def wrong(operator: Operator, call: Callable[[Inputs], Tensor], x: Inputs) -> str:
    """What is wrong with a result, beside float64; empty where nothing is."""
    found = operator.compare(call(x), x).double()
    exact = operator.compare(operator.plain(_double(x)), _double(x)).double()
    error = float((found - exact.to(found.device)).abs().max() / exact.abs().max())
    return "" if error <= CLOSE else f"{operator.name}: off by {error:.1e} of the largest element"


def _double(x: Inputs) -> Inputs:
    return Inputs(*([e.double() for e in one] if isinstance(one, list) else one.double() for one in x))


def seconds(call: Callable[[], object]) -> float:
    """The median, by ``torch.utils.benchmark``, on as many threads as torch has."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=SECONDS).median)


def roofs() -> tuple[float, float]:
    """Bytes a second of a copy beyond the cache, read and written; multiplications and additions of a product."""
    source, square = torch.randn(2**24), torch.randn(1024, 1024)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source)), 2 * 1024**3 / seconds(lambda: square @ square)


def on_cpu(sizes: tuple[int, ...]) -> dict[str, Any]:
    """All numbers; ``wrong`` lists results that were, and they have none."""
    bandwidth, rate = roofs()
    content: dict[str, Any] = {"machine": machine(), "bytes_per_second": bandwidth, "flops_per_second": rate}
    content |= {"rows": [], "wrong": []}
    for operator in OPERATORS:
        for provider, call in calls(operator).items():
            for size in sizes:
                x = Inputs.of(size, "cpu")
                if found := wrong(operator, call, x):
                    content["wrong"].append(f"{provider}, {size}: {found}")
                    continue
                taken, (moved, least) = seconds(lambda call=call, x=x: call(x)), floor(operator, x, bandwidth, rate)
                row = {"operator": operator.name, "size": size, "provider": provider, "seconds": taken}
                content["rows"].append(row | {"gb_per_second": moved / taken / 1e9, "share_of_roof": least / taken})
    return content


def csv_of(content: dict[str, Any]) -> str:
    """The rows."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(content["rows"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(content["rows"])
    return file.getvalue()


def draw(content: dict[str, Any], path: Path) -> None:
    """A panel an operator: GB/s over size."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, (len(OPERATORS) + 1) // 2, figsize=(14, 6))
    for axis, operator in zip(axes.flat, OPERATORS, strict=False):
        for provider in PROVIDERS:
            rows = [one for one in content["rows"] if (one["operator"], one["provider"]) == (operator.name, provider)]
            axis.plot([one["size"] for one in rows], [one["gb_per_second"] for one in rows], "o-", label=provider)
        axis.set(title=operator.name, xscale="log", yscale="log", xlabel="rows and columns", ylabel="GB/s")
        axis.axhline(content["bytes_per_second"] / 1e9, color="black", linewidth=0.5)
    axes.flat[0].legend()
    for axis in axes.flat[len(OPERATORS) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def page(content: dict[str, Any], of_calls: dict[str, Any]) -> str:
    """docs/kernels.md, from what this program and :mod:`bench.calls` measured."""
    where, found = content["machine"], {}
    for row in content["rows"]:
        found.setdefault((row["operator"], row["size"]), {})[row["provider"]] = row
    rows = [
        [
            f"`{name}`",
            str(size),
            *(f"{1e3 * of[one]['seconds']:.2f}" if one in of else "wrong" for one in PROVIDERS),
            *(f"{of['r2m'][key]:.{digits}f}" for key, digits in (("gb_per_second", 1), ("share_of_roof", 2))),
        ]
        for (name, size), of in found.items()
    ]
    header = ["operator", "size", *(f"{one}, ms" for one in PROVIDERS), "r2m, GB/s", "r2m, share of the roof"]
    roof = f"{content['bytes_per_second'] / 1e9:.1f} GB/s and {content['flops_per_second'] / 1e9:.0f} GFLOP/s"
    return f"""# Operators over sizes

Written by `{COMMAND}` from `bench/results/kernels_cpu.json`, which `python -m bench.kernels` measures;
also as [CSV](../bench/results/kernels_cpu.csv) and [picture](../bench/results/kernels_cpu.svg). On a GPU the same
program writes tables and pictures of `triton.testing.perf_report`; nothing of that has run on one yet.

{where["cpu"]}, {where["threads"]} thread(s), torch {where["torch"]}, {where["backend"]}; N = {EXPERTS} experts,
float32, matrices of size × size, factors of rank {RANK}. Results are compared with float64 in the same run. A
result that is off by more than {CLOSE:g} of the largest element is wrong and has no time. The roof, of a copy and of a
product in the same run: {roof}. `torch` is the formula as one would write it, `torch.compile` the same compiled;
neither promises the same bits on any number of threads, and both hold all task vectors at once.

{table(header, rows)}

{section(of_calls)}"""


def last() -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured last, here and by :mod:`bench.calls`."""
    content, of_calls = (json.loads((RESULTS / f"kernels_{one}.json").read_text()) for one in ("cpu", "calls"))
    return content, of_calls


def on_gpu(sizes: tuple[int, ...], directory: Path) -> Iterator[str]:
    """Operators one by one by ``triton.testing``; what was wrong."""
    import triton.testing  # where there is a GPU

    for operator in OPERATORS:
        by_provider = calls(operator)
        bad = [found for call in by_provider.values() for size in sizes if (found := wrong(operator, call, _on(size)))]
        yield from bad
        if bad:
            continue
        axes = {"x_names": ["size"], "x_vals": list(sizes), "line_arg": "provider", "ylabel": "GB/s", "args": {}}
        lines = {"line_vals": list(PROVIDERS), "line_names": list(PROVIDERS), "plot_name": operator.name}

        @triton.testing.perf_report(triton.testing.Benchmark(**axes, **lines))  # type: ignore[untyped-decorator]
        def measured(
            size: int,
            provider: str,
            operator: Operator = operator,
            by_provider: dict[str, Callable[[Inputs], Tensor]] = by_provider,
        ) -> tuple[float, ...]:
            x = _on(size)
            taken = triton.testing.do_bench(lambda: by_provider[provider](x), quantiles=[0.5, 0.2, 0.8])
            moved, _ = floor(operator, x, 1.0, 1.0)
            return tuple(moved / one / 1e6 for one in (taken[0], taken[2], taken[1]))

        measured.run(print_data=True, save_path=str(directory))


def _on(size: int) -> Inputs:
    return Inputs.of(size, "cuda")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--page", action="store_true", help="only docs/kernels.md, from the last measurement")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of what is written")
    given = parser.parse_args()
    if given.page:
        write_text(ROOT / "docs" / "kernels.md", page(*last()))
        return 0
    sizes = QUICK if given.quick else SIZES
    if torch.cuda.is_available():
        given.out.mkdir(parents=True, exist_ok=True)
        bad = list(on_gpu(sizes, given.out))
    else:
        content = on_cpu(sizes)
        bad = [one for one in content["wrong"] if one.startswith("r2m")]  # others' are in the table
        write_json(given.out / "kernels_cpu.json", content)
        if content["rows"]:
            write_text(given.out / "kernels_cpu.csv", csv_of(content))
            draw(content, given.out / "kernels_cpu.svg")
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
