"""Kernels compiled before: Triton finds them, and what is not for this installation is told and left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import triton

from r2m_kernels import _backends
from r2m_kernels._triton import ahead, launch

ROOT = Path(__file__).parents[2]
TARGET = SimpleNamespace(backend="cuda", arch=90)
SOME = ("sum_tiles_kernel", "row_coefficients_kernel")  # quick to compile
COLLECTED = """
import json, sys
from pathlib import Path
from bench.release import compiled
names, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
print(json.dumps(compiled.collect(["sm_90", "gfx942"], directory, lambda one: one.kernel.__name__ in names)))
"""
COMPILED = """
import json, sys
from pathlib import Path
from triton import knobs
from triton.runtime.driver import driver
from bench import compile_check
from r2m_kernels._triton import ahead
names, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
hits, told = [], []
knobs.compilation.listener = lambda **all: hits.append(all["cache_hit"])
for target in ("sm_90", "gfx942"):
    told.append(ahead.fill_for(compile_check.CHIPS[target].target, directory))
    for one in compile_check.launches(target):
        if one.kernel.__name__ in names:
            driver.set_active(compile_check.CompileOnly(target))
            assert one.compiled().asm[{"sm_90": "cubin", "gfx942": "hsaco"}[target]]
print(json.dumps([hits, told]))
"""


def compiling(code, cache, *arguments):
    """A script's output, in a child that has not imported Triton yet."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET")
    with forked.start([json.dumps(SOME), *map(str, arguments)], code, environment) as child:
        out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_what_was_compiled_before_is_not_compiled_again(tmp_path):
    package = tmp_path / ahead.PACKAGE
    counts = compiling(COLLECTED, ROOT / "build" / "triton", package)
    assert all(count > 0 for count in counts.values())
    hits, told = compiling(COMPILED, tmp_path / "empty", package)
    assert all(hits)
    assert len(hits) >= sum(counts.values())
    assert told == [f"{counts[name]} kernels for {name} were compiled before" for name in ("cuda-90", "hip-gfx942")]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"triton": "3.0.0"}, f"it is for Triton 3.0.0, and this is {triton.__version__}"),
        ({"sources": "another"}, "it is of other kernels than these; both are to be of one version"),
        ({"targets": {"cuda-80": {}, "cuda-100": {}}}, "it is for cuda-80, cuda-100, and not for cuda-90"),
        ({"targets": {"cuda-90": {"backend": "another", "kernels": []}}}, "its assembler was another one"),
        ({"targets": None}, "it cannot be read, or the cache not be written (TypeError: "),
    ],
)
def test_what_does_not_fit_is_told(change, why, tmp_path, monkeypatch):
    monkeypatch.setattr(ahead.compiler, "make_backend", lambda target: SimpleNamespace(hash=lambda: "this one"))
    monkeypatch.setattr(ahead.compiler, "get_cache_invalidating_env_vars", dict)
    manifest = {"triton": triton.__version__, "sources": ahead.sources()}
    manifest |= {"targets": {"cuda-90": {"backend": "this one", "kernels": []}}}
    (tmp_path / ahead.MANIFEST).write_text(json.dumps(manifest))
    assert ahead.fill_for(TARGET, tmp_path) == "0 kernels for cuda-90 were compiled before"
    (tmp_path / ahead.MANIFEST).write_text(json.dumps({**manifest, **change}))
    assert ahead.fill_for(TARGET, tmp_path).startswith(f"{ahead.PACKAGE} is not used: {why}")
    monkeypatch.setattr(ahead.compiler, "get_cache_invalidating_env_vars", lambda: {"DISABLE_LLVM_OPT": "1"})
    (tmp_path / ahead.MANIFEST).write_text(json.dumps(manifest))
    assert "the environment tells the compiler what to do (DISABLE_LLVM_OPT)" in ahead.fill_for(TARGET, tmp_path)


def test_the_report_says_what_became_of_them(monkeypatch):
    cuda = SimpleNamespace(type="cuda")
    monkeypatch.setattr(_backends, "_why_not_triton", lambda device: "")
    monkeypatch.setattr(launch, "slow_in_float64", lambda device: False)
    monkeypatch.setattr(ahead, "fill", lambda device: "7 kernels")
    assert _backends.choose("triton", cuda).reason == "asked for by name; 7 kernels"
    assert _backends.choose("auto", cuda).reason == "the fastest one this version has for cuda; 7 kernels"
    monkeypatch.setattr(ahead, "fill", lambda device: "")
    assert _backends.choose("triton", cuda).reason == "asked for by name"


def test_nothing_is_said_where_the_package_is_not_installed():
    ahead.fill.cache_clear()
    assert ahead.place() is None
    assert ahead.fill(torch.device("cuda")) == ""
