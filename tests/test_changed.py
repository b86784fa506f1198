"""``make test-changed`` runs what a change can touch, and more in doubt."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("changed", Path(__file__).with_name("changed.py"))
assert SPEC is not None
assert SPEC.loader is not None
changed = importlib.util.module_from_spec(SPEC)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    import sys

    sys.modules["changed"] = changed  # dataclasses look their module up
    SPEC.loader.exec_module(changed)
    yield
    del sys.modules["changed"]


@pytest.mark.parametrize("name", ["Makefile", "requirements.txt", "tests/conftest.py", ".ci/run"])
def test_build_files_run_everything(name):
    assert changed.select([name]).commands() == [["make", "test"], ["make", "test-all"]]


@pytest.mark.parametrize(
    ("name", "goals", "slow"),
    [
        ("r2m_kernels/_triton/combine.py", {"kernels", "gpu-rehearsal"}, "tests/kernels/test_triton_kernels.py"),
        ("csrc/kernels.h", {"sanitize"}, "tests/kernels/test_native.py"),
        ("python/r2m/demo/faces.py", set(), "tests/bench/test_quality.py"),
        ("python/r2m/checkpoints/reader.py", {"zoo"}, "tests/r2m/test_zoo.py"),
        ("python/r2m/arrangement.py", {"zoo"}, "tests/r2m/test_zoo.py"),
    ],
)
def test_kinds_of_files_bring_their_checks(name, goals, slow):
    selection = changed.select([name])
    assert selection.goals == goals
    assert slow in selection.slow
    assert selection.commands()[0] == ["make", *sorted({"check", *goals})]


def test_a_test_runs_where_what_it_imports_has_changed():
    tests = changed.select(["r2m_kernels/truncation.py"]).tests
    assert {"tests/kernels/test_truncation.py", "tests/kernels/test_golden.py", "tests/r2m/test_cli.py"} <= tests
    assert not {"tests/demo/test_samples.py", "tests/kernels/test_spill.py"} & tests


def test_backends_that_are_loaded_by_name_count():
    assert "tests/kernels/test_golden.py" in changed.select(["r2m_kernels/_torch/truncate.py"]).tests


def test_helpers_of_tests_count_and_other_files_do_not():
    assert "tests/kernels/test_golden.py" in changed.select(["tests/kernels/cases.py"]).tests
    # Through a helper that starts the command.
    assert "tests/demo/test_faces.py" in changed.select(["r2m_kernels/truncation.py"]).tests
    assert changed.select(["tests/r2m/test_naming.py"]).tests == {"tests/r2m/test_naming.py"}
    assert changed.select(["LICENSE"]).tests == set()
    assert changed.select([]).commands() == [["make", "check"]]
