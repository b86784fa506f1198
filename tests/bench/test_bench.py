"""The CPU benchmark: it finds wrong results, bars mean what they say, and the README's table is the committed one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, compare, default, files, plot, rivals, run
from bench.run import TRUNCATED
from r2m_kernels import merge

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_committed_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.compare", "--check"])
    assert compare.main() == 0


def test_a_new_timed_row_is_shown_under_its_key():
    cpu, gpu = (json.loads((compare.RESULTS / f"{name}.json").read_text()) for name in ("cpu", "gpu_merges"))
    cpu["blocks"]["timed"]["another"], cpu["blocks"]["over_ours"]["another"] = {"median": 1.0}, 1.3
    assert "| another | 1.30 | 1.00 |  |" in compare.section(cpu, gpu)


def test_the_committed_results_name_machine_versions_and_commit():
    machine = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["machine"]
    assert {"cpu", "cores", "python", "torch", "r2m_kernels", "backend", "commit", "date"} <= machine.keys()
    assert len(machine["commit"].partition("+")[0]) == 40


@pytest.mark.parametrize(
    ("value", "bound", "met"),
    [
        (1.0, {"most": 1.0}, True),
        (1.001, {"most": 1.0}, False),
        (math.nan, {"most": 1.0}, False),
        (4.0, {"least": 4}, True),
        (3.99, {"least": 4}, False),
    ],
)
def test_a_bar_is_met_or_missed(value, bound, met):
    result = run.Result()
    result.bar("x", value, **bound)
    assert result.bars[0]["met"] is met


def test_a_wrong_result_is_noted():
    result = run.Result()
    assert result.right("a", 1.0, 1.0)
    assert not result.right("b", math.nan, 1.0)
    assert not result.right("c", 1.1, 1.0)
    assert [text[0] for text in result.wrong] == ["b", "c"]


@pytest.fixture
def small(monkeypatch):
    """The shapes of a block, small; beyond 64, below which truncations are exact."""
    shapes = {"attention.q": (96, 96), "mlp.up": (160, 96), "mlp.down": (96, 160)}
    monkeypatch.setattr(cases, "BLOCK", shapes)


def test_the_plain_merge_is_the_merge_that_is_measured(small):
    base, experts = cases.checkpoints(1, 3)
    plain = rivals.plain_merge(base, experts, rivals.full_svd)
    assert run.furthest(merge(base, experts, TRUNCATED, svd="exact"), plain) < 1e-5
    result = run.Result()
    assert run.same_merge(result, merge(base, experts, TRUNCATED), plain, base)
    twice = {name: base[name] + 2 * (tensor - base[name]) for name, tensor in plain.items()}
    assert not run.same_merge(result, twice, plain, base)


@pytest.mark.parametrize("section", [run.blocks, run.operators])
def test_a_section_runs_and_holds_its_bars(small, monkeypatch, section):
    monkeypatch.setattr(cases, "WIDTH", 96)
    result = section(1)
    assert result.wrong == []
    assert result.bars
    assert all(row["median"] > 0 for row in result.content["timed"].values())


@pytest.mark.parametrize("section", [default.passes, default.truncation, default.spectra, default.scaling])
def test_what_is_timed_in_pairs_is_right_first(small, section):
    result = section(1)
    assert result.wrong == []
    assert result.bars
    assert all(row["value"] > 0 for row in result.bars)


def test_a_pair_is_timed_in_turns_and_its_quotients_median_is_held(monkeypatch):
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(default.time, "perf_counter", lambda: float(next(clock)))

    def work(name, ticks):
        calls.append(name)
        for _ in range(ticks):
            next(clock)

    result = default.started()
    default.compare(result, "x", lambda: work("ours", 5), lambda: work("other", 2), 3, 2.0)
    assert calls == ["ours", "other", "ours", "other", "other", "ours", "ours", "other"]
    assert result.content["x"]["pairs"] == [(6.0, 3.0)] * 3
    assert result.bars == [{"name": "x", "value": 2.0, "at_most": 2.0, "goal": None, "met": True}]


def test_the_optimum_is_that_of_the_singular_values():
    for spectrum in cases.SPECTRA:
        x = cases.matrix(spectrum, 70, 90)
        assert x.shape == (70, 90)
        assert cases.optimum(x, 7) == pytest.approx(float(torch.linalg.svdvals(x.double())[7:].norm()), rel=1e-6)


def test_commands_are_measured_in_processes_of_their_own(tmp_path):
    # From a light process, as in the benchmark: a child's peak starts with what its parent had.
    code = """
import json, pathlib, sys
from bench.files import timed
sizes = "x = bytearray(300_000_000)", "pass"
print(json.dumps([timed([sys.executable, "-c", code], pathlib.Path(sys.argv[1])) for code in sizes]))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "log"], cwd=ROOT, capture_output=True, check=True)
    heavy, light = json.loads(done.stdout)
    assert heavy["peak_bytes"] > 300e6 > 100e6 > light["peak_bytes"]
    assert light["cpu_seconds"] > 0
    assert light["seconds"] > 0


def test_a_command_that_fails_ends_the_benchmark(tmp_path):
    with pytest.raises(SystemExit, match="status"):
        files.timed([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")


def test_plots_are_drawn_from_the_committed_results(tmp_path):
    cpu = json.loads((compare.RESULTS / "cpu.json").read_text())
    plot.error_against_time(cpu, tmp_path / "error.svg")
    plot.time_against(cpu, "experts", "experts", tmp_path / "experts.svg")
    for name, committed in (("error", "cpu_error_time"), ("experts", "cpu_time_experts")):
        drawn = (tmp_path / f"{name}.svg").read_text()
        assert drawn.startswith("<?xml")
        assert drawn.count("<path") == (compare.RESULTS / f"{committed}.svg").read_text().count("<path")
