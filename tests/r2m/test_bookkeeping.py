"""What becomes of every kind of tensor from file to file (README, "What becomes of a tensor")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from r2m.checkpoints.reader import open_checkpoint
from r2m.merge import merge_files
from r2m.options import Options
from r2m.recipe import Expert, Recipe
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from r2m_kernels import InvalidInput, MergeConfig


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(base: dict[str, Tensor], *experts: dict[str, Tensor], **recipe: Any) -> dict[str, Tensor]:
    """Merged from safetensors files to a safetensors file."""
    for name, tensors in (("base", base), *((f"e{index}", expert) for index, expert in enumerate(experts))):
        save_file(tensors, f"{name}.safetensors")
    paths = {f"e{index}": f"e{index}.safetensors" for index in range(len(experts))}
    merge_files(Recipe("base.safetensors", Expert.each(paths), **recipe), "out", Options(overwrite=True))
    return load_file("out/model.safetensors")


def with_matrix(**tensors: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(tensors))
    return {"w": torch.randn(8, 6, generator=generator), **tensors}


def moved(tensors: dict[str, Tensor], by: float, **changed: Tensor) -> dict[str, Tensor]:
    return {k: v + by * torch.ones_like(v) if k == "w" else v for k, v in tensors.items()} | changed


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_and_booleans_are_the_bases(dtype: torch.dtype) -> None:
    base = with_matrix(ids=torch.tensor([1, 0, 1]).to(dtype))
    experts = [moved(base, by, ids=torch.tensor([0, 1, 1]).to(dtype)) for by in (0.1, 0.2)]
    for options in ({}, {"dtype": "bfloat16"}):
        out = merged(base, *experts, **options)
        assert out["ids"].dtype == dtype
        assert out["ids"].equal(base["ids"])


def test_integers_may_be_absent_from_an_expert() -> None:
    base = with_matrix(position_ids=torch.arange(5))
    experts = [{k: v for k, v in moved(base, by).items() if k != "position_ids"} for by in (0.1, 0.2)]
    assert merged(base, *experts)["position_ids"].equal(torch.arange(5))


def test_batch_norm_statistics_are_the_mean_and_its_counter_the_bases() -> None:
    statistics = {
        "bn.running_mean": torch.tensor([1.0, -2.0]),
        "bn.running_var": torch.tensor([0.5, 1e-6]),
        "bn.num_batches_tracked": torch.tensor(100),
    }
    base = with_matrix(**statistics)
    experts = [
        moved(
            base,
            by,
            **{"bn.running_mean": torch.tensor([by, 3.0]), "bn.running_var": torch.tensor([by, 1e-7])},
            **{"bn.num_batches_tracked": torch.tensor(900)},
        )
        for by in (0.5, 1.5)
    ]
    for config in (MergeConfig.r2m(), MergeConfig.task_arithmetic(3.0), MergeConfig.ties()):
        out = merged(base, *experts, config=config)
        assert out["bn.running_mean"].tolist() == [1.0, 3.0]  # of the experts: nothing scales a variance below 0
        assert out["bn.running_var"].tolist() == pytest.approx([1.0, 1e-7])
        assert out["bn.num_batches_tracked"] == 100


def test_float64_is_merged_in_float64() -> None:
    tiny = 2.0**-40
    base = with_matrix(wide=torch.ones(4, 4, dtype=torch.float64))
    experts = [moved(base, by, wide=base["wide"] + by * tiny) for by in (1.0, 3.0)]
    out = merged(base, *experts, config=MergeConfig.weight_average())
    assert out["wide"].dtype == torch.float64
    assert (out["wide"] - 1).unique().tolist() == [2 * tiny]  # in float32 all of it would be 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_refused(dtype: torch.dtype) -> None:
    base = with_matrix(q=torch.ones(4, 4).to(dtype))
    with pytest.raises(InvalidInput, match=rf"unsupported dtype: 'q' \({str(dtype).removeprefix('torch.')} \[4, 4\]\)"):
        merged(base, moved(base, 0.1))
    assert not Path("out").exists()


def test_empty_tensors_are_the_bases_and_scalars_are_vectors() -> None:
    base = with_matrix(empty=torch.zeros(0, 7), scale=torch.tensor(2.0), count=torch.tensor(3))
    experts = [moved(base, by, scale=torch.tensor(2.0 + by)) for by in (1.0, 3.0)]
    out = merged(base, *experts, config=MergeConfig.weight_average())
    assert out["empty"].shape == (0, 7)
    assert out["scale"].shape == ()
    assert out["scale"] == 4.0
    assert out["count"] == 3


class Tied(nn.Module):
    """A model whose two layers are one parameter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight


def test_tied_tensors_of_torch_files_are_stored_once_and_recorded() -> None:
    models = [Tied(seed) for seed in range(3)]
    for name, model in zip(("base", "a", "b"), models, strict=True):
        torch.save(model.state_dict(), f"{name}.pth")
    paths = {"a": "a.pth", "b": "b.pth"}
    report = merge_files(Recipe("base.pth", Expert.each(paths), MergeConfig.weight_average()), "out")
    assert report["tied"] == {"head.weight": "embed.weight"}
    assert [row["name"] for row in report["tensors"]] == ["embed.weight"]
    with safe_open("out/model.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["embed.weight"]
        assert file.metadata()["head.weight"] == "embed.weight"
    assert Path("out/model.safetensors").stat().st_size < 9 * 5 * 4 * 2 + 2000
    # As the library itself loads such a file, strictly.
    model = Tied(7)
    load_model(model, "out/model.safetensors")
    mean = (models[1].embed.weight + models[2].embed.weight) / 2
    assert torch.allclose(model.head.weight, mean, atol=1e-6)
    # And it is a checkpoint with both names for the next merge.
    source = open_checkpoint("out", "merged")
    assert source.aliases == {"head.weight": "embed.weight"}
    experts = Expert.each({"merged": "out", "b": "b.pth"})
    report = merge_files(Recipe("base.pth", experts, MergeConfig.weight_average()), "again")
    assert report["tied"] == {"head.weight": "embed.weight"}


def test_tied_tensors_that_the_library_saved() -> None:
    for seed, name in enumerate(("base", "a", "b")):
        save_model(Tied(seed), f"{name}.safetensors")
    paths = {"a": "a.safetensors", "b": "b.safetensors"}
    report = merge_files(Recipe("base.safetensors", Expert.each(paths)), "out")
    assert len(report["tied"]) == 1
    load_model(Tied(7), "out/model.safetensors")


def test_shards_keep_tied_names_that_no_index_lists() -> None:
    rows = torch.randn(6, 4)
    for name in ("base", "fs"):
        state = {"embed.weight": rows + len(name), "other": torch.randn(6, 4)}
        torch.save({**state, "head.weight": state["embed.weight"]}, f"{name}.pth")
    merge_files(Recipe("base.pth", {"fs": Expert("fs.pth")}), "out", Options(max_shard_size=100))
    again = open_checkpoint("out", "out")
    assert again.aliases == {"head.weight": "embed.weight"}
    assert torch.equal(again.read("head.weight"), again.read("embed.weight"))


def test_tensors_tied_in_one_checkpoint_only_are_two() -> None:
    models = [Tied(seed) for seed in range(3)]
    models[1].head.weight = nn.Parameter(models[1].head.weight + 1)
    for name, model in zip(("base", "a", "b"), models, strict=True):
        torch.save(model.state_dict(), f"{name}.pth")
    experts = Expert.each({"a": "a.pth", "b": "b.pth"})
    report = merge_files(Recipe("base.pth", experts, MergeConfig.weight_average()), "out")
    assert report["tied"] == {}
    assert sorted(load_file("out/model.safetensors")) == ["embed.weight", "head.weight"]
