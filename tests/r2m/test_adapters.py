"""Adapters of PEFT as experts: what they fold to, by PEFT's own definition; the same bytes as of whole checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from libraries import with_libraries
from r2m.checkpoints import low_rank
from r2m.checkpoints.adapters import changes, made_for, onto
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.view import View
from r2m.commands.main import main
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2m_kernels.errors import InvalidInput

if TYPE_CHECKING:
    from conftest import Result

Command = Callable[..., "Result"]
OUTPUT, REPORT, STATE = "model.safetensors", "r2m_report.json", "r2m_state.json"
BASE = {
    "blocks.0.attn.qkv.weight": (24, 8),
    "blocks.0.attn.qkv.bias": (24,),
    "blocks.0.mlp.fc.weight": (8, 8),
    "conv.weight": (6, 4, 3, 3),
    "point.weight": (6, 4, 1, 1),
    "tokens.weight": (30, 8),
    "pool.in_proj_weight": (24, 8),
    "pool.in_proj_bias": (24,),
    "pool.out_proj.weight": (8, 8),
    "norm.running_mean": (8,),
    "head.weight": (2, 8),
    "head.bias": (2,),
}
QKV = "blocks.0.attn.qkv"


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.chdir(tmp_path)
    state = {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(BASE.items())}
    save_file({**state, "steps": torch.tensor(7)}, "base.safetensors")
    return state


def write(
    where: str, tensors: Mapping[str, Tensor], prefix: str = "base_model.model.", binary: bool = False, **config: Any
) -> dict[str, Tensor]:
    """A directory as PEFT saves it; tensors as they are."""
    Path(where).mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": None, "r": 3, "lora_alpha": 6, **config}
    Path(where, "adapter_config.json").write_text(json.dumps(content))
    stored = {prefix + name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if binary:
        torch.save(stored, Path(where, "adapter_model.bin"))
    else:
        save_file(stored, Path(where, "adapter_model.safetensors"))
    return dict(tensors)


def pair(module: str, left: tuple[int, ...], right: tuple[int, ...], seed: int = 50) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": 0.1 * numbers(*right, seed=seed),
        f"{module}.lora_B.weight": 0.1 * numbers(*left, seed=seed + 1),
    }


def specialist(where: str, seed: int, **more: Any) -> dict[str, Tensor]:
    """Linear layers and a convolution by factors, the head as a whole."""
    tensors = pair(QKV, (24, 3), (3, 8), seed) | pair("conv", (6, 3, 1, 1), (3, 4, 3, 3), seed + 2)
    head = {"head.weight": numbers(2, 8, seed=seed + 4), "head.bias": numbers(2, seed=seed + 5)}
    return write(where, tensors | head, modules_to_save=["head"], **more)


def folded(where: str = "fs", base: str = "base.safetensors") -> View:
    adapter = open_checkpoint(where, f"expert {where}", adapters=True)
    return onto(View.of(open_checkpoint(base, "base")), changes(adapter))


def unloaded(where: str) -> str:
    """The same expert as a whole checkpoint."""
    view = folded(where)
    save_file({name: view.read(name) for name in view.specs}, f"{where}.safetensors")
    return f"{where}.safetensors"


def product(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.lora_B.weight"].double().flatten(1) @ tensors[f"{module}.lora_A.weight"].double().flatten(
        1
    )


def close(found: Tensor, expected: Tensor) -> None:
    """Within rounding: 4 ulp of the sum, and 1e-6 of the largest of what was added."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert bool(((found - expected).abs() <= 4 * 2**-23 * expected.abs() + 1e-7).all())


def test_linear_layers_convolutions_and_whole_modules(base: dict[str, Tensor]) -> None:
    tensors = specialist("fs", 50)
    tensors |= write("point", pair("point", (6, 3, 1, 1), (3, 4, 1, 1)), binary=True)
    view = folded()
    close(view.read(f"{QKV}.weight"), base[f"{QKV}.weight"] + 2 * product(tensors, QKV))
    close(view.read("conv.weight"), base["conv.weight"] + 2 * product(tensors, "conv").view(6, 4, 3, 3))
    close(folded("point").read("point.weight"), base["point.weight"] + 2 * product(tensors, "point").view(6, 4, 1, 1))
    assert torch.equal(view.read("head.weight"), tensors["head.weight"])
    untouched = [name for name in base if name not in (f"{QKV}.weight", "conv.weight", "head.weight", "head.bias")]
    assert all(torch.equal(view.read(name), base[name]) for name in untouched)


def test_scales_by_pattern_and_rank(base: dict[str, Tensor]) -> None:
    tensors = pair(QKV, (24, 5), (5, 8)) | pair("pool", (24, 3), (3, 8), 60) | pair("pool.out_proj", (8, 3), (3, 8), 70)
    write(
        "fs",
        {name.replace("pool.out_proj", "pool.base_layer.out_proj"): tensor for name, tensor in tensors.items()},
        rank_pattern={"attn.qkv": 5},
        alpha_pattern={r"blocks\.\d\.attn\.qkv": 10},
        use_rslora=True,
    )
    view = folded()
    close(view.read(f"{QKV}.weight"), base[f"{QKV}.weight"] + 10 / math.sqrt(5) * product(tensors, QKV))
    close(view.read("pool.in_proj_weight"), base["pool.in_proj_weight"] + 6 / math.sqrt(3) * product(tensors, "pool"))
    # PEFT adds the projection of PyTorch's attention twice, in training too.
    twice = 2 * 6 / math.sqrt(3) * product(tensors, "pool.out_proj")
    close(view.read("pool.out_proj.weight"), base["pool.out_proj.weight"] + twice)


def test_embeddings_and_transposed_weights(base: dict[str, Tensor]) -> None:
    tensors = {"tokens.lora_embedding_A": numbers(3, 30, seed=60), "tokens.lora_embedding_B": numbers(8, 3, seed=61)}
    # Of (in, out) = (24, 8), and a square one, of which its shape says nothing.
    tensors |= pair(QKV, (8, 3), (3, 24)) | pair("blocks.0.mlp.fc", (8, 3), (3, 8), 62)
    write("fs", tensors, fan_in_fan_out=True)
    view = folded()
    change = (tensors["tokens.lora_embedding_B"].double() @ tensors["tokens.lora_embedding_A"].double()).T
    close(view.read("tokens.weight"), base["tokens.weight"] + 2 * change)
    close(view.read(f"{QKV}.weight"), base[f"{QKV}.weight"] + 2 * product(tensors, QKV).T)
    close(
        view.read("blocks.0.mlp.fc.weight"), base["blocks.0.mlp.fc.weight"] + 2 * product(tensors, "blocks.0.mlp.fc").T
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_squares_among_layers_of_both_kinds_are_refused(transposed: bool, base: dict[str, Tensor]) -> None:
    """PEFT saves the last layer's ``fan_in_fan_out``: of a square one before it nothing tells how it lies."""
    names = ("square", "linear", "conv1d")
    stored = {name: numbers(8, 8 if name == "square" else 24, seed=7) for name in names}
    save_file({f"{name}.weight": weight for name, weight in stored.items()}, "both.safetensors")
    shapes = {"square": (8, 8), "linear": (8, 24), "conv1d": (24, 8)}
    layers = {name: pair(name, (m, 3), (3, n)) for name, (m, n) in shapes.items()}
    other = "linear" if transposed else "conv1d"
    write("fs", layers["square"] | layers[other], fan_in_fan_out=transposed)
    with pytest.raises(InvalidInput, match=rf"the square 'square.weight' is .*: '{other}.weight' is not as its"):
        folded(base="both.safetensors")
    others = [name for name in names if name != other]
    write("fr", {**layers[others[0]], **layers[others[1]]}, fan_in_fan_out=transposed)
    assert torch.equal(folded("fr", "both.safetensors").read(f"{other}.weight"), stored[other])
    write("efs", {**layers["linear"], **layers["conv1d"]}, fan_in_fan_out=transposed)
    found = folded("efs", "both.safetensors")
    close(found.read("linear.weight"), stored["linear"] + 2 * product(layers["linear"], "linear"))
    close(found.read("conv1d.weight"), stored["conv1d"] + 2 * product(layers["conv1d"], "conv1d").T)


def test_magnitudes_of_dora(base: dict[str, Tensor]) -> None:
    tensors = specialist("plain", 50)
    rows, channels, columns = (numbers(size, seed=80 + size).abs() for size in (24, 6, 8))
    tensors |= {"tokens.lora_embedding_A": numbers(3, 30, seed=60), "tokens.lora_embedding_B": numbers(8, 3, seed=61)}
    magnitudes = {QKV: rows, "conv": channels.view(1, 6, 1, 1), "tokens": columns}
    write("fs", tensors | {f"{one}.lora_magnitude_vector": size for one, size in magnitudes.items()}, use_dora=True)
    view = folded()
    whole = base[f"{QKV}.weight"].double() + 2 * product(tensors, QKV)
    close(view.read(f"{QKV}.weight"), rows[:, None] * whole / whole.norm(dim=1, keepdim=True))
    whole = base["conv.weight"].double() + 2 * product(tensors, "conv").view(6, 4, 3, 3)
    close(view.read("conv.weight"), (channels / whole.flatten(1).norm(dim=1)).view(6, 1, 1, 1) * whole)
    change = (tensors["tokens.lora_embedding_B"].double() @ tensors["tokens.lora_embedding_A"].double()).T
    whole = base["tokens.weight"].double() + 2 * change
    close(view.read("tokens.weight"), columns / whole.norm(dim=0) * whole)


def test_biases(base: dict[str, Tensor]) -> None:
    tensors = pair(QKV, (24, 3), (3, 8)) | {f"{QKV}.lora_B.bias": numbers(24, seed=90)}
    write("fs", tensors, lora_bias=True)
    close(folded().read(f"{QKV}.bias"), base[f"{QKV}.bias"] + 2 * tensors[f"{QKV}.lora_B.bias"].double())
    # With bias="all" they are stored whole, those of modules that are saved three times.
    bias, head = numbers(24, seed=91), numbers(2, seed=92)
    names = ("head.bias", "head.modules_to_save.bias", "head.original_module.bias")
    heads = dict(zip(names, (head, head, numbers(2, seed=93)), strict=True))
    write("all", pair(QKV, (24, 3), (3, 8)) | {f"{QKV}.base_layer.bias": bias} | heads, bias="all")
    view = folded("all")
    assert torch.equal(view.read(f"{QKV}.bias"), bias)
    assert torch.equal(view.read("head.bias"), head)
    assert view.specs.keys() == {*base, "steps"}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_have_the_bits_of_the_whole(base: dict[str, Tensor], transposed: bool, dora: bool) -> None:
    m, n = low_rank.ROWS * 2 + 9, low_rank.COLUMNS + 70
    save_file({"x.weight": numbers(m, n, seed=1).bfloat16()}, "large.safetensors")
    out, wide = (n, m) if transposed else (m, n)
    sizes = {"x.lora_magnitude_vector": numbers(out, seed=2).abs()} if dora else {}
    write("fs", pair("x", (out, 3), (3, wide)) | sizes, use_dora=dora)
    view = folded(base="large.safetensors")
    whole = view.read("x.weight")
    assert whole.dtype == torch.float32  # an update of half precision's rounding would be lost
    for start, stop in ((0, 5), (n - 3, 2 * n + 4), (130 * n, m * n), (7, 7)):
        assert torch.equal(view.read_elements("x.weight", start, stop), whole.view(-1)[start:stop])
    assert view.in_blocks("x.weight")
    assert torch.equal(view.read_block("x.weight", 60 * n + 1000, 60, n, 140), whole[60:200, 1000:1060])
    assert torch.equal(view.read_block("x.weight", 3, 40, 50, 2), torch.stack([whole[0, 3:43], whole[0, 53:93]]))


def test_names_with_one_beginning_more_or_less(base: dict[str, Tensor]) -> None:
    tensors = pair(QKV, (24, 3), (3, 8))
    write("fs", tensors | {"head.weight": numbers(2, 8, seed=3)})
    save_file({f"vit.{name}": tensor for name, tensor in base.items()}, "longer.safetensors")
    view = folded(base="longer.safetensors")
    close(view.read(f"vit.{QKV}.weight"), base[f"{QKV}.weight"] + 2 * product(tensors, QKV))
    assert torch.equal(view.read("vit.head.weight"), numbers(2, 8, seed=3))
    save_file({name.removeprefix("blocks."): tensor for name, tensor in base.items()}, "shorter.safetensors")
    close(folded(base="shorter.safetensors").read("0.attn.qkv.weight"), view.read(f"vit.{QKV}.weight").double())
    twice = {f"{one}.{name}": tensor.clone() for name, tensor in base.items() for one in "ab"}
    save_file(twice, "twice.safetensors")
    with pytest.raises(InvalidInput, match=r"which may be 'a\..*' or 'b\..*': say which with rename"):
        folded(base="twice.safetensors")


@pytest.mark.parametrize(
    ("model", "file", "others"),
    [
        (
            "vit.layers.1.attention.q_proj",
            "vit.encoder.layer.1.attention.attention.query",
            {"vit.layers.1.layernorm_before": "vit.encoder.layer.1.layernorm_before"},
        ),
        ("layers.0.attention.o_proj", "vit.encoder.layer.0.attention.output.dense", {}),
        ("layers.10.mlp.fc1", "encoder.layer.10.intermediate.dense", {"head": "head"}),
        (
            "encoder.layer.0.attention.v_proj",
            "encoder.layer.0.attention.attention.value",
            {"encoder.layer.0.norm1": "encoder.layer.0.norm1"},
        ),
        (
            "swin.encoder.layers.0.blocks.1.attention.k_proj",
            "swin.encoder.layers.0.blocks.1.attention.self.key",
            {"swin.encoder.layers.0.blocks.1.mlp.fc2": "swin.encoder.layers.0.blocks.1.output.dense"},
        ),
    ],
)
def test_names_of_transformers_in_a_model_and_in_its_files(
    model: str, file: str, others: Mapping[str, str], base: dict[str, Tensor]
) -> None:
    weight = base[f"{QKV}.weight"]
    save_file({f"{file}.weight": weight, **{f"{name}.weight": 1 + weight for name in others.values()}}, "files.pt")
    factors = pair(model, (24, 3), (3, 8))
    write("fs", factors | {f"{name}.weight": 2 * weight for name in others})
    view = folded(base="files.pt")
    assert view.specs.keys() == {f"{file}.weight", *(f"{name}.weight" for name in others.values())}
    close(view.read(f"{file}.weight"), weight + 2 * product(factors, model))
    assert all(torch.equal(view.read(f"{name}.weight"), 2 * weight) for name in others.values())


def test_a_tied_weight_stays_tied(base: dict[str, Tensor]) -> None:
    weight = base[f"{QKV}.weight"]
    torch.save({f"{QKV}.weight": weight, "again.weight": weight}, "tied.pth")
    write("fs", pair("again", (24, 3), (3, 8)))
    view = folded(base="tied.pth")
    assert view.aliases == {"again.weight": f"{QKV}.weight"}
    assert torch.equal(view.read(f"{QKV}.weight"), view.read("again.weight"))
    assert not torch.equal(view.read("again.weight"), weight)
    write("both", pair("again", (24, 3), (3, 8)) | pair(QKV, (24, 3), (3, 8)))
    with pytest.raises(InvalidInput, match="change one tensor of the base"):
        folded("both", base="tied.pth")


ARGUMENTS = ("--base", "base.safetensors", "--expert", "fs=fs", "--expert", "fr=fr", "--expert", "efs=efs.safetensors")


def test_a_merge_has_the_bytes_of_one_of_whole_checkpoints(base: dict[str, Tensor], command: Command) -> None:
    for seed, name in enumerate(("fs", "fr", "efs")):
        specialist(name, 100 + 10 * seed, binary=name == "fr")
    whole = [word for name in ("fs", "fr", "efs") for word in ("--expert", f"{name}={unloaded(name)}")]
    options = ("--rank", "0.5", "--memory-budget", "64MiB")
    assert command("merge", *ARGUMENTS, "--out", "mixed", *options).code == 0
    assert command("merge", "--base", "base.safetensors", *whole, "--out", "whole", "--rank", "0.5").code == 0
    assert Path("mixed", OUTPUT).read_bytes() == Path("whole", OUTPUT).read_bytes()
    assert command("plan", *ARGUMENTS, "--out", "o").code == 0
    assert command("sweep", "mixed", "--eta", "0.5", "--to", "swept").code == 0
    # What its recipe is gone on with has the bytes of a merge from scratch, too.
    assert command("remove", "mixed", "--expert", "fr").code == 0
    assert command("add", "mixed", "--expert", "fr=fr/adapter_model.bin").code == 0
    scratch = [word for name in ("fs", "efs", "fr") for word in ("--expert", f"{name}={name}.safetensors")]
    assert command("merge", "--base", "base.safetensors", *scratch, "--out", "other", "--rank", "0.5").code == 0
    assert Path("mixed", OUTPUT).read_bytes() == Path("other", OUTPUT).read_bytes()


def test_which_changes_are_known_by_their_factors(base: dict[str, Tensor]) -> None:
    tokens = {"tokens.lora_embedding_A": numbers(3, 30, seed=60), "tokens.lora_embedding_B": numbers(8, 3, seed=61)}
    specialist("fs", 50)
    write("stored", tokens | {"tokens.base_layer.weight": base["tokens.weight"] + 1})
    write("plain", tokens)
    write("dora", pair(QKV, (24, 3), (3, 8)) | {f"{QKV}.lora_magnitude_vector": torch.ones(24)}, use_dora=True)
    names = [f"{QKV}.weight", "conv.weight", "tokens.weight", "point.weight", "head.weight"]
    origin = View.of(open_checkpoint("base.safetensors", "base"))

    def known(where: str, over: View) -> list[int | None]:
        view = onto(origin, changes(open_checkpoint(where, "expert", adapters=True))).over(over)
        for name in names:
            if view.change_rank(name) is not None:
                change, m = view.read_change(name).double(), view.specs[name].shape[0]
                product = (change[:m] @ change[m:].T).view(view.specs[name].shape)
                close(view.read(name), base[name] + product)
        return [view.change_rank(name) for name in names]

    assert known("fs", origin) == [3, 3, 0, 0, None]
    assert known("plain", origin) == [0, 0, 3, 0, 0]
    assert known("stored", origin) == [0, 0, None, 0, 0]  # what it was added to is not the base's
    assert known("dora", origin) == [None, 0, 0, 0, 0]
    assert known("fs", View.of(open_checkpoint("base.safetensors", "base"))) == [None] * 5


WIDE = {"layer.weight": (64, 48), "conv.weight": (50, 6, 3, 3), "untouched.weight": (40, 30), "bias": (64,)}


@pytest.mark.parametrize("options", [(), ("--rank", "4")], ids=["default", "rank 4"])
def test_adapters_alone_are_merged_by_their_factors(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    base = {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(WIDE.items())}
    save_file(base, "base.safetensors")
    for seed, name in enumerate(("fs", "fr")):
        factors = pair("layer", (64, 3), (3, 48), 10 * seed) | pair("conv", (50, 3, 1, 1), (3, 6, 3, 3), 10 * seed + 2)
        write(name, factors, use_rslora=name == "fr")
        unloaded(name)
    save_file({name: tensor + 0.1 * numbers(*tensor.shape, seed=9) for name, tensor in base.items()}, "efs.safetensors")
    merge = ("merge", "--base", "base.safetensors", *options, "--expert")
    assert command(*merge, "fs", "--expert", "fr", "--out", "factors").code == 0
    assert command(*merge, "fs.safetensors", "--expert", "fr.safetensors", "--out", "whole").code == 0
    found, expected = load_file(Path("factors", OUTPUT)), load_file(Path("whole", OUTPUT))
    for name, tensor in expected.items():
        update = float((tensor - base[name]).abs().max())
        assert bool(((found[name] - tensor).abs() <= 4 * 2**-23 * tensor.abs() + 1e-6 * update).all())
    # They were read as such, and the base once, at the end.
    steps = {step["step"]: step["bytes_read"] for step in json.loads(Path("factors", REPORT).read_text())["steps"]}
    factors, once = 2 * 4 * 3 * (64 + 48 + 50 + 54), sum(tensor.nbytes for tensor in base.values())
    # Six columns fit the default's rank, and not one of 4.
    truncated = factors if options else 0
    assert steps == {"task Gram": factors, "truncation": truncated, "combination": once + factors}
    # Beside a whole checkpoint they are whole, too: its inner products do not serve a merge without it.
    assert command(*merge, "fs", "--expert", "fr", "--expert", "efs=efs.safetensors", "--out", "mixed").code == 0
    assert command("remove", "mixed", "--expert", "efs").code == 0
    assert Path("mixed", OUTPUT).read_bytes() == Path("factors", OUTPUT).read_bytes()
    assert Path("mixed", STATE).read_bytes() == Path("factors", STATE).read_bytes()


def test_both_files_of_an_adapter_are_inputs(base: dict[str, Tensor], command: Command) -> None:
    specialist("fs", 50)
    specialist("fr", 60)
    merge = ("merge", "--base", "base.safetensors", "--expert", "fs", "--expert", "fr", "--out", "m")
    assert command(*merge).code == 0
    inputs = json.loads(Path("m", "r2m_state.json").read_text())["state"]["inputs"]
    assert {"../fs/adapter_config.json", "../fs/adapter_model.safetensors", "../base.safetensors"} <= inputs.keys()
    config = json.loads(Path("fs", "adapter_config.json").read_text())
    Path("fs", "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 60}))
    assert command("remove", "m", "--expert", "fr").code == 0
    assert command("merge", "--base", "base.safetensors", "--expert", "fs", "--out", "scratch").code == 0
    assert Path("m", OUTPUT).read_bytes() == Path("scratch", OUTPUT).read_bytes()


def test_a_directory_of_named_adapters_says_which_there_are(base: dict[str, Tensor], command: Command) -> None:
    Path("saved").mkdir()
    for name in ("fr", "fs"):
        write(f"saved/{name}", pair(QKV, (24, 3), (3, 8)))
    refused = command("merge", "--base", "base.safetensors", "--expert", "saved", "--out", "m")
    told = "holds adapters in directories of their own (fr, fs); name one, such as saved/fr"
    assert (refused.code, refused.err.count(told)) == (2, 1)
    assert command("merge", "--base", "base.safetensors", "--expert", "saved/fr", "--out", "m").code == 0


def test_inspect_says_what_an_adapter_is(base: dict[str, Tensor], command: Command) -> None:
    specialist("fs", 50, base_model_name_or_path="lab/clip", use_rslora=True)
    specialist("fr", 60, base_model_name_or_path=str(Path("base.safetensors").resolve()))
    result = command("inspect", "base.safetensors", "fs", "fr")
    assert result.code == 0
    told = result.out.split("\nfs: ")[1].split("\nfr: ")
    assert told[0].splitlines()[1:] == [
        "  adapter LoRA of PEFT, with rank-stabilised scale",
        "  rank    3 (2)",
        "  scale   3.464 (2)",
        "  changes qkv (1), conv (1)",
        "  whole   head.bias, head.weight",
        "  base    lab/clip, by its adapter_config.json; whether it is the one given cannot be told",
    ]
    assert "by its adapter_config.json: the one given\n" in told[1]
    assert "can be merged into base.safetensors: " in told[1]
    assert "lab/clip, by its adapter_config.json\n" in command("inspect", "fs").out
    assert command("inspect", "fs", "base.safetensors").code == 2


def test_a_named_base_and_one_that_is_given(tmp_path: Path) -> None:
    assert made_for("lab/clip", "hf://Lab/clip@main") is True
    assert made_for("lab/clip", "hf://lab/other") is False
    assert made_for("/home/x/clip", "hf://lab/clip") is None
    assert made_for("lab/clip", str(tmp_path / "models--lab--clip" / "snapshots" / "0")) is True
    assert made_for("lab/clip", str(tmp_path)) is None
    assert made_for(None, "hf://lab/clip") is None


def test_an_adapter_of_an_output_is_for_the_model_there(base: dict[str, Tensor], command: Command) -> None:
    for name, seed in (("fs", 50), ("fr", 60)):
        specialist(name, seed)
    experts = ("--expert", "fs", "--expert", "fr")
    made = ("--format", "adapters", "--rank", "2", "--whole-up-to", "0", "--out", "adapted")
    assert command("merge", "--base", "base.safetensors", *experts, *made).code == 0
    told = (
        "expert 'fs' (adapted/adapters/fs): was made for 'adapted', by its adapter_config.json, and not for this base"
    )
    merge = ("merge", "--expert", "fs=adapted/adapters/fs", "--expert", "fr=adapted/adapters/fr", "--base")
    assert told in command(*merge, "base.safetensors", "--out", "wrong").err
    for number, given in enumerate(("adapted", "adapted/model.safetensors")):
        result = command(*merge, given, "--out", f"right{number}")
        assert (result.code, "was made for" in result.err) == (0, False)
    shown = command("inspect", "base.safetensors", "adapted/adapters/fs").out
    assert "base    adapted, by its adapter_config.json: not the one given\n" in shown
    Path("adapted").rename("elsewhere")  # and nothing says any more what it was called
    moved = [word.replace("adapted", "elsewhere") for word in merge]
    assert "was made for" not in command(*moved, "base.safetensors", "--out", "moved").err


LINEAR = pair(QKV, (24, 3), (3, 8))
BROKEN = {QKV: LINEAR[f"{QKV}.lora_A.weight"].clone()}
BROKEN[QKV][1, 2:4] = math.nan
UNREAD = "PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(OUT)"
REFUSED: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Any], str]] = {
    "LoKr": (LINEAR, {"peft_type": "LOKR"}, "is a LoKr adapter of PEFT, expected LoRA, rsLoRA or DoRA; merge it into"),
    "LoHa": (LINEAR, {"peft_type": "LOHA"}, "is a LoHa adapter of PEFT, expected"),
    "IA³": (LINEAR, {"peft_type": "IA3"}, "is a IA³ adapter of PEFT, expected"),
    "VeRA": (LINEAR, {"peft_type": "VERA"}, "is a VeRA adapter of PEFT, expected"),
    "another": (LINEAR, {"peft_type": "NEW\n"}, "is a NEW\\n adapter of PEFT, expected"),
    "prompts": (LINEAR, {"peft_type": "PREFIX_TUNING"}, "is an adapter of PEFT by prefix tuning, which changes no"),
    "no kind": (LINEAR, {"peft_type": None}, "adapter_config.json: expected a peft_type such as LORA, got none"),
    "layers repeated": (LINEAR, {"layer_replication": [[0, 2]]}, "is a LoRA with layer_replication, which is not"),
    "PiSSA": (LINEAR, {"init_lora_weights": "pissa"}, "is a LoRA that began as 'pissa', which changes the base's own"),
    "LoftQ": (LINEAR, {"init_lora_weights": "loftq"}, "was trained on a quantised base (init_lora_weights in its"),
    "quantised": (
        LINEAR,
        {"base_model_name_or_path": "lab/clip-bnb-4bit"},
        "was trained on a quantised base (its adapter_config.json names 'lab/clip-bnb-4bit'), from which",
    ),
    "another part": (
        {**LINEAR, f"{QKV}.lora_diag": torch.ones(3)},
        {},
        f"holds '{QKV}.lora_diag', which is no part of a plain LoRA; merge it into",
    ),
    "no partner": (
        {f"{QKV}.lora_A.weight": LINEAR[f"{QKV}.lora_A.weight"]},
        {},
        f"holds '{QKV}.lora_A.weight' without its other factor",
    ),
    "two ranks": (
        {**LINEAR, f"{QKV}.lora_B.weight": torch.ones(24, 4)},
        {},
        f"tensors '{QKV}.lora_B.weight' and '{QKV}.lora_A.weight' are no factors of rank 3: [24, 4] and [3, 8]",
    ),
    "another rank": (
        LINEAR,
        {"r": 4},
        f"tensor '{QKV}.lora_A.weight' has rank 3, expected 4 by its adapter_config.json",
    ),
    "no magnitudes": (
        LINEAR,
        {"use_dora": True},
        f"'{QKV}' lacks magnitudes, expected some by its adapter_config.json",
    ),
    "magnitudes": (
        {**LINEAR, f"{QKV}.lora_magnitude_vector": torch.ones(24)},
        {},
        f"'{QKV}' has magnitudes, expected none by its adapter_config.json",
    ),
    "no bias": (
        LINEAR,
        {"lora_bias": True},
        f"'{QKV}' lacks a bias, expected one by lora_bias of its adapter_config.json",
    ),
    "bias": (
        {**LINEAR, f"{QKV}.lora_B.bias": torch.ones(24)},
        {},
        f"'{QKV}' has a bias, expected none by lora_bias of its adapter_config.json",
    ),
    "few magnitudes": (
        {**LINEAR, f"{QKV}.lora_magnitude_vector": torch.ones(8)},
        {"use_dora": True},
        f"has 8 magnitudes for '{QKV}.weight', expected 24",
    ),
    "no target": (
        {**LINEAR, **pair("blocks.7.attn.qkv", (24, 3), (3, 8))},
        {"base_model_name_or_path": "lab/large"},
        "changes 'blocks.7.attn.qkv.weight', which the base has not; it was made for 'lab/large', by its",
    ),
    "wrong base": (
        {**pair("layers.0.q", (8, 3), (3, 8)), **pair("layers.1.q", (8, 3), (3, 8))},
        {},
        "changes 'layers.0.q.weight', which the base has not (2 of its 2 targets are not there)",
    ),
    "another size": (
        pair(QKV, (24, 3), (3, 16)),
        {},
        f"'{QKV}.lora_B.weight' by '{QKV}.lora_A.weight' is [24, 16], expected [24, 8] as the base's '{QKV}.weight'",
    ),
    "groups": (
        pair("conv", (6, 3, 1, 1), (3, 8, 3, 3)),
        {},
        "'conv.lora_B.weight' by 'conv.lora_A.weight' is [6, 8, 3, 3], expected [6, 4, 3, 3] as the base's "
        "'conv.weight' (a grouped convolution",
    ),
    "NaN": (
        {**LINEAR, f"{QKV}.lora_A.weight": BROKEN[QKV]},
        {},
        f"tensor '{QKV}.lora_A.weight' holds NaN or Inf in 2 of 24 elements",
    ),
    "integers": (
        {**LINEAR, f"{QKV}.lora_A.weight": torch.ones(3, 8, dtype=torch.int8)},
        {},
        f"tensor '{QKV}.lora_A.weight': expected a factor of two dimensions or more, in floating point, got int8 [3, ",
    ),
    "no number": (LINEAR, {"lora_alpha": "8"}, "adapter_config.json: lora_alpha: expected a number, got 8"),
    "no rank": (LINEAR, {"r": 0}, "adapter_config.json: r: expected a whole number from 1, got 0"),
    "a trap": (
        LINEAR,
        {"alpha_pattern": {"(a+)+b": 3}},
        "adapter_config.json: alpha_pattern: expected names or plain ",
    ),
    "no pattern": (LINEAR, {"rank_pattern": {"a(": 3}}, "adapter_config.json: rank_pattern: expected names or plain "),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_folded_is_one_sentence(kind: str, base: dict[str, Tensor], command: Command) -> None:
    tensors, config, sentence = REFUSED[kind]
    write("fs", tensors, **config)
    result = command("merge", "--base", "base.safetensors", "--expert", "fs", "--out", "m")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"Error: expert 'fs' (fs): {sentence}")
    assert result.err.count("Error") == 1
    assert sorted(os.listdir()) == ["base.safetensors", "fs"]


def test_other_files_of_adapters_are_refused(base: dict[str, Tensor], command: Command) -> None:
    specialist("fs", 50)
    text = "is an adapter (LoRA): factors beside a model, as adapter_config.json in it says; give its directory as an "
    assert command("merge", "--base", "fs", "--expert", "fs", "--out", "m").err.startswith(f"Error: base (fs): {text}")
    assert f"source (fs): {text}" in command("convert", "fs", "x.pth").err
    Path("fs", "README.md").write_text("quantization config was used during training:\n- load_in_4bit: True\n")
    refused = command("merge", "--base", "base.safetensors", "--expert", "fs", "--out", "m")
    assert "was trained on a quantised base (its README.md says so)" in refused.err
    Path("fs", "README.md").unlink()
    Path("fs", "adapter_model.safetensors").unlink()
    refused = command("merge", "--base", "base.safetensors", "--expert", "fs", "--out", "m")
    assert "is an adapter of PEFT without its adapter_model.safetensors or adapter_model.bin" in refused.err
    save_file({"x": torch.ones(2)}, "fs/model.safetensors")  # beside a whole model it says nothing
    assert open_checkpoint("fs", "x").specs.keys() == {"x"}


def test_a_preset_that_would_fit_is_named(base: dict[str, Tensor], command: Command) -> None:
    save_file({f"vision_model.{name}": one for name, one in base.items() if "head" not in name}, "clip.safetensors")
    for seed, name in enumerate(("fs", "fr")):
        tensors = pair(f"backbone.{QKV}", (24, 3), (3, 8), 50 + seed)
        write(name, tensors | {"head.weight": numbers(2, 8, seed=seed), "head.bias": numbers(2, seed=seed)})
    merge = ("merge", "--base", "clip.safetensors", "--expert", "fs", "--expert", "fr", "--out", "m")
    refused = command(*merge)
    assert (refused.code, refused.err.count("With --preset df40 they fit")) == (2, 1)
    assert command(*merge, "--preset", "df40").code == 0
    merged = load_file(Path("m", OUTPUT))
    close(merged["head.weight"], (numbers(2, 8, seed=0).double() + numbers(2, 8, seed=1)) / 2)
    assert f"backbone.{QKV}.weight" in merged


zoo = partial(with_libraries, "zoo_adapters.py")


METHODS = {"average": ("--method", "weight_average"), "whole": ("--rank", "1.0", "--row-power", "0")}


@pytest.mark.slow
def test_adapters_of_peft_merge_as_the_models_it_unloads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, directory in zoo("make", tmp_path).items():
        place, end = tmp_path / name, "" if directory else ".safetensors"
        base = load_file(place / "base" / OUTPUT if directory else place / "base.safetensors")
        adapters = [f"{expert}={place / expert}" for expert in ("fs", "fr", "efs")]
        unloaded = [f"{expert}-unloaded{end}" for expert in adapters]
        mixed = [adapters[0], unloaded[1], adapters[2]]
        for method, options in METHODS.items():
            merged = []
            for number, experts in enumerate((unloaded, adapters, mixed)[: 2 if method == "average" else 3]):
                words = [word for expert in experts for word in ("--expert", expert)]
                out = place / f"{method}-{number}"
                code = main(
                    ["merge", "--base", str(place / f"base{end}"), *words, "--out", str(out), "--quiet", *options]
                )
                assert code == 0, (name, capsys.readouterr().err)
                merged.append(load_file(out / OUTPUT))
            expected, *others = merged
            assert expected.keys() == base.keys()
            for found in others:
                assert found.keys() == expected.keys()
                for tensor, right in expected.items():
                    if right.is_floating_point():
                        # 4 ulp of float32, and a millionth of the update.
                        bound = 4 * 2**-23 * right.abs() + 1e-6 * (right - base[tensor]).abs().max()
                        assert bool(((found[tensor] - right).abs() <= bound).all()), (name, method, tensor)
