"""What users install and type first: the wheel, the source archive, the whole demo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
LIBRARY = "r2m_kernels/_native/libr2m_native.so"


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def sources(tmp_path):
    """The tracked and new files, without what earlier builds left: a build must not depend on it."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    copy = tmp_path / "sources"
    for name in listed:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.mark.slow
def test_the_wheel_installs_and_merges_elsewhere(sources, tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".", cwd=sources)
    (wheel,) = tmp_path.glob("r2m_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"r2m_kernels", "r2m"}
    assert {"r2m_kernels/py.typed", "r2m_kernels/_triton/launch.json", "r2m/demo/__init__.py", LIBRARY} <= set(names)
    assert {"r2m/templates/card.md", "r2m/templates/report.html"} <= set(names)
    assert wheel.stem.split("-")[2:4] == ["py3", "none"]  # of any Python and any torch, on one kind of machine

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    elsewhere.mkdir()
    where = "import r2m, r2m_kernels; print(r2m.__file__, r2m_kernels.__file__)"
    assert run(sys.executable, "-c", where, cwd=elsewhere, PYTHONPATH=str(site)).count(str(site)) == 2
    base = {"w": torch.zeros(30, 40), "b": torch.zeros(30)}
    save_file(base, elsewhere / "base.safetensors")
    save_file({name: tensor + 1.0 for name, tensor in base.items()}, elsewhere / "fs.safetensors")
    command = ("-m", "r2m", "merge", "--base", "base.safetensors", "--expert", "fs.safetensors", "--out", "merged")
    run(sys.executable, *command, cwd=elsewhere, PYTHONPATH=str(site))
    merged = load_file(elsewhere / "merged" / "model.safetensors")
    assert torch.allclose(merged["w"], torch.ones(30, 40))
    report = json.loads((elsewhere / "merged" / "r2m_report.json").read_text())
    assert report["backend"]["name"] == "native"


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"R2M_NATIVE": "off"}, {"CXX": "/no/such/compiler"}], ids=lambda e: next(iter(e))
)
def test_a_build_without_a_compiler_merges_by_torch_and_says_so(environment, sources, tmp_path):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation")
    run(*pip, "--target", site, ".", cwd=sources, **environment)
    assert not (site / LIBRARY).exists()
    code = """
import torch, r2m_kernels
w = torch.ones(2, 2)
print(r2m_kernels.analyze({"w": w}, [{"w": w}]).report()["backend"])
"""
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert "'name': 'torch'" in found
    assert "built without a C++ compiler" in found


@pytest.mark.slow
def test_a_build_that_requires_the_kernels_fails_without_a_compiler(sources, tmp_path):
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path / "lib")
    environment = {**os.environ, "R2M_NATIVE": "require", "CXX": "/no/such/compiler"}
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "/no/such/compiler" in done.stderr


@pytest.mark.slow
def test_the_source_archive_holds_what_a_build_needs(sources, tmp_path):
    hook = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"
    archive = run(sys.executable, "-c", hook, tmp_path, cwd=sources).splitlines()[-1]
    with tarfile.open(tmp_path / archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert set(os.listdir(ROOT / "csrc")) - {".clang-format"} <= {
        name.removeprefix("csrc/") for name in names if name.startswith("csrc/")
    }
    assert {
        "setup.py",
        "csrc/README.md",
        "python/r2m/commands/main.py",
        "requirements.txt",
        "Makefile",
        "LICENSE",
    } <= names


@pytest.mark.slow
def test_the_whole_demo_shows_what_it_promises(tmp_path):
    out = tmp_path / "demo"
    printed = run(sys.executable, "-m", "r2m", "demo", "--out", out, cwd=tmp_path)
    table = {row["method"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    assert [*table] == [
        "base",
        "FS specialist",
        "FR specialist",
        "EFS specialist",
        "joint training",
        "ensemble",
        "weight average",
        "task arithmetic",
        "CART",
        "R2M",
    ]
    for kind in ("FS", "FR", "EFS"):  # each specialist is the best of the three on its own family
        own = table[f"{kind} specialist"][kind]
        assert own > 0.8
        assert own > max(table[f"{other} specialist"][kind] for other in ("FS", "FR", "EFS") if other != kind)
        assert kind in printed
    assert table["joint training"]["in-distribution"] > table["base"]["in-distribution"] + 0.2
    assert len(list(out.rglob("*.png"))) >= 3
    merged, base = load_file(out / "merged/r2m/model.safetensors"), load_file(out / "base.safetensors")
    assert merged.keys() == base.keys()
