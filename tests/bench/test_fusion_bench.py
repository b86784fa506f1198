"""Our form of other people's methods against fusion-bench's own code, on random tensors: ``make test-all`` alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from cases import checkpoints, distance
from safetensors.torch import load_file, save_file

from r2m_kernels import MergeConfig, merge

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SHAPES = {"wide": (40, 67), "tall": (90, 36), "square": (48, 48), "bias": (67,), "norm": (9,)}
SCALE, DENSITY, COUNT = 0.7, 0.3, 3
METHODS = {
    "tsv_m": MergeConfig.tsv_m(SCALE).replace(svd="exact"),
    "iso_c": MergeConfig.iso_c(SCALE),
    "ties": MergeConfig.ties(DENSITY, SCALE),
    "sum": MergeConfig.task_arithmetic(SCALE),
    "mean": MergeConfig.weight_average(),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Base, experts, and what fusion-bench makes of them by method."""
    assert PYTHON.exists(), "fusion-bench is not installed: make bench-peers"
    directory = tmp_path_factory.mktemp("fusion_bench")
    base, experts = checkpoints(COUNT, dtype=torch.float64, shapes=SHAPES, seed=5, scales=[1.0, 1.4, 0.8])
    states = [{name: state[name] for name in SHAPES} for state in (base, *experts)]
    save_file(states[0], directory / "base.safetensors")
    for index, expert in enumerate(states[1:]):
        save_file(expert, directory / f"expert{index}.safetensors")
    script = Path(__file__).with_name("fusion_bench_merges.py")
    command = [PYTHON, script, directory, str(SCALE), str(DENSITY)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    made = {name: load_file(directory / f"{name}.safetensors") for name in (*METHODS, "dare")}
    return states[0], states[1:], made


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_ours_is_fusion_benchs(theirs, name):
    base, experts, made = theirs
    # In float64 on both sides: in float32 their polar factors, of nearly dependent vectors, are off by 5e-5.
    assert distance(merge(base, experts, METHODS[name]), made[name]) <= 1e-7 * distance(base, made[name])


@pytest.mark.slow
def test_dare_drops_as_fusion_bench_does(theirs):
    """Random masks differ: the values an element can take are the same, and so are their shares."""
    base, experts, made = theirs
    ours = merge(base, experts, MergeConfig.dare(DENSITY, SCALE))
    names = list(SHAPES)
    taus = torch.stack([torch.cat([(expert[name] - base[name]).flatten() for name in names]) for expert in experts])
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * COUNT)
    possible = SCALE / DENSITY * masks @ taus
    for result in (ours, made["dare"]):
        found = torch.cat([(result[name] - base[name]).flatten() for name in names])
        apart = (possible - found).abs()
        assert float(apart.min(dim=0).values.max()) < 1e-6
        kept = float(masks[apart.argmin(dim=0)].mean())
        elements = taus.numel()
        assert abs(kept - DENSITY) < 4 * (DENSITY * (1 - DENSITY) / elements) ** 0.5
