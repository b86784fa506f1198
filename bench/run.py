"""How fast is a merge on this CPU, at what error, beside what? One run, methods interleaved, correctness first.

    python -m bench.run [--only SECTION] [--repeats 3] [--peers .venv-peers] [--json FILE]

Sections: ``blocks`` two Transformer blocks of ViT-L/14's size in memory, merged with truncated residuals and in the
plain way; ``truncation`` error against time on known spectra; ``operators`` against reading and copying; ``scaling`` in
experts, size and threads; ``files`` whole commands from file to file. A section that finds a wrong result takes no
times, and the exit code is 1. The goals that the project has set itself are listed with the result as ``bars``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from r2m.demo.parallel import torch_threads
from safetensors.torch import load_file
from torch import Tensor

from bench import cases, rivals
from bench.cases import StateDict, optimum
from bench.machine import RESULTS, ROOT, machine, write_json
from r2m_kernels import MergeConfig, merge, ops
from r2m_kernels.streaming import choose_backend
from r2m_kernels.truncation import truncate_residuals

CPU = torch.device("cpu")
ERROR_BAR = 1.02  # of the optimum, the contract of the default settings
# A tenth of every matrix, all rows alike, a relative eta: what ``rivals.plain_merge`` does too.
TRUNCATED = MergeConfig.r2m(
    rank=rivals.SHARE, row_power=0.0, whole_up_to=0, eta_mode="relative", eta=0.6, core_mode="mean", head="merge"
)


@dataclass
class Result:
    """What a section found: numbers to keep, the bars they are held to, and what was wrong."""

    content: dict[str, Any] = field(default_factory=dict)
    bars: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def bar(
        self, name: str, value: float, most: float | None = None, least: float | None = None, goal: float | None = None
    ) -> None:
        """Hold ``value`` to ``most`` or to ``least``."""
        met = value <= most if most is not None else value >= (least if least is not None else -math.inf)
        kind = {"at_most": most} if most is not None else {"at_least": least}
        self.bars.append({"name": name, "value": value, **kind, "goal": goal, "met": met})

    def right(self, what: str, error: float, bound: float) -> bool:
        """Whether ``error`` is within its bound; if not, noted as wrong."""
        if error <= bound:
            return True
        self.wrong.append(f"{what}: {error:.4g}, expected at most {bound:.4g}")
        return False


def interleaved(methods: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, Any]]:
    """Each method once in turn, ``repeats`` times: all wall and CPU seconds, and their medians."""
    rows: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu_seconds": []} for name in methods}
    for _ in range(repeats):
        for name, work in methods.items():
            cpu, start = time.process_time(), time.perf_counter()
            work()
            rows[name]["seconds"].append(time.perf_counter() - start)
            rows[name]["cpu_seconds"].append(time.process_time() - cpu)
    for row in rows.values():
        row["median"] = statistics.median(row["seconds"])
    return rows


def our_truncation(
    residuals: Sequence[Tensor], rank: int, config: MergeConfig, name: str = "x"
) -> list[tuple[Tensor, Tensor]]:
    """Of residuals that are formed already: they are the experts, over a base of zeros."""
    operators = choose_backend("auto", CPU).operators
    identity = torch.eye(len(residuals), dtype=torch.float64)
    group = ([name], [torch.zeros_like(residuals[0])], [[x] for x in residuals])
    (factors,) = truncate_residuals(*group, identity, rank, config, operators)
    return list(zip(factors.left, factors.right, strict=True))


def distance(x: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    """‖X − F‖ in float64."""
    return float((x.double() - factors[0].double() @ factors[1].double()).norm())


def blocks(repeats: int) -> Result:
    """Two blocks in memory, three experts, residuals truncated."""
    result = Result()
    base, experts = cases.checkpoints(2, 3)
    residuals = rivals.residuals_of(base, experts)
    errors = dict.fromkeys(("r2m_kernels", "textbook", "svd_lowrank"), 0.0)
    for name, rows in rivals.residuals_of(cases.first_blocks(base, 1), experts).items():
        rank = rivals.rank_of(base[name])
        best = [optimum(x, rank) for x in rows]
        truncations: dict[str, list[tuple[Tensor, Tensor]]] = {
            "r2m_kernels": our_truncation(list(rows), rank, TRUNCATED, name),
            "textbook": our_truncation(list(rows), rank, TRUNCATED.replace(svd="textbook"), name),
            "svd_lowrank": [rivals.svd_lowrank(x, rank) for x in rows],
        }
        for method, factors in truncations.items():
            over = [distance(x, pair) / least for x, pair, least in zip(rows, factors, best, strict=True)]
            errors[method] = max(errors[method], *over)
    result.content["truncation_over_optimum"] = errors
    plain = rivals.plain_merge(base, experts, rivals.svd_lowrank)
    alike = same_merge(result, merge(base, experts, TRUNCATED), plain, base)
    result.content["weight_average_error"] = furthest(
        merge(base, experts, MergeConfig.weight_average()), rivals.average(experts)
    )
    if not (
        result.right("truncation error over the optimum", errors["r2m_kernels"], ERROR_BAR)
        and alike
        and result.right("weight average", result.content["weight_average_error"], 1e-6)
    ):
        return result
    matrices = [x for rows in residuals.values() for x in rows]
    ranks = [rivals.rank_of(x) for x in matrices]
    timed = interleaved(
        {
            "r2m_kernels, default": lambda: merge(base, experts),
            "r2m_kernels": lambda: merge(base, experts, TRUNCATED),
            "textbook's products alone": lambda: rivals.textbook_products(matrices, ranks),
            'r2m_kernels, svd="textbook"': lambda: merge(base, experts, TRUNCATED.replace(svd="textbook")),
            "torch.svd_lowrank": lambda: rivals.plain_merge(base, experts, rivals.svd_lowrank),
            "r2m_kernels, weight average": lambda: merge(base, experts, MergeConfig.weight_average()),
            'r2m_kernels, backend="torch"': lambda: merge(base, experts, TRUNCATED, backend="torch"),
        },
        max(repeats, 3),
    )
    # Ten times as long as all the others, and as steady: once, beside a run of ours.
    timed |= interleaved({"torch.linalg.svd": lambda: rivals.plain_merge(base, experts, rivals.full_svd)}, 1)
    ours = timed["r2m_kernels"]["median"]
    result.content |= {"parameters": sum(t.numel() for t in base.values()), "experts": 3, "timed": timed}
    result.content["over_ours"] = {name: row["median"] / ours for name, row in timed.items()}
    over = result.content["over_ours"]
    result.bar("full SVD / ours", over["torch.linalg.svd"], least=12, goal=25)
    result.bar("ours / the textbook's products alone", 1 / over["textbook's products alone"], most=1.2, goal=0.8)
    result.bar("svd_lowrank / ours", over["torch.svd_lowrank"], least=4)
    result.bar("our truncation error / svd_lowrank's", errors["r2m_kernels"] / errors["svd_lowrank"], most=1.0)
    result.bar("our truncation error / the textbook's", errors["r2m_kernels"] / errors["textbook"], most=1.0)
    return result


def truncation(repeats: int) -> Result:
    """One matrix of each spectrum on one thread: error against time."""
    result = Result(content={"shape": [cases.WIDTH, cases.WIDTH], "rank": 103, "threads": 1, "spectra": {}})
    rank, highest = 103, 0.0

    def ours(**options: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return lambda x: our_truncation([x], rank, MergeConfig(**options))[0]

    methods: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "r2m_kernels": ours(),
        **{f"r2m_kernels q={q}": ours(power_iterations=q) for q in (4, 6)},
        **{f"textbook q={q}": ours(svd="textbook", power_iterations=q) for q in (0, 1, 2, 4)},
        **{f"svd_lowrank niter={q}": lambda x, q=q: rivals.svd_lowrank(x, rank, q) for q in (0, 1, 2, 4)},
        "full SVD": lambda x: rivals.full_svd(x, rank),
    }
    with torch_threads(1):
        for spectrum in cases.SPECTRA:
            matrices = [cases.matrix(spectrum, cases.WIDTH, cases.WIDTH, seed) for seed in (0, 1)]
            best = [optimum(x, rank) for x in matrices]
            rows: dict[str, dict[str, Any]] = {}
            for name, method in methods.items():
                few = matrices[:1] if name == "full SVD" else matrices
                error = max(distance(x, method(x)) / least for x, least in zip(few, best, strict=False))
                rows[name] = {"over_optimum": error}
            result.content["spectra"][spectrum] = rows
            if spectrum in cases.PROMISED:
                highest = max(highest, rows["r2m_kernels"]["over_optimum"])
            calls = {name: functools.partial(method, matrices[0]) for name, method in methods.items()}
            slow = {"full SVD": calls.pop("full SVD")}
            timed = interleaved(calls, repeats) | interleaved(slow, 1)
            for name, row in timed.items():
                rows[name] |= row
    result.bar("truncation error on five spectra / optimum", highest, most=ERROR_BAR)
    # Gaussian noise lies a hair above the bar whatever is done at this cost; beyond that something is wrong.
    result.right("worst truncation error over the optimum on five spectra", highest, 1.021)
    return result


def operators(repeats: int) -> Result:
    """One pass over task vectors against reading them; a weight average against copying as many bytes."""
    result = Result()
    base, experts = cases.checkpoints(1, 3)
    flat = [torch.cat([t.flatten() for t in state.values()]).view(-1, cases.WIDTH) for state in (base, *experts)]
    theta, thetas = flat[0], flat[1:]
    core = torch.full((3,), 1 / 3, dtype=torch.float64)
    out = torch.empty_like(theta)
    source, target = torch.cat(flat)[: len(theta) * 5 // 2], torch.empty(len(theta) * 5 // 2, cases.WIDTH)
    rows = torch.stack([t - theta for t in thetas]).flatten(1).double()
    exact, gram = rows @ rows.T, ops.task_gram([theta], [[t] for t in thetas])[0]
    if not (
        result.right(
            "task_gram", float(((gram - exact).abs() / (rows.norm(dim=1)[:, None] * rows.norm(dim=1))).max()), 1e-6
        )
        and result.right(
            "combine", float((ops.combine(theta, thetas, core) - torch.stack(thetas).mean(0)).abs().max()), 1e-6
        )
    ):
        return result
    del rows
    timed = interleaved(
        {
            "task_gram": lambda: ops.task_gram([theta], [[t] for t in thetas]),
            "task_gram, torch backend": lambda: ops.task_gram([theta], [[t] for t in thetas], backend="torch"),
            "read: sums": lambda: [t.sum() for t in flat],
            "read: largest": lambda: [t.max() for t in flat],
            "combine, rank 0": lambda: ops.combine(theta, thetas, core, out=out),
            "combine, rank 0, torch backend": lambda: ops.combine(theta, thetas, core, out=out, backend="torch"),
            "copy of as many bytes": lambda: target.copy_(source),
        },
        max(repeats, 11),
    )
    result.content = {"elements": theta.numel(), "experts": 3, "dtype": "float32", "timed": timed}
    median = {name: row["median"] for name, row in timed.items()}
    read = min(median["read: sums"], median["read: largest"])
    result.bar("task_gram / reading its inputs", median["task_gram"] / read, most=2.5)
    result.bar(
        "combine at rank 0 / a copy of as many bytes",
        median["combine, rank 0"] / median["copy of as many bytes"],
        most=2,
    )
    return result


def scaling(repeats: int) -> Result:
    """Time of ``merge`` over experts, blocks and threads, one varied at a time."""
    result = Result()
    lowrank = rivals.svd_lowrank
    base, experts = cases.checkpoints(4, 8)
    parts = {
        count: (cases.first_blocks(base, count), [cases.first_blocks(e, count) for e in experts]) for count in (1, 2, 4)
    }
    one = parts[1]
    jobs: dict[str, Callable[[], object]] = {}
    for count in (2, 4, 8):  # one expert leaves no residual: nothing to truncate
        jobs[f"experts {count} ours"] = lambda n=count: merge(one[0], one[1][:n], TRUNCATED)
        jobs[f"experts {count} svd_lowrank"] = lambda n=count: rivals.plain_merge(one[0], one[1][:n], lowrank)
    for count in (1, 2, 4):
        jobs[f"blocks {count} ours"] = lambda n=count: merge(parts[n][0], parts[n][1][:3], TRUNCATED)
        jobs[f"blocks {count} svd_lowrank"] = lambda n=count: rivals.plain_merge(parts[n][0], parts[n][1][:3], lowrank)
    for count in sorted({1, torch.get_num_threads()}):
        for name, work in (("ours", jobs["blocks 2 ours"]), ("svd_lowrank", jobs["blocks 2 svd_lowrank"])):

            def on(count: int = count, work: Callable[[], object] = work) -> None:
                with torch_threads(count):
                    work()

            jobs[f"threads {count} {name}"] = on
    timed = interleaved(jobs, 1)  # rivals too; ours, whose growth is judged, more often
    for name, row in interleaved(
        {name: work for name, work in jobs.items() if "ours" in name}, max(repeats, 5)
    ).items():
        timed[name] = row
    for name, row in timed.items():
        axis, value, method = name.split()
        result.content.setdefault(axis, {}).setdefault(method, {})[value] = row
    for axis, values in (("experts", (2, 4, 8)), ("blocks", (1, 2, 4))):
        median = [result.content[axis]["ours"][str(value)]["median"] for value in values]
        growth = max(after / before for before, after in itertools.pairwise(median))
        result.bar(f"time at twice the {axis} / time", growth, most=2.1)
    return result


def files(repeats: int, peers: Path) -> Result:
    """Whole commands on four blocks, three experts, each in its own process; outputs compared first."""
    with tempfile.TemporaryDirectory(prefix="r2m-bench-") as temporary:
        command = [sys.executable, "-m", "bench.files", temporary, "--repeats", str(repeats), "--peers", str(peers)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout
        result = Result(content=json.loads(output))
        out = Path(temporary)
        base, plain = load_file(out / "base.safetensors"), load_file(out / "script_average.safetensors")
        lowrank, ours = load_file(out / "script_lowrank.safetensors"), load_file(out / "r2m/model.safetensors")
        averages = {"r2m --method weight_average": out / "r2m_average/model.safetensors"}
        if result.content["peers"]:
            averages["mergekit linear"] = out / "mergekit_linear/model.safetensors"
            averages["fusion-bench simple_average"] = out / "fusion_average.safetensors"
        for name, path in averages.items():
            result.right(name, furthest(load_file(path), plain), 1e-6)
        same_merge(result, ours, lowrank, base)
    if result.wrong:
        del result.content["runs"]
        return result
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in result.content["runs"].items()
    }
    result.content["medians"] = medians
    seconds = {name: row["seconds"] for name, row in medians.items()}
    script = seconds["script: load, average, save"]
    result.bar("weight average, command / script", seconds["r2m --method weight_average"] / script, most=1.3)
    peak = medians["r2m"]["peak_bytes"] / medians["script: svd_lowrank"]["peak_bytes"]
    result.bar("peak memory, R²M command / svd_lowrank script", peak, most=0.25)
    if "mergekit linear" in seconds:
        mergekit = seconds["mergekit linear"]
        result.bar("mergekit linear / our weight average", mergekit / seconds["r2m --method weight_average"], least=2.5)
        result.bar("R²M / mergekit linear", seconds["r2m"] / mergekit, most=1.0)
    return result


def same_merge(result: Result, ours: StateDict, other: StateDict, base: StateDict) -> bool:
    """Whether two merges by near-optimal truncations are the same method: updates of one size, mostly one direction.

    Where a spectrum has no gap, near-optimal truncations keep different directions of about equal energy.
    """
    difference, sizes = 0.0, [0.0, 0.0]
    for name, theta in base.items():
        updates = [(state[name] - theta).double() for state in (ours, other)]
        difference += float((updates[0] - updates[1]).square().sum())
        sizes = [size + float(update.square().sum()) for size, update in zip(sizes, updates, strict=True)]
    apart, sizes_apart = math.sqrt(difference / sizes[1]), abs(math.sqrt(sizes[0] / sizes[1]) - 1)
    result.content["updates_beside_svd_lowrank"] = {"apart": apart, "sizes_apart": sizes_apart}
    return result.right("sizes of the updates apart", sizes_apart, 0.02) and result.right("updates apart", apart, 0.5)


def furthest(one: StateDict, other: StateDict) -> float:
    """Largest difference between elements; infinite where names differ."""
    if one.keys() != other.keys():
        return math.inf
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections: dict[str, Callable[[int], Result]] = {
        "blocks": blocks,
        "operators": operators,
        "scaling": scaling,
        "truncation": truncation,
        "files": lambda repeats: files(repeats, options.peers),
    }
    parser.add_argument("--only", choices=sections)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu.json")
    options = parser.parse_args()
    return run_sections(sections, options.only, options.repeats, options.json)


def run_sections(sections: Mapping[str, Callable[[int], Result]], only: str | None, repeats: int, path: Path) -> int:
    """Sections one after the other, their bars said; into a file where all of them ran and nothing was wrong."""
    content: dict[str, Any] = {"machine": machine(), "bars": []}
    wrong: list[str] = []
    for name, section in sections.items():
        if only in (None, name):
            print(f"== {name}", flush=True)
            start = time.monotonic()
            result = section(repeats)
            content[name] = {**result.content, "took_seconds": round(time.monotonic() - start, 1)}
            content["bars"] += result.bars
            wrong += result.wrong
            for row in result.bars:
                bound = f"at most {row['at_most']}" if "at_most" in row else f"at least {row['at_least']}"
                goal = "" if row["goal"] is None else f", goal {row['goal']}"
                print(f"  {'met ' if row['met'] else 'MISSED'} {row['name']}: {row['value']:.3f} ({bound}{goal})")
    if wrong:
        print("\n".join(["FAILED, nothing written:", *wrong]))
        return 1
    if only:
        print(json.dumps(content, indent=1))
        return 0
    write_json(path, content)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
