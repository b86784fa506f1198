"""The default and the other methods beside what they cannot do without: the CPU's bars, in one run.

    python -m bench.default [--only SECTION] [--repeats 9] [--json FILE]

Every row is a pair that runs one after the other, in turns of who is first, nine times in one process on two threads;
its number is the median of the pairs' quotients, so that what slows the machine for minutes slows both. Sections:

* ``passes``: two Transformer blocks of ViT-L/14's size in memory, three experts, float32: by rows, TIES and DARE beside
  the weight average, which reads the same inputs and writes the same outputs.
* ``truncation``: the default, and R²M at a tenth of all ranks, beside the textbook's products alone at the same ranks.
  For every matrix and expert these are X Ω, then Xᵀ Q and X Q for each of two power iterations, then Qᵀ X, with r + 8
  columns, as plain products with an X that is formed already; no random numbers, no QR, no SVD, no checkpoint read or
  written. The default's error beside ``torch.svd_lowrank``'s.
* ``spectra``: Iso-C and TSV-M beside their own products, QR, eigenvalue and singular value problems alone, in the same
  dtypes and shapes, as plain calls on inputs that are formed already.
* ``scaling``: the default at twice the experts, and at twice the blocks.
* ``files``: four blocks (50 M parameters) as files: the command with its defaults, and with that R²M's options, beside
  the weight average's.

A wrong result is not timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from r2m.demo.parallel import torch_threads
from safetensors.torch import load_file
from torch import Tensor

from bench import cases, rivals
from bench.cases import StateDict, first_blocks, optimum
from bench.files import TENTH
from bench.machine import RESULTS, ROOT
from bench.run import Result, distance, furthest, our_truncation, run_sections
from r2m_kernels import MergeConfig, merge
from r2m_kernels._interface import Effort
from r2m_kernels._native import library

THREADS, EXPERTS = 2, 3
AVERAGE, ROWS = MergeConfig.weight_average(), MergeConfig.r2m(rank=1.0, row_power=3.0)
SHARE = float(MergeConfig.r2m().rank)
# The abstract's method and no more: at a tenth of all ranks, one weight for all rows.
ABSTRACT = MergeConfig.r2m(rank=0.1, row_power=0.0, whole_up_to=0)
# Of an update: float32's. TIES takes either sign where a sum of kept elements cancels to rounding, 2⁻²⁰ of them or so.
ROUNDING, SIGNS = 1e-4, 2e-3
Work = Callable[[], object]


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def started() -> Result:
    """A section's result, with what else decides how fast several threads are on a machine that is shared."""
    return Result(content={"load": os.getloadavg()[0], "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY")})


def compare(
    result: Result, name: str, ours: Work, other: Work, pairs: int, most: float, goal: float | None = None
) -> None:
    """Time two in pairs, and hold the median of their quotients to a bar."""
    ours(), other()
    rows = []
    for turn in range(pairs):
        first, second = (ours, other) if turn % 2 == 0 else (other, ours)
        times = seconds(first), seconds(second)
        rows.append(times if turn % 2 == 0 else times[::-1])
    quotient = statistics.median(one / two for one, two in rows)
    one, two = (statistics.median(column) for column in zip(*rows, strict=True))
    result.content[name] = {"ours": one, "other": two, "quotient": quotient, "pairs": rows, "load": os.getloadavg()[0]}
    result.bar(name, quotient, most=most, goal=goal)


def apart(one: StateDict, other: StateDict, base: StateDict) -> float:
    """‖one − other‖ over the length of the other's update."""
    difference = sum(float((one[name] - other[name]).double().square().sum()) for name in base)
    return (difference / sum(float((other[name] - base[name]).double().square().sum()) for name in base)) ** 0.5


def passes(pairs: int) -> Result:
    """Methods that only pass over checkpoints."""
    result = started()
    base, experts = cases.checkpoints(2, EXPERTS)
    methods = {
        "by rows": (ROWS, 1.3, ROUNDING),
        "TIES": (MergeConfig.ties(), 3.0, SIGNS),
        "DARE": (MergeConfig.dare(), 3.0, ROUNDING),
    }
    average = rivals.average(experts)
    wrong = not result.right("weight average", apart(merge(base, experts, AVERAGE), average, base), ROUNDING)
    for name, (config, _, bound) in methods.items():
        error = apart(merge(base, experts, config), merge(base, experts, config, backend="torch"), base)
        wrong |= not result.right(f"{name}, beside plain PyTorch", error, bound)
    if wrong:
        return result
    for name, (config, most, _) in methods.items():
        compare(
            *(result, f"{name} / weight average"),
            *(lambda config=config: merge(base, experts, config), lambda: merge(base, experts, AVERAGE), pairs, most),
        )
    return result


def truncation(pairs: int) -> Result:
    """The default beside the products alone of the textbook's randomized SVD."""
    result = started()
    base, experts = cases.checkpoints(2, EXPERTS)
    one = first_blocks(base, 1)
    errors = {"ours": 0.0, "torch.svd_lowrank": 0.0}
    for name, rows in rivals.residuals_of(one, experts).items():
        rank = rivals.rank_of(base[name], SHARE)
        factors = {
            "ours": our_truncation(list(rows), rank, MergeConfig.r2m(), name),
            "torch.svd_lowrank": [rivals.svd_lowrank(x, rank) for x in rows],
        }
        best = [optimum(x, rank) for x in rows]
        for method, pairs_of in factors.items():
            errors[method] = max(errors[method], *map(lambda x, f, b: distance(x, f) / b, rows, pairs_of, best))
    result.content["error over the optimum"] = errors
    result.bar("our error / torch.svd_lowrank's", errors["ours"] / errors["torch.svd_lowrank"], most=1.0)
    exact = merge(one, experts_of(experts, 1), svd="exact")
    if not result.right(
        "default, beside exact truncations", apart(merge(one, experts_of(experts, 1)), exact, one), 0.5
    ):
        return result
    residuals = [x for rows in rivals.residuals_of(base, experts).values() for x in rows]
    ranks = [rivals.rank_of(x, SHARE) for x in residuals]

    def products() -> None:
        rivals.textbook_products(residuals, ranks)

    def fewer_products() -> None:
        rivals.textbook_products(residuals, [rivals.rank_of(x, float(ABSTRACT.rank)) for x in residuals])

    compare(
        *(result, "default / the textbook's products alone"),
        *(lambda: merge(base, experts), products, pairs, 0.75, 0.65),
    )
    compare(
        *(result, "rank .1, all rows alike / the textbook's products alone"),
        *(lambda: merge(base, experts, ABSTRACT), fewer_products, pairs, 0.75, 0.65),
    )
    lowrank = [seconds(lambda: [rivals.svd_lowrank(x, r) for x, r in zip(residuals, ranks, strict=True)])]
    result.content["torch.svd_lowrank of the residuals, seconds"] = lowrank[0]
    return result


def experts_of(experts: Sequence[StateDict], blocks: int) -> list[StateDict]:
    """The first blocks of each."""
    return [first_blocks(expert, blocks) for expert in experts]


def iso_c_alone(changes: Sequence[Tensor]) -> None:
    """Of one change a matrix in float64: its Gram, the eigenvalue problem, the polar factor's two products."""
    for change in changes:
        rows = change if change.shape[0] <= change.shape[1] else change.mT
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        ((vectors * values.clamp_min(1e-30).rsqrt()) @ vectors.mT) @ rows


def tsv_m_alone(matrices: Sequence[Sequence[Tensor]], fast: torch.dtype) -> None:
    """Of each matrix's task vectors: one shifted truncation each, then their singular vectors made orthonormal.

    Truncation, float32: a sketch's orthonormal rows, V AᵀA with operands in ``fast`` and orthonormal rows again, as
    often as the backend steps, V Aᵀ. Rows are made orthonormal by their Gram's Cholesky factor. Then float64: QR of the
    side that is not orthonormal, its triangle's SVD, two rotations; of each side of all together a Gram, its eigenvalue
    problem, two products. Last, float32: the product of both sides.
    """

    def orthonormal(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(
            torch.linalg.cholesky(rows @ rows.mT).mT, rows.mT, upper=True, left=False
        ).mT

    for taus in matrices:
        rank, short = min(taus[0].shape) // len(taus), min(taus[0].shape)
        effort = Effort(MergeConfig().power_iterations, rivals.OVERSAMPLING, None)
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for tau in taus:
            a = tau if tau.shape[0] >= tau.shape[1] else tau.mT
            basis, quick = orthonormal(a[:rank]), a.to(fast)
            for _ in range(effort.steps_on_cpu(rank, short)):
                basis = orthonormal(((basis.to(fast) @ quick.mT) @ quick).float())
            weighted, other = (a @ basis.mT).double(), basis.mT.double()
            q, triangle = torch.linalg.qr(weighted)
            u, _, vt = torch.linalg.svd(triangle)
            sides[0].append(q @ u)
            sides[1].append(other @ vt.mT)
        left, right = (torch.cat(side, dim=1) for side in sides)
        for side in (left, right):
            values, vectors = torch.linalg.eigh(side.mT @ side)
            side @ ((vectors * values.clamp_min(1e-30).rsqrt()) @ vectors.mT)
        left.float() @ right.mT.float()


def spectra(pairs: int) -> Result:
    """Methods that change singular values, beside their dense algebra alone."""
    result = started()
    base, experts = cases.checkpoints(2, EXPERTS)
    iso, tsv = MergeConfig.iso_c(), MergeConfig.tsv_m()
    one, few = first_blocks(base, 1), experts_of(experts, 1)
    # Specialists that are mostly noise have no clear leading vectors: a randomized TSV-M is far from the exact one, and
    # right where it is no farther than plain PyTorch's.
    exact = merge(one, few, tsv.replace(svd="exact"), backend="torch")
    farthest = 1.02 * apart(merge(one, few, tsv, backend="torch"), exact, one)
    expected = {"Iso-C": (iso, merge(one, few, iso, backend="torch"), 1e-5), "TSV-M": (tsv, exact, farthest)}
    for name, (config, other, bound) in expected.items():
        if not result.right(f"{name}, beside plain PyTorch", apart(merge(one, few, config), other, one), bound):
            return result
    taus = [[expert[name] - tensor for expert in experts] for name, tensor in base.items()]
    changes = [sum(of_one).double() for of_one in taus]
    fast = torch.bfloat16 if library.load().multiplies_bfloat16 else torch.float32
    compare(
        *(result, "Iso-C / its products and eigenvalue problems alone"),
        *(lambda: merge(base, experts, iso), lambda: iso_c_alone(changes), pairs, 1.5),
    )
    compare(  # ten times as long as the others: fewer
        *(result, "TSV-M / its products, eigenvalue problems and SVDs alone"),
        *(lambda: merge(base, experts, tsv), lambda: tsv_m_alone(taus, fast), -(-pairs // 3), 1.5),
    )
    return result


def scaling(pairs: int) -> Result:
    """The default at twice the experts, and at twice the blocks."""
    result = started()
    base, experts = cases.checkpoints(2, 8)
    compare(
        *(result, "experts 4 to 8"),
        *(lambda: merge(base, experts), lambda: merge(base, experts[:4]), pairs, 2.1),
    )
    base, experts = cases.checkpoints(4, EXPERTS)
    two, few = first_blocks(base, 2), experts_of(experts, 2)
    compare(*(result, "blocks 2 to 4"), *(lambda: merge(base, experts), lambda: merge(two, few), pairs, 2.1))
    return result


def files(pairs: int) -> Result:
    """The whole command with its defaults beside the weight average's, each in its own process."""
    default, average = "r2m", "r2m --method weight_average"
    with tempfile.TemporaryDirectory(prefix="r2m-bench-") as temporary:
        peers = ROOT / ".venv-peers"
        command = [sys.executable, "-m", "bench.files", temporary, "--repeats", str(pairs), "--peers", str(peers)]
        command += ["--only", default, TENTH, average, "mergekit linear"]
        result = started()
        result.content |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)
        out = Path(temporary)
        states = [load_file(out / f"{name}.safetensors") for name in ("base", *(f"expert{i}" for i in range(EXPERTS)))]
        for name, config in (("r2m", MergeConfig.r2m()), ("r2m_tenth", ABSTRACT), ("r2m_average", AVERAGE)):
            # No bit depends on the memory budget, or on where the checkpoints lie.
            found = furthest(
                load_file(out / name / "model.safetensors"), merge(states[0], expert_names(states), config)
            )
            result.right(f"{name}, beside the same merge in memory", found, 0.0)
    runs = result.content["runs"]
    if result.wrong:
        return result

    def quotient(one: str, other: str, key: str) -> float:
        return statistics.median(a[key] / b[key] for a, b in zip(runs[one], runs[other], strict=True))

    for what, command in (("default", default), ("rank .1, all rows alike", TENTH)):
        result.bar(f"{what} / weight average, seconds", quotient(command, average, "seconds"), most=1.7, goal=1.4)
        result.bar(f"{what} / weight average, peak memory", quotient(command, average, "peak_bytes"), most=1.25)
        if result.content["peers"]:
            result.bar(f"{what} / mergekit linear, seconds", quotient(command, "mergekit linear", "seconds"), most=0.7)
    if not result.content["peers"]:
        result.content["mergekit linear"] = "not measured: there is no .venv-peers (`make bench-peers`)"
    return result


def expert_names(states: Sequence[StateDict]) -> dict[str, StateDict]:
    """The experts as the command of ``bench/files.py`` names them, behind the base."""
    return {f"e{index}": state for index, state in enumerate(states[1:])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = {one.__name__: one for one in (passes, truncation, spectra, scaling, files)}
    parser.add_argument("--only", choices=sections)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=RESULTS / "default.json")
    options = parser.parse_args()
    with torch_threads(THREADS):
        return run_sections(sections, options.only, options.repeats, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
