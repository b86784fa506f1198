"""What one tree makes of the cases of :mod:`bench.same_bits`: digests of all bytes, as JSON.

A script of its own: it runs under two trees whose modules have other names, and so knows only what is public in both,
``r2m_kernels`` and the command. ``python -P outcomes.py PART RESULT`` in an empty directory; PART: a key of PARTS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import r2m_kernels
from r2m_kernels import MergeConfig, analyze, merge

Fields = dict[str, Any]

# Field by field: defaults may change without a bit of these. A field that is younger than the commit is not here.
R2M: Fields = {
    **{"real_rank": 1, "center": False, "residual": "core", "rank": 1.0, "ranks": [], "exclude": [], "keep": []},
    **{"average": [], "extra": "error", "core_scale": 1.0, "core_mode": "restored", "eta": 1.0, "norm_match": True},
    **{"eta_mode": "constant", "row_power": 3.0, "scale": "none", "layer_weight": "none", "weights": None},
    **{"spectrum": "truncate", "core_spectrum": "keep", "elementwise": "none", "density": 0.2, "svd": "randomized"},
    **{"power_iterations": 2, "oversampling": 8, "tolerance": None, "seed": 0},
}
TRUNCATED: Fields = R2M | {"rank": 0.1, "core_mode": "mean", "eta": 0.6, "eta_mode": "relative", "row_power": 0.0}
PLAIN: Fields = R2M | {"real_rank": None, "core_mode": "mean", "eta": 0.0, "row_power": 0.0, "norm_match": False}
SHARES: Fields = PLAIN | {"real_rank": 0, "eta": 1.0}
METHODS: dict[str, Fields] = {
    "r2m": R2M,
    "r2m_truncated": TRUNCATED,
    "r2m_paper": TRUNCATED | {"center": True, "residual": "own", "eta_mode": "core_norm"},
    "weight_average": PLAIN,
    "task_arithmetic": PLAIN | {"core_scale": 0.3, "core_mode": "sum"},
    "cart": PLAIN | {"rank": 0.1, "eta": 1.0, "eta_mode": "sum"},
    "ties": PLAIN | {"elementwise": "ties"},
    "dare": PLAIN | {"elementwise": "dare", "core_scale": 0.3, "core_mode": "sum"},
    "star": SHARES | {"rank": 0.4, "spectrum": "rescale", "svd": "exact"},
    "tsv_m": SHARES | {"spectrum": "orthogonal", "eta_mode": "sum"},
    "iso_c": PLAIN | {"core_spectrum": "flat"},
}
SOME = ("r2m", "r2m_truncated", "ties", "tsv_m")
# Each changes one thing, in whole residuals and in truncated ones.
OPTIONS: dict[str, Fields] = {
    **{f"scale={value}": {"scale": value} for value in ("layer", "column")},
    "layer_weight": {"layer_weight": "frobenius"},
    "weights": {"weights": [1.0, 2.0, 0.5]},
    "center": {"center": True},
    "center, own": {"center": True, "residual": "own"},
    "no real": {"real_rank": 0},
    "real_rank=2": {"real_rank": 2, "residual": "own"},
    "eta=sum": {"eta_mode": "sum", "norm_match": False, "core_mode": "sum"},
    "eta=0": {"eta": 0.0},
    "exclude": {"exclude": ["b.*"], "keep": ["*.bias"], "average": ["head.*"]},
    "ranks": {"ranks": [["a.*", 7], ["conv*", 0.5]], "rank": 0.3},
    "extra=average": {"extra": "average"},
    "extra=drop": {"extra": "drop"},
}
TRUNCATIONS: dict[str, Fields] = {
    "rows": {"core_mode": "restored", "eta_mode": "constant", "eta": 1.0, "row_power": 3.0},
    "exact": {"svd": "exact"},
    "textbook": {"svd": "textbook", "power_iterations": 1},
    "tolerance": {"tolerance": 1e-3, "rank": 9},
    "tolerance, textbook": {"tolerance": 1e-3, "svd": "textbook"},
    "steps": {"power_iterations": 5, "oversampling": 0, "seed": 7, "rank": 40},
}
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    **{str(dtype)[6:]: (dtype,) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)},
    "mixed": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
SHAPES: dict[str, tuple[int, ...]] = {
    **{"a.weight": (260, 130), "b.weight": (96, 200), "conv.weight": (24, 8, 3, 3), "low.weight": (33, 20)},
    **{"a.bias": (260,), "norm.running_var": (96,), "scale": (), "empty": (0, 4), "head.weight": (2, 96)},
}
TINY: dict[str, tuple[int, ...]] = {"a.weight": (40, 68), "c.weight": (40, 68), "b.weight": (68, 35), "a.bias": (40,)}
# Larger than the blocks and panels in which tensors are cut.
LARGE: dict[str, tuple[int, ...]] = SHAPES | {"a.weight": (1100, 1000), "c.weight": (300, 900), "a.bias": (600_000,)}
# So much of them is kept of so small a side that a truncation starts from AᵀA.
SMALL_SIDES: dict[str, tuple[int, ...]] = {"a.weight": (300, 600), "b.weight": (600, 200), "a.bias": (300,)}
BACKENDS = ("torch", "native")


def checkpoint(shapes: dict[str, tuple[int, ...]], index: int, dtype: torch.dtype, extra: bool) -> dict[str, Tensor]:
    """The base (0) or an expert: the base, a common part, one of its own that grows with its index."""

    def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    found: dict[str, Tensor] = {}
    for place, (name, shape) in enumerate(shapes.items()):
        value = normal(place, shape)
        if index:
            own = normal(100 * index + place, shape)
            rows = torch.linspace(0, 1, max(1, len(own)) if shape else 1).reshape([-1] + [1] * (len(shape) - 1))
            value = value + 0.05 * normal(50 + place, shape) + 0.03 * index * own * (rows if shape else 1)
        found[name] = (value.abs() if name.endswith("var") else value).to(dtype)
    found["steps"] = torch.arange(5)
    if shapes not in (TINY, SMALL_SIDES):
        found["tied.weight"] = found["b.weight"]
        found["t.weight"] = found["a.weight"].T  # strides of its own
    if index and extra:
        found["new.weight"] = normal(100 * index + 99, (3, 4)).to(dtype)
    return found


def checkpoints(
    shapes: dict[str, tuple[int, ...]], count: int, dtypes: tuple[torch.dtype, ...], extra: bool
) -> list[dict[str, Tensor]]:
    """The base, then ``count`` experts."""
    return [checkpoint(shapes, i, dtypes[i % len(dtypes)], extra) for i in range(count + 1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One merge in Python."""

    name: str
    config: Fields
    backend: str = "native"
    dtype: str = "float32"
    count: int = 3
    shapes: str = "SHAPES"
    budget: int | None = None
    threads: int = 1


def python_cases() -> Iterator[Case]:
    """Not the whole product: every option, dtype, number of experts and budget meets those it may interfere with."""
    for backend in BACKENDS:
        for (name, config), dtype in itertools.product(METHODS.items(), ("float32", "bfloat16")):
            yield Case(name, config, backend, dtype)
        for name, dtype in itertools.product(SOME, ("float16", "float64", "mixed")):
            yield Case(name, METHODS[name], backend, dtype)
        for name, count in itertools.product((*SOME, "r2m_paper", "cart", "dare"), (1, 2, 5)):
            yield Case(name, METHODS[name], backend, count=count)
        for option, change in OPTIONS.items():
            yield Case(f"r2m, {option}", R2M | change, backend)
            yield Case(f"truncated, {option}", TRUNCATED | change, backend, "bfloat16")
        for option, change in TRUNCATIONS.items():
            yield Case(f"truncated, {option}", TRUNCATED | change, backend)
        for rule, scale in itertools.product(("ties", "dare"), ("layer", "column")):
            yield Case(f"{rule}, scale={scale}", METHODS[rule] | {"scale": scale}, backend)
        for name in METHODS:  # budgets that cut tensors, keep some inputs, and write factors to disk
            budgets = (None, 3_000_000, 20_000_000) if name in SOME else (3_000_000,)
            for budget in budgets if name not in ("star", "tsv_m", "iso_c") else ():
                yield Case(name, METHODS[name], backend, shapes="LARGE", budget=budget, threads=1 if budget else 2)
        for name, budget in itertools.product(("r2m", "r2m_truncated"), (None, 3_000_000)):
            config = METHODS[name] | {"rank": 0.4}
            yield Case(name, config, backend, shapes="SMALL_SIDES", budget=budget, threads=1 if budget else 2)


def triton_cases() -> Iterator[Case]:
    """Few and small: kernels are interpreted."""
    for name, dtype in itertools.product(("r2m", "weight_average", "ties"), ("float32", "bfloat16")):
        yield Case(name, METHODS[name], "triton", dtype, 2, "TINY")
    yield Case("truncated, shifted", TRUNCATED | {"rank": 0.3}, "triton", "float32", 2, "TINY")
    yield Case("truncated, textbook", TRUNCATED | TRUNCATIONS["textbook"], "triton", "bfloat16", 2, "TINY")
    yield Case("truncated, tolerance", TRUNCATED | TRUNCATIONS["tolerance"], "triton", "bfloat16", 2, "TINY")


def digest(tensor: Tensor) -> str:
    """Dtype, shape and bytes."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def contents(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Of a state dict, with its order."""
    return {"order": list(tensors), "tensors": {name: digest(tensor) for name, tensor in tensors.items()}}


def in_python(case: Case) -> dict[str, Any]:
    """Merged and reported, in one call and by an analysis that is used again."""
    torch.set_num_threads(case.threads)
    shapes = {"SHAPES": SHAPES, "TINY": TINY, "LARGE": LARGE, "SMALL_SIDES": SMALL_SIDES}[case.shapes]
    extra = case.config["extra"] != "error"
    base, *experts = checkpoints(shapes, case.count, DTYPES[case.dtype], extra)
    config = MergeConfig(**case.config)
    named = {f"e{i}": expert for i, expert in enumerate(experts)}
    analysis = analyze(base, named, config, backend=case.backend, memory_budget=case.budget)
    merged = analysis.merge()
    outcome = {"merged": contents(merged), "report": analysis.report(), "spilled": analysis.spilled_bytes}
    if case.budget is None and case.shapes == "SHAPES":
        at_once = merge(base, experts, config, backend=case.backend, dtype=torch.float32)
        again = config.replace(eta=config.eta / 2, core_scale=0.7)
        outcome["at once"] = contents(at_once)
        outcome["again"] = contents(analysis.merge(again))
        outcome["report again"] = analysis.report(again)
    return outcome


def recipe(name: str, fields: Fields, **keys: Any) -> None:
    """Write one, of the files that :func:`lay_out` has made."""
    models = [{"model": f"in/{path}", "name": path[:2]} for path in ("e1.safetensors", "e2.pth", "e3.safetensors")]
    content = {"base_model": "in/base", "models": models, "merge_method": name, "parameters": fields, **keys}
    Path(f"{name}.yaml").write_text(json.dumps(content))


def lay_out() -> None:
    """Inputs in both formats and a directory of shards, and recipes."""
    base, *experts = checkpoints(LARGE, 3, DTYPES["float32"], extra=False)
    Path("in/base").mkdir(parents=True)
    for index, tensors in enumerate((base, *experts)):
        whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        if index == 2:
            torch.save(whole, "in/e2.pth")
        elif index:
            save_file(whole, f"in/e{index}.safetensors")
        else:
            files = {name: f"model-0000{1 + ('a' in name)}-of-00002.safetensors" for name in whole}
            for file in set(files.values()):
                save_file({name: whole[name] for name, at in files.items() if at == file}, f"in/base/{file}")
            index_file = {"metadata": {}, "weight_map": files}
            Path("in/base/model.safetensors.index.json").write_text(json.dumps(index_file))
            Path("in/base/config.json").write_text('{"architectures": ["Detector"]}')
    recipe("r2m", R2M, head="mean", head_tensors=["head.*"])
    recipe("r2m_truncated", TRUNCATED, dtype="bfloat16")
    recipe("ties", METHODS["ties"], format="pth")
    recipe("dare", METHODS["dare"] | {"scale": "column"})
    recipe("task_arithmetic", METHODS["task_arithmetic"], rename={"low.": None, "conv.": "stem."})


def command(*arguments: str, code: int = 0) -> str:
    """``r2m`` in this process, which has loaded torch; what it printed."""
    printed, before = io.StringIO(), sys.argv
    try:
        sys.argv = ["r2m", *arguments]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            runpy.run_module("r2m", run_name="__main__")
    except SystemExit as end:
        if (end.code or 0) != code:
            raise RuntimeError(f"r2m {' '.join(arguments)}: exit code {end.code}\n{printed.getvalue()}") from None
    finally:
        sys.argv = before
    return printed.getvalue()


def plain(text: str) -> str:
    """Without this run's directory and this tree's version."""
    return text.replace(str(Path.cwd()), "HERE").replace(r2m_kernels.__version__, "VERSION")


def written(directory: str) -> dict[str, Any]:
    """Every file below an output directory."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in Path(directory).rglob("*") if path.is_file()):
        name = str(path.relative_to(directory))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
                metadata = {key: plain(value) for key, value in (file.metadata() or {}).items()}
                found[name] = {**contents(tensors), "metadata": metadata}
        elif path.suffix == ".pth":
            found[name] = contents(torch.load(path, weights_only=True))
        elif path.suffix == ".json":
            found[name] = json.loads(plain(path.read_text()))
        else:
            found[name] = plain(path.read_text())
        if path.name == "r2m_report.json":  # sizes are those of headers and states, which hold the version
            found[name]["output"] = sorted(found[name]["output"]["files"])
    return found


def by_command() -> Iterator[tuple[str, dict[str, Any]]]:
    """Output directories of ``r2m merge``, by itself and in two processes, and of what builds on them."""
    lay_out()
    small = ("--memory-budget", "3MB", "--max-shard-size", "2MB")
    for name, options in itertools.product(("r2m", "r2m_truncated", "ties", "dare", "task_arithmetic"), ((), small)):
        out = f"{name}{len(options)}"
        command("merge", f"{name}.yaml", "--out", out, *options)
        yield f"r2m merge, {name}{' in little memory' if options else ''}", written(out)
    backends = {"torch": "r2m_truncated", "native": "r2m"}
    for backend, name in backends.items():
        yaml_text = f"{name}.yaml"
        command("merge", yaml_text, "--out", backend, "--backend", backend, "--set", "parameters.weights=[1, 3, 2]")
        yield f"r2m merge, {name} on {backend}", written(backend)
    command("remove", "r2m0", "--expert", "e2")
    yield "r2m remove", written("r2m0")
    command("add", "r2m0", "--expert", "e2=in/e2.pth")
    yield "r2m add", written("r2m0")
    command("sweep", "r2m_truncated0", "--to", "sweep", "--eta", "0.2,0.6", "--rank", "0.05,0.1")
    yield "r2m sweep", written("sweep")
    for name in ("r2m_truncated", "ties"):
        told = command("plan", f"{name}.yaml", "--out", "new", "--memory-budget", "64MB")
        # Memory, disk and time are this machine's.
        yield f"r2m plan, {name}", {"lines": re.findall("^(?:inputs|reads|writes) .*$", told, re.MULTILINE)}
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "r2m"]
    subprocess.run([*several, "merge", "r2m_truncated.yaml", "--out", "two", *small, "--quiet"], check=True)
    yield "r2m merge, r2m_truncated by two processes", written("two")


def merges(cases: Iterator[Case]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every case; one that fails says so."""
    for case in cases:
        name = " · ".join(str(value) for field, value in vars(case).items() if field != "config" and value is not None)
        try:
            yield name, in_python(case)
        except Exception as error:
            yield name, {"error": f"{type(error).__name__}: {error}"}


PARTS = {
    "python": lambda: merges(python_cases()),
    "triton": lambda: merges(triton_cases()),
    "command": by_command,
}

if __name__ == "__main__":
    unknown = R2M.keys() - {field.name for field in dataclasses.fields(MergeConfig)}
    if unknown:
        sys.exit(f"MergeConfig of {Path(r2m_kernels.__file__).parent} has no {', '.join(sorted(unknown))}")
    outcomes = dict(PARTS[sys.argv[1]]())
    here = {"package": str(Path(r2m_kernels.__file__).parents[1]), "outcomes": outcomes}
    Path(sys.argv[2]).write_text(json.dumps(here))
