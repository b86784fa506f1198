"""Our form of other people's methods against fusion-bench's and mergekit's own code, on random tensors.

``make test-all`` alone runs it. SCORE, MonoSoup, LARV, ResMerge, DC-Merge, CART and STAR are in neither.
"""

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
SHAPES = {"wide": (40, 67), "tall": (90, 36), "square": (48, 48), "even": (90, 12), "bias": (67,), "norm": (9,)}
SCALE, DENSITY, COUNT = 0.7, 0.3, 3
METHODS = {
    "tsv_m": MergeConfig.tsv_m(SCALE).replace(svd="exact"),
    "iso_c": MergeConfig.iso_c(SCALE),
    "ties": MergeConfig.ties(DENSITY, SCALE),
    "sum": MergeConfig.task_arithmetic(SCALE),
    "mean": MergeConfig.weight_average(),
}


def made_by(script, directory, shapes, names):
    """Base, experts, and what a script of theirs makes of them by method."""
    assert PYTHON.exists(), "fusion-bench and mergekit are not installed: make bench-peers"
    base, experts = checkpoints(COUNT, dtype=torch.float64, shapes=shapes, seed=5, scales=[1.0, 1.4, 0.8])
    states = [{name: state[name] for name in shapes} for state in (base, *experts)]
    if "even" in shapes:  # task vectors whose singular values are within a factor of three: descent ends soon
        noise = torch.randn(COUNT, *shapes["even"], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for expert, change in zip(states[1:], noise, strict=True):
            expert["even"] = states[0]["even"] + 0.03 * change
    save_file(states[0], directory / "base.safetensors")
    for index, expert in enumerate(states[1:]):
        save_file(expert, directory / f"expert{index}.safetensors")
    command = [PYTHON, Path(__file__).with_name(script), directory, str(SCALE), str(DENSITY)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return states[0], states[1:], {name: load_file(directory / f"{name}.safetensors") for name in names}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fusion_bench")
    return made_by("fusion_bench_merges.py", directory, SHAPES, (*METHODS, "dare", "wudi"))


@pytest.fixture(scope="module")
def mergekits(tmp_path_factory):
    """Of one tensor: mergekit's TIES trims each by itself, where ours, the paper's and fusion-bench's trims all."""
    names = ("mean", "sum", "ties")
    return made_by("mergekit_merges.py", tmp_path_factory.mktemp("mergekit"), {"wide": SHAPES["wide"]}, names)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_ours_is_fusion_benchs(theirs, name):
    base, experts, made = theirs
    # In float64 on both sides: in float32 their polar factors, of nearly dependent vectors, are off by 5e-5.
    assert distance(merge(base, experts, METHODS[name]), made[name]) <= 1e-7 * distance(base, made[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "sum", "ties"])
def test_ours_is_mergekits(mergekits, name):
    base, experts, made = mergekits
    apart = (merge(base, experts, METHODS[name])["wide"] - made[name]["wide"]).abs()
    # At the border of what TIES keeps the authors' code, fusion-bench's and ours have an element more of each expert.
    assert int((apart > 1e-12).sum()) <= (COUNT if name == "ties" else 0)


@pytest.mark.slow
def test_swudi_goes_where_fusion_benchs_wudi_goes(theirs):
    """WUDI descends the same loss by Adam, from the sum: late both are at its minimum, which has no start."""
    base, experts, made = theirs
    ours, name = merge(base, experts, MergeConfig.swudi(500)), "even"
    total = torch.stack([expert[name] - base[name] for expert in experts]).sum(0)
    change = made["wudi"][name] - base[name]
    assert float((ours[name] - base[name] - change).norm()) < 0.01 * float((total - change).norm())


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
