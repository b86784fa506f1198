"""The repository for Hugging Face's `kernels`: its files, and the tool itself on it."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import pytest
from libraries import with_libraries

from bench.release import hub_kernel

ROOT = Path(__file__).resolve().parents[2]


def test_its_variants_are_the_package_under_a_name_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = hub_kernel.write(tmp_path / "kernel", "somebody/r2m-kernels")
    build = tomllib.loads((repository / "build.toml").read_text())
    assert build["general"]["hub"]["repo-id"] == "somebody/r2m-kernels"
    package = {name: (ROOT / "r2m_kernels" / name).read_bytes() for name in hub_kernel.package_files()}
    assert {"__init__.py", "_triton/launch.json", "_triton/combine.py"} <= package.keys()
    names = set()
    for variant in (repository / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"]["type"] in build["general"]["backends"]
        names.add(metadata["id"])
        there = {str(one.relative_to(variant)): one.read_bytes() for one in variant.rglob("*") if one.is_file()}
        assert set(there) - {"metadata.json"} == set(metadata["digest"]["files"])
        assert package.items() <= there.items()
        assert f"torch.ops.{metadata['id']}" in there["_ops.py"].decode()
    assert len(names) == len(build["general"]["backends"]) == 3

    # Older versions of the tool look one level deeper.
    variant = repository / "build" / "torch-cpu"
    spec = importlib.util.spec_from_file_location("older", variant / "r2m_kernels" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    older = importlib.util.module_from_spec(spec)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec.loader.exec_module(older)
    assert older.MergeConfig.__module__.startswith("_r2m_kernels_cpu_")
    for name in [name for name in sys.modules if name.startswith("_r2m_kernels_cpu_")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.slow
def test_the_tool_loads_it_and_its_benchmarks_are_right(tmp_path: Path) -> None:
    repository = hub_kernel.write(tmp_path / "kernel", "somebody/r2m-kernels")
    found = with_libraries("zoo_kernel.py", str(repository), tmp_path)
    assert found["backends"] == ["cpu", "cuda", "rocm"]
    assert found["module"].startswith("_r2m_kernels_cpu_")
    assert (found["merged"], found["installed one"]) == ([1.0], False)
    assert found["verified"] == {f"Operators.{name}": True for name in ("combine", "residual_matmul", "task_gram")}
