"""``--format adapters``: one model and an adapter of each expert, as files that PEFT and r2m read."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from faults import SCRIPT
from forked import Child
from libraries import with_libraries
from r2m.adapted import nbytes
from r2m.checkpoints import adapters
from r2m.checkpoints.adapter_layout import carrying_biases, changed_layers, layers, layout
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.view import View
from r2m.job import open_job
from r2m.recipe import Recipe
from r2m.recipe_file import read_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2m_kernels.streaming import TensorSpec

if TYPE_CHECKING:
    from conftest import Result

Command = Callable[..., "Result"]
NAMES = ("fs", "fr", "efs")
MODEL, WEIGHTS, CONFIG, REPORT = (
    "model.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "r2m_report.json",
)
SHAPES = {
    "pos_embed": (1, 4, 40),
    "tokens_embed.weight": (30, 40),
    "attn.qkv.weight": (120, 40),
    "attn.qkv.bias": (120,),
    "attn.proj.weight": (40, 40),
    "attn.proj.bias": (40,),
    "depthwise.weight": (40, 1, 3, 3),
    "conv.weight": (48, 20, 3, 3),
    "conv.bias": (48,),
    "norm.weight": (40,),
    "norm.running_var": (40,),
    "head.weight": (2, 40),
    "head.bias": (2,),
}
FROZEN = "attn.proj.weight"
LAYER = ("attention.attention.query", "output.dense")  # of what transformers' ViT has, by its files' names
EXPERTS = [word for name in NAMES for word in ("--expert", f"{name}={name}.safetensors")]
MERGE = ["merge", "--base", "base.safetensors", *EXPERTS, "--quiet", "--format", "adapters"]


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """Three specialists whose matrices have moved by two columns each, but for a frozen one."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file({**base, "norm.num_batches_tracked": torch.tensor(7)}, "base.safetensors")
    found = {}
    for name in NAMES:
        found[name] = {}
        for key, tensor in base.items():
            n = tensor.numel() // tensor.shape[0]
            change = torch.randn(tensor.shape[0], 2, generator=generator) @ torch.randn(2, n, generator=generator)
            found[name][key] = tensor if key == FROZEN else tensor + 0.05 * change.view(tensor.shape)
        save_file({**found[name], "norm.num_batches_tracked": torch.tensor(9)}, f"{name}.safetensors")
    return found


def with_adapter(out: str, name: str) -> View:
    """What our own reader makes of a model and an adapter on it, as a merge would."""
    adapter = open_checkpoint(Path(out, "adapters", name), name, adapters=True)
    return adapters.onto(View.of(open_checkpoint(out, "model")), adapters.changes(adapter))


def everything(out: str) -> dict[str, bytes]:
    """But for the report, which has times."""
    files = (path for path in Path(out).rglob("*") if path.is_file() and path.name != REPORT)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def test_a_model_with_one_adapter_is_its_specialist(states: dict[str, dict[str, Tensor]], command: Command) -> None:
    assert command(*MERGE, "--rank", "6", "--svd", "exact", "--out", "m").code == 0
    about = json.loads(Path("m", REPORT).read_text())["adapters"]
    assert (about["kind"], about["averaged"]) == ("ensemble", ["pos_embed"])
    assert about["ranks"] == {"attn.qkv.weight": 6, "conv.weight": 6}
    # The frozen layer has a bias that moved; the depthwise one has no factors, and the embedding has others.
    assert about["saved"] == ["attn.proj", "depthwise", "head", "norm", "tokens_embed"]
    mean = load_file(Path("m", MODEL))
    for name, state in states.items():
        found = with_adapter("m", name)
        assert found.specs.keys() == mean.keys()
        for key, own in state.items():
            expected = mean[key] if key in about["averaged"] else own
            exact = key in about["averaged"] or key.rpartition(".")[0] in about["saved"]
            bound = 0.0 if exact else 4 * 2**-23 * (own.abs() + mean[key].abs()) + 1e-6 * (own - mean[key]).abs().max()
            assert bool(((found.read(key) - expected).abs() <= bound).all()), (name, key)
        config = json.loads(Path("m", "adapters", name, CONFIG).read_text())
        assert (config["r"], config["lora_alpha"], config["lora_bias"]) == (6, 6, True)
        assert config["target_modules"] == ["attn.qkv", "conv"]
        assert config["modules_to_save"] == about["saved"]
        assert config["base_model_name_or_path"] == "m"
    assert torch.equal(mean["norm.num_batches_tracked"], torch.tensor(7))
    card = Path("m", "adapters", "fs", "README.md").read_text()
    assert "base_model: m\nbase_model_relation: adapter\n" in card
    assert "the mean of the detectors in the model: pos_embed." in card
    assert "In no adapter, and the mean: pos_embed." in Path("m", "README.md").read_text()


def test_a_heavier_specialist_is_itself_all_the_same(states: dict[str, dict[str, Tensor]], command: Command) -> None:
    Path("r.yaml").write_text(
        "base_model: base.safetensors\nformat: adapters\nparameters: {rank: 6, svd: exact}\nmodels:\n"
        "- {model: fs.safetensors, weight: 3}\n- {model: fr.safetensors}\n- {model: efs.safetensors}\n"
    )
    assert command("merge", "r.yaml", "--out", "m", "--quiet").code == 0
    assert read_recipe("m/r2m_config.yaml").method == "cart"
    mean, own = load_file(Path("m", MODEL))["conv.weight"], states["fs"]["conv.weight"]
    found = with_adapter("m", "fs.safetensors").read("conv.weight")
    assert bool(((found - own).abs() <= 4 * 2**-23 * (own.abs() + mean.abs()) + 1e-6 * (own - mean).abs().max()).all())


def test_both_projections_of_pytorchs_attention(states: object, command: Command) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"attn.in_proj_weight": (120, 40), "attn.in_proj_bias": (120,), "attn.out_proj.weight": (40, 40)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(base, "base.safetensors")
    for name in NAMES:
        # Of three changes of eight columns nothing is left out at rank 24 of 40.
        change = {key: torch.randn(len(one), 8) @ torch.randn(8, 40) for key, one in base.items() if one.ndim > 1}
        save_file(
            {key: one + 0.05 * change.get(key, torch.ones(1)) for key, one in base.items()}, f"{name}.safetensors"
        )
    ranks = ["--rank", "26", "--rank-of", "attn.out_proj.weight=24"]
    assert command(*MERGE, *ranks, "--svd", "exact", "--out", "m").code == 0
    about = json.loads(Path("m", REPORT).read_text())["adapters"]
    assert (about["saved"], about["averaged"]) == ([], ["attn.in_proj_bias"])
    mean = load_file(Path("m", MODEL))
    for name in NAMES:
        found, own = with_adapter("m", name), load_file(f"{name}.safetensors")
        for key in about["ranks"]:
            bound = 4 * 2**-23 * (own[key].abs() + mean[key].abs()) + 1e-6 * (own[key] - mean[key]).abs().max()
            assert bool(((found.read(key) - own[key]).abs() <= bound).all())
    stored = load_file(Path("m", "adapters", "fs", WEIGHTS))
    assert stored["base_model.model.attn.base_layer.out_proj.lora_A.weight"].shape == (26, 40)  # one rank for both
    assert json.loads(Path("m", "adapters", "fs", CONFIG).read_text())["target_modules"] == ["attn"]
    refused = command(*MERGE, "--rank", "4", "--rank-of", "attn.out_proj.weight=1.0", "--out", "n")
    assert "'attn.in_proj_weight' is truncated, and that of the other projection" in refused.err


def test_a_core_with_all_adapters_is_the_merge(states: dict[str, dict[str, Tensor]], command: Command) -> None:
    plain = [*MERGE[:-2], "--method", "r2m", "--rank", "4", "--row-power", "2"]
    whole = ["--rank-of", "depthwise.weight=1.0", "--rank-of", "tokens_embed.weight=1.0", "--rank-of", "pos_embed=1.0"]
    assert command(*plain, *whole, "--out", "merged").code == 0
    assert command(*plain, "--format", "adapters", "--adapters", "merge", "--out", "m").code == 0
    merged, model = load_file(Path("merged", MODEL)), load_file(Path("m", MODEL))
    about = json.loads(Path("m", REPORT).read_text())["adapters"]
    assert (about["kind"], about["saved"], about["averaged"]) == ("merge", [], [])
    views = [with_adapter("m", name) for name in NAMES]
    base = load_file("base.safetensors")
    for key, expected in merged.items():
        found = model[key].double() + sum(view.read(key).double() - model[key].double() for view in views)
        # Each view is a sum that was rounded, and so is the merge.
        bound = 4 * 2**-23 * (expected.abs() + model[key].abs()) + 1e-6 * (expected - base[key]).abs().max()
        assert bool(((found - expected).abs() <= bound).all()), key
    assert all(torch.equal(model[key], merged[key]) for key in merged.keys() - about["ranks"].keys())


@pytest.mark.parametrize("method", ["r2m", "weight_average"])
def test_a_merge_of_adapters_is_one_on_their_base(
    method: str, states: dict[str, dict[str, Tensor]], command: Command
) -> None:
    assert command(*MERGE, "--rank", "2", "--out", "m").code == 0  # whose adapters on their mean are merged here
    experts = [word for name in NAMES for word in ("--expert", f"{name}=m/adapters/{name}")]
    rank = ["--rank", "3"] if method == "r2m" else []
    one = ["merge", "--base", "m", *experts, "--quiet", "--method", method, *rank, "--format", "adapters", "--adapters"]
    assert command(*one, "one", "--out", "n").code == 0
    assert command(*one[:-3], "--out", "plain").code == 0
    assert Path("n", MODEL).read_bytes() == Path("plain", MODEL).read_bytes()
    merged, base = load_file(Path("n", MODEL)), load_file(Path("m", MODEL))
    about = json.loads(Path("n", REPORT).read_text())["adapters"]
    assert (about["kind"], about["ranks"]) == ("one", {"attn.qkv.weight": 6, "conv.weight": 6})
    assert about["averaged"] == []
    adapter = open_checkpoint("n/adapters/merged", "merged", adapters=True)
    found = adapters.onto(View.of(open_checkpoint("m", "base")), adapters.changes(adapter))
    for key, expected in merged.items():
        update = (expected.double() - base[key].double()).abs().max()
        bound = 4 * 2**-23 * (expected.abs() + base[key].abs()) + 1e-6 * update
        assert bool(((found.read(key) - expected).abs() <= bound).all()), key
    assert json.loads(Path("n", "adapters", "merged", CONFIG).read_text())["base_model_name_or_path"] == "m"
    # Of a rank that is asked for, the best.
    assert command(*one, "one", "--adapter-rank", "3", "--out", "three").code == 0
    adapter = open_checkpoint("three/adapters/merged", "merged", adapters=True)
    found = adapters.onto(View.of(open_checkpoint("m", "base")), adapters.changes(adapter))
    for key in about["ranks"]:
        update = (merged[key].double() - base[key].double()).flatten(1)
        left = float((found.read(key).double() - merged[key].double()).norm())
        assert left <= 1.001 * float(torch.linalg.svdvals(update)[3:].norm())
        assert left > 1e-3


def test_columns_go_where_they_count_in_an_adapter_of_a_size(
    states: dict[str, dict[str, Tensor]], command: Command
) -> None:
    def held(out: str, name: str) -> int:
        return sum(tensor.numel() for tensor in load_file(Path(out, "adapters", name, WEIGHTS)).values())

    # One matrix has moved by more: its columns come first.
    for name, state in states.items():
        state["attn.qkv.weight"] = state["attn.qkv.weight"] + 0.3 * torch.randn(120, 40)
        save_file({**state, "norm.num_batches_tracked": torch.tensor(9)}, f"{name}.safetensors")
    assert command(*MERGE, "--rank", "16", "--svd", "exact", "--out", "whole").code == 0
    numbers = sum(tensor.numel() for tensor in load_file(Path("whole", MODEL)).values())
    # As if the convolution had 6 columns of 48 + 180, and norms none.
    target = held("whole", "fs") - 10 * 228 - 40 - 40 - 1
    size = (target + 0.5) / numbers
    assert command(*MERGE, "--rank", "16", "--svd", "exact", "--adapter-size", str(size), "--out", "m").code == 0
    about = json.loads(Path("m", REPORT).read_text())["adapters"]
    assert about["ranks"] == {"attn.qkv.weight": 16, "conv.weight": 6}
    assert {held("m", name) for name in NAMES} == {about["numbers"]} == {target}
    assert {"norm.weight", "norm.running_var"} <= {*about["averaged"]}
    assert about["saved"] == ["attn.proj", "depthwise", "head", "tokens_embed"]
    sized, model = (load_file(Path(out, MODEL)) for out in ("m", "whole"))
    assert all(torch.equal(sized[name], tensor) for name, tensor in model.items())
    config = json.loads(Path("m", "adapters", "fs", CONFIG).read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {6, 16}
    # Three changes of two columns: what each has beyond their mean has six.
    for name, state in states.items():
        found, own = with_adapter("m", name).read("conv.weight"), state["conv.weight"]
        assert float((found - own).norm()) <= 1e-5 * float(own.norm())
    # Where all has room nothing is cut, and norms are saved as without a size.
    assert command(*MERGE, "--rank", "16", "--svd", "exact", "--adapter-size", "1", "--out", "room").code == 0
    assert held("room", "fs") == held("whole", "fs")
    assert "norm" in json.loads(Path("room", REPORT).read_text())["adapters"]["saved"]
    # A column of each stays in any case. Plan knows it all but for the frozen layer, see below.
    assert command(*MERGE, "--adapter-size", "0.001", "--out", "small").code == 0
    assert set(json.loads(Path("small", REPORT).read_text())["adapters"]["ranks"].values()) == {1}
    for out, words, frozen in (("m", {"rank": 16}, 0), ("small", {}, 3 * 4 * (80 - 40 * 40))):
        words |= {"adapter_size": size if out == "m" else 0.001}
        job = open_job(
            Recipe.from_options({"base": "base.safetensors", "expert": EXPERTS[1::2], "format": "adapters", **words})
        )
        stored = [tensor for name in NAMES for tensor in load_file(Path(out, "adapters", name, WEIGHTS)).values()]
        told = nbytes(job.arranged, job.recipe.adapters, job.recipe.adapter_size)
        assert abs(told - frozen - sum(tensor.nbytes for tensor in stored)) <= 3 * 8  # a counter has eight bytes
    assert read_recipe("m/r2m_config.yaml").adapter_size == size
    # What is cut has half of the length that it lost back, in powers.
    few = ["--adapter-size", str(size - 8 * 160 / numbers), "--out"]
    assert command(*MERGE, "--rank", "16", "--svd", "exact", *few, "few").code == 0
    ranks = json.loads(Path("few", REPORT).read_text())["adapters"]["ranks"]
    assert ranks == {"attn.qkv.weight": 15, "conv.weight": 1}
    mean = {name: tensor.double() for name, tensor in load_file(Path("few", MODEL)).items()}
    for name, state in states.items():
        view = with_adapter("few", name)
        for key, rank in ranks.items():
            found, before = view.read(key).double() - mean[key], state[key].double() - mean[key]
            values = torch.linalg.svdvals(before.flatten(1))
            kept, length = float(values[:rank].norm()), float(values.norm())
            assert float(found.norm()) == pytest.approx((kept * length) ** 0.5, rel=1e-5)
            assert float((found * before).sum() / found.norm()) == pytest.approx(kept, rel=1e-5)


def test_adapters_on_a_model_of_transformers_have_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    layer = "vit.encoder.layer.0"
    base = {f"{layer}.{name}.weight": torch.randn(24, 20) for name in LAYER}
    base |= {f"{layer}.layernorm_after.{name}": torch.randn(20) for name in ("weight", "bias")}
    for name in ("base", "fs", "fr"):
        Path(name).mkdir()
        moved = {key: tensor + 0.1 * torch.randn(tensor.shape) for key, tensor in base.items()}
        save_file(base if name == "base" else moved, Path(name, MODEL))
    words = ["merge", "--base", "base", "--expert", "fs", "--expert", "fr", "--format", "adapters", "--quiet"]
    for kind, names in (("vit", ("vit.layers.0", "attention.q_proj", "mlp.fc2")), ("other", (layer, *LAYER))):
        Path("base", "config.json").write_text(json.dumps({"model_type": kind}))
        assert command(*words, "--rank", "19", "--out", kind).code == 0
        adapter = Path(kind, "adapters", "fs")
        start, *layers = names
        found = json.loads((adapter / CONFIG).read_text())
        assert found["target_modules"] == [f"{start}.{one}" for one in layers]
        assert found["modules_to_save"] == [f"{start}.layernorm_after"]
        factors = {f"{start}.{one}.lora_{side}.weight" for one in layers for side in "AB"}
        norm = {f"{start}.layernorm_after.{end}" for end in ("weight", "bias")}
        assert load_file(adapter / WEIGHTS).keys() == {f"base_model.model.{one}" for one in factors | norm}
        view, own = with_adapter(kind, "fs"), load_file(Path("fs", MODEL))
        assert all(torch.allclose(view.read(key), own[key], atol=0.05) for key in base)
        assert torch.equal(view.read(f"{layer}.layernorm_after.bias"), own[f"{layer}.layernorm_after.bias"])


def test_what_is_cut_is_no_longer_than_it_was_where_experts_are_nearly_the_same(
    states: dict[str, dict[str, Tensor]], command: Command
) -> None:
    base, shared = load_file("base.safetensors"), torch.randn(48, 20, 3, 3)
    for name, state in states.items():
        state["conv.weight"] = base["conv.weight"] + 3 * shared + 1e-4 * torch.randn(48, 20, 3, 3)
        save_file(state, f"{name}.safetensors")
    assert command(*MERGE, "--adapter-size", "0.01", "--out", "m").code == 0
    mean = load_file(Path("m", MODEL))["conv.weight"].double()
    for name, state in states.items():
        values = torch.linalg.svdvals((state["conv.weight"].double() - mean).flatten(1))
        found = float((with_adapter("m", name).read("conv.weight").double() - mean).norm())
        assert found == pytest.approx(float(values[0] * values.norm()) ** 0.5, rel=0.1)


@pytest.mark.slow
def test_a_kill_anywhere_leaves_nothing_half_written(
    states: dict[str, dict[str, Tensor]], command: Command, start: Callable[..., Child]
) -> None:
    words = [*MERGE, "--out"]

    def met(at: int, what: str) -> tuple[int, str]:
        with start(str(at), what, *words, "out", script=SCRIPT) as child:
            out, err = child.communicate(timeout=60)
        return child.returncode, out if what == "count" else err

    code, out = met(0, "count")
    assert code == 0
    whole, calls = everything("out"), int(out.split()[-1])
    assert len(whole) == 5 - 1 + 3 * 3
    for at, what in ((calls - 31, "kill"), (calls - 20, "ENOSPC"), (calls - 12, "kill"), (calls - 4, "kill")):
        shutil.rmtree("out", ignore_errors=True)
        shutil.rmtree("out.partial", ignore_errors=True)
        code, err = met(at, what)
        assert code == (-signal.SIGKILL if what == "kill" else 1), err
        assert not Path("out").exists() or everything("out") == whole
        assert command(*words, "out", "--resume").code == 0
        assert everything("out") == whole
        assert not Path("out.partial").exists()


def test_an_output_is_gone_on_with(states: dict[str, dict[str, Tensor]], command: Command) -> None:
    assert command(*MERGE[:-5], "--quiet", "--format", "adapters", "--out", "m").code == 0  # of two
    assert command("add", "m", "--expert", "efs=efs.safetensors", "--quiet").code == 0
    assert command(*MERGE, "--out", "scratch").code == 0
    assert everything("m").keys() == everything("scratch").keys()
    assert {path: text for path, text in everything("m").items() if "adapter_model" in path} == {
        path: text for path, text in everything("scratch").items() if "adapter_model" in path
    }
    assert command("sweep", "m", "--rank", "2,4", "--to", "swept", "--quiet").code == 0
    assert json.loads(Path("swept", "rank=2", "adapters", "fr", CONFIG).read_text())["r"] == 2
    assert command(*MERGE, "--out", "m", "--overwrite").code == 0
    Path("m", "adapters", "fs", "mine.txt").write_text("mine")
    assert "holds 'adapters', which no merge wrote" in command(*MERGE, "--out", "m", "--overwrite").err
    Path("m", "adapters", "fs", "mine.txt").unlink()
    Path("m", "adapters", "fs", "README.md").write_text("mine")
    assert "holds 'adapters/fs/README.md', which was changed" in command(*MERGE, "--out", "m", "--overwrite").err


def test_plan_counts_adapters(states: dict[str, dict[str, Tensor]], command: Command) -> None:
    assert command(*MERGE, "--out", "m").code == 0
    written = [load_file(path) for path in Path("m", "adapters").glob(f"*/{WEIGHTS}")]
    job = open_job(Recipe.from_options({"base": "base.safetensors", "expert": EXPERTS[1::2], "format": "adapters"}))
    told = nbytes(job.arranged, job.recipe.adapters)
    # That one layer is frozen no header says.
    frozen = 3 * 4 * 2 * (40 + 40) - 3 * 4 * 40 * 40
    assert told - frozen == sum(tensor.nbytes for one in written for tensor in one.values())
    assert command("plan", *MERGE[1:5], "--expert", "fr.safetensors", "--format", "adapters", "--out", "n").code == 0


REFUSED = {
    "another method": (
        ["--method", "r2m"],
        "adapters: an ensemble is the mean and what each expert has beyond it, the",
    ),
    "another format": (["--format", "pth", "--adapters", "merge"], "adapters: merge is for --format adapters, got pth"),
    "nothing truncated": (["--rank", "1.0"], "adapters: with this method and these options no residual of a layer is"),
    "no residuals": (["--adapters", "merge", "--method", "ties"], "adapters: with this method and these options no"),
    "mapped": (["--adapters", "merge", "--method", "tsv_m"], "adapters: with this method and these options no"),
    "a size": (
        ["--adapters", "merge", "--adapter-size", "0.1", "--method", "r2m"],
        "adapter_size: is for --format adapters with --adapters ensemble or one, got merge",
    ),
    "no share": (["--adapter-size", "30"], "adapter_size: expected a number in (0, 1], got 30"),
    "a rank": (["--adapter-rank", "3"], "adapter_rank: is for --adapters one, got ensemble"),
    "whole checkpoints": (
        ["--adapters", "one"],
        "adapters: one is of adapters alone; expert 'fs' is a whole",
    ),
    "a name": (["--expert", "a/b=fs.safetensors"], "adapters: expert 'a/b': expected a name that a directory can have"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_taken_apart_is_one_sentence(
    kind: str, states: dict[str, dict[str, Tensor]], command: Command
) -> None:
    words, sentence = REFUSED[kind]
    result = command(*MERGE, *words, "--out", "m")
    assert result.code == 2
    assert result.err.startswith(f"Error: {sentence}")
    assert result.err.count("\n") == 1
    assert not Path("m").exists()
    assert not Path("m.partial").exists()


def specs(**shapes: tuple[int, ...]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}


def test_which_layers_have_factors() -> None:
    shapes = {
        "patch.weight": (64, 3, 4, 4),
        "wte.weight": (99, 64),
        "depthwise.weight": (64, 1, 3, 3),
        "grouped.weight": (256, 8, 3, 3),
        "squeezed.weight": (256, 8, 1, 1),
        "plain.weight": (64, 64),
        "table": (9, 64),
        "attn.in_proj_weight": (192, 64),
        "attn.out_proj.weight": (64, 64),
        "other.in_proj_weight": (192, 64),
        "other.out_proj.weight": (64, 64),
    }
    matrices = [name for name in shapes if name != "other.out_proj.weight"]
    found = layers(specs(**shapes), matrices)
    assert list(found) == ["patch", "squeezed", "plain", "attn", "attn.out_proj"]
    assert changed_layers(specs(**shapes), found, {"attn.in_proj_weight"}).keys() == {"attn", "attn.out_proj"}


def test_an_adapter_has_all_biases_or_none() -> None:
    few = specs(**{"a.weight": (40, 40), "a.bias": (40,), "b.weight": (4, 4)})
    many = few | specs(**{"b.weight": (40, 40)})
    targets = {"a": "a.weight", "b": "b.weight"}
    assert carrying_biases(few, targets) == {"a": "a.weight"}
    assert carrying_biases(many, targets) == targets
    assert not layout(many, targets, ["a.bias"]).biased
    assert layout(many, targets, ["a.bias"]).averaged == ("a.bias",)
    assert layout(few, {"a": "a.weight"}, ["a.bias", "b.weight"]).saved == {"b": ("b.weight",)}


def test_peft_saves_whole_what_is_called_alike() -> None:
    names = [
        "cls",
        "norm.weight",
        "block.norm.weight",
        "head.fc.weight",
        "fc.weight",
        "tower.pos",
        "tower.patch.weight",
    ]
    names += ["x.fc.weight", "a.b.weight", "a.c"]
    found = layout(
        specs(**dict.fromkeys(names, (8, 8))), {"x.fc": "x.fc.weight"}, ["norm.weight", "fc.weight", "tower.pos"]
    )
    # With norm PEFT takes block.norm, too. With fc it would take the adapted x.fc, and so fc stays the mean.
    assert found.saved == {
        "block.norm": ("block.norm.weight",),
        "norm": ("norm.weight",),
        "tower": ("tower.pos", "tower.patch.weight"),
    }
    assert found.averaged == ("fc.weight",)
    found = layout(specs(**dict.fromkeys(names, (8, 8))), {"a.b": "a.b.weight"}, ["cls", "a.c"])
    assert (found.saved, found.averaged) == ({}, ("cls", "a.c"))


@pytest.mark.slow
def test_peft_loads_what_is_written(tmp_path: Path) -> None:
    models = with_libraries("zoo_adapters.py", "apart", tmp_path)
    assert models["clip_tower"]["sizes"] > 1  # layers of other ranks in one adapter
    for name, found in models.items():
        assert found["beyond"] <= 1, name  # of 4 ulp of float32 and a millionth of the update
        assert found["forward"] <= 1e-5, name
        assert len(found["ranks"]) >= 9, name
