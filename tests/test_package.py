"""What users install and type first: the wheel, the source archive, the whole demo."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bench.release import check, wheels
from bench.release import installed as try_wheels

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
    """The tracked and new files, without what earlier builds left."""
    return wheels.copy_of_sources(tmp_path / "sources")


def installed(wheel, site):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--target", site, wheel)
    run(*pip, cwd=site.parent)
    return site


def files_of(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


@pytest.mark.slow
def test_what_an_index_takes(tmp_path):
    kinds = [kind for kind in wheels.KINDS if kind != "aarch64" or shutil.which("aarch64-linux-gnu-g++")]
    machine = platform.machine()
    made = {one.name.rpartition("-")[2]: one for one in wheels.build(tmp_path / "dist", kinds)}
    assert len(made) == len(kinds)
    contents = {}
    for kind in {machine, *kinds} - {"sdist", "any"}:
        wheel = made[f"manylinux_2_28_{kind}.whl"]
        report = " ".join(wheel.with_suffix(".txt").read_text().split())
        assert f'is consistent with the following platform tag: "manylinux_2_17_{kind}"' in report
        contents[kind] = files_of(wheel)
        assert LIBRARY in contents[kind]
    portable = files_of(made["any.whl"])
    assert all(names - {LIBRARY} == portable for names in contents.values())
    assert {name.split("/")[0] for name in portable if ".dist-info" not in name} == {"r2m_kernels", "r2m"}
    assert {"r2m_kernels/py.typed", "r2m_kernels/_triton/launch.json", "r2m/demo/__init__.py"} <= portable
    assert {"r2m/templates/card.md", "r2m/templates/report.html"} <= portable

    archive = next(one for name, one in made.items() if name.endswith(".tar.gz"))
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"csrc/{name}" for name in set(os.listdir(ROOT / "csrc")) - {".clang-format"}} <= names
    assert {"setup.py", "python/r2m/commands/main.py", "requirements.txt", "Makefile", "LICENSE"} <= names

    for kind, backend in ((f"manylinux_2_28_{machine}.whl", "native"), ("any.whl", "torch")):
        site = installed(made[kind], tmp_path / backend)
        found = try_wheels.tried(sys.executable, tmp_path / f"{backend}_tried", site)
        assert found["backend"] == backend
        assert found["file"].startswith(str(site))
    assert found["why"].endswith("this installation has no compiled CPU kernels")
    if "aarch64" not in kinds:
        pytest.skip("all but the wheel for aarch64: there is no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")


@pytest.mark.slow
def test_a_build_without_a_compiler_merges_by_torch(sources, tmp_path):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation")
    run(*pip, "--target", site, ".", cwd=sources, CXX="/no/such/compiler")
    assert not (site / LIBRARY).exists()
    assert try_wheels.tried(sys.executable, tmp_path / "tried", site)["backend"] == "torch"


BUILDS = """
import json, os, runpy, sys, setuptools
builds, given = [], {}
setuptools.setup = lambda **all: builds.append(len(all["ext_modules"])) or given.update(all)
for os.environ["_PYTHON_HOST_PLATFORM"], os.environ["R2M_NATIVE"] in json.loads(sys.argv[1]):
    runpy.run_path("setup.py")
print(builds)
"""
DESCRIBED = BUILDS.replace("print(builds)", "print(given['long_description'])")


def test_systems_other_than_linux_are_built_without_kernels_unless_asked():
    asked = {("win-amd64", "auto"): 0, ("macosx-11.0-arm64", "auto"): 0, ("macosx-11.0-arm64", "require"): 1}
    asked |= {("linux-aarch64", "auto"): 1, ("linux-x86_64", "off"): 0}
    assert json.loads(run(sys.executable, "-c", BUILDS, json.dumps([*asked]), cwd=ROOT)) == [*asked.values()]


def test_an_index_shows_no_link_that_leads_nowhere():
    shown = run(sys.executable, "-c", DESCRIBED, json.dumps([["linux-x86_64", "off"]]), cwd=ROOT)
    assert re.findall(r"\]\((?!https?://)[^)]*\)", shown) == []
    assert "[arXiv 2509.24367](https://arxiv.org/abs/2509.24367)" in shown
    assert "step by step" in shown.partition("docs/tutorial.md")[2]  # texts of links are there
    assert "!" + "[" not in shown


def release_of(root, version="0.2.0", heading="## 0.2.0 (2026-11-30)", cited="0.2.0", date="2026-11-30"):
    (root / "r2m_kernels").mkdir()
    (root / "r2m_kernels" / "_version.py").write_text(f'__version__ = "{version}"\n')
    (root / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n## 0.1.0 (2026-01-01)\n")
    (root / "CITATION.cff").write_text(f"version: {cited}\ndate-released: {date}\n")
    return root


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"version": "0.2.0.dev0", "cited": "0.2.0.dev0", "heading": "## 0.2.0.dev0 (2026-11-30)"}, "version: "),
        ({"heading": "## 0.2.0 (unreleased)"}, "CHANGELOG.md: expected its first section to be '## 0.2.0 (YYYY"),
        ({"cited": "0.1.0"}, "CITATION.cff: expected version 0.2.0, got 0.1.0"),
        ({"date": "2026-11-29"}, "CITATION.cff: expected date-released 2026-11-30"),
    ],
)
def test_a_release_is_checked(change, problem, tmp_path):
    wrong = [*check.of_texts(release_of(tmp_path, **change))]
    assert [one[: len(problem or "")] for one in wrong] == ([problem] if problem else [])


def test_a_tag_and_a_working_tree_are_checked(tmp_path):
    git = ("git", "-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    release_of(tmp_path)
    run(*git, "init", "--quiet", cwd=tmp_path)
    assert "are not committed" in next(check.of_repository(tmp_path))
    run(*git, "add", ".", cwd=tmp_path)
    run(*git, "commit", "--quiet", "--message", "all", cwd=tmp_path)
    assert [*check.of_repository(tmp_path)] == []
    assert not check.tagged(tmp_path)
    run(*git, "tag", "--annotate", "v0.2.0", "--message", "a release", cwd=tmp_path)
    assert (check.tagged(tmp_path), [*check.of_repository(tmp_path)]) == (True, [])
    run(*git, "commit", "--quiet", "--allow-empty", "--message", "later", cwd=tmp_path)
    assert [*check.of_repository(tmp_path)] == ["tag v0.2.0: is on another commit; a version is released once"]


def test_files_of_a_release_are_checked(tmp_path):
    assert [*check.of_files(tmp_path)] == [
        f"{tmp_path}: lacks {check.NAME}-{check.version()}.tar.gz; `make wheel` builds it"
    ]


@pytest.mark.slow
def test_a_build_that_requires_the_kernels_fails_without_a_compiler(sources, tmp_path):
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path / "lib")
    environment = {**os.environ, "R2M_NATIVE": "require", "CXX": "/no/such/compiler"}
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "/no/such/compiler" in done.stderr


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
