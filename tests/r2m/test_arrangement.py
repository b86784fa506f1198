"""Checkpoints with the names that detectors really have: one layout, one head, weights that are sums of factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from r2m.arrangement import literal
from r2m.presets import PRESETS
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2m_kernels import merge

if TYPE_CHECKING:
    from conftest import Result

Command = Callable[..., "Result"]
State = dict[str, Tensor]
WIDTH = 12


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tower(seed: int, beginning: str) -> State:
    """A CLIP vision tower as transformers names it, of two layers."""
    layers = {
        f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}": normal(seed + 10 * layer + i, *shape)
        for layer in (0, 1)
        for i, part in enumerate("qkv")
        for kind, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
    }
    first = {"embeddings.patch_embedding.weight": normal(seed + 90, WIDTH, 3, 2, 2), **layers}
    return {beginning + name: tensor for name, tensor in first.items()}


def base_model() -> State:
    """The whole CLIP of transformers: vision and text, and no head."""
    return {
        **tower(0, "vision_model."),
        "text_model.encoder.layers.0.weight": normal(7, 5, 5),
        "text_projection.weight": normal(8, 3, 5),
        "visual_projection.weight": normal(9, 3, WIDTH),
        "logit_scale": torch.tensor(4.6),
    }


def detector(seed: int, beginning: str = "backbone.", head: str = "head.") -> State:
    """A detector fine-tuned from it, with the head and the integer buffer that the base lacks."""
    base, noise = tower(0, beginning), tower(100 * seed, beginning)
    return {
        beginning + "embeddings.position_ids": torch.arange(5).reshape(1, 5),
        **{name: tensor + 0.1 * noise[name] for name, tensor in base.items()},
        head + "weight": normal(seed + 50, 2, WIDTH),
        head + "bias": normal(seed + 60, 2),
    }


@pytest.fixture
def files() -> list[str]:
    """Arguments: a base and three experts, wrapped and named in the ways that occur."""
    save_file(base_model(), "clip.safetensors")
    torch.save(detector(1), "fs.pth")
    torch.save({"state_dict": detector(2, "module.backbone.", "module.head."), "epoch": 3}, "fr.pth")
    svdd = {"R": torch.tensor(1.0), "c": torch.zeros(4), "state_dict": detector(3, "base_model.", "classifier.")}
    torch.save(svdd, "efs.pth")
    experts = [word for name in ("fs", "fr", "efs") for word in ("--expert", f"{name}={name}.pth")]
    return ["--base", "clip.safetensors", *experts]


def by_hand(**options: Any) -> State:
    """The merge of the same tensors under one set of names."""
    return merge(tower(0, "backbone."), [detector(seed) for seed in (1, 2, 3)], extra="average", **options)


def test_df40s_names_are_brought_into_one_layout(files: list[str], command: Command) -> None:
    result = command("merge", *files, "--out", "merged", "--preset", "df40")
    assert result.code == 0
    merged = load_file("merged/model.safetensors")
    assert (
        merged.keys() == detector(1).keys()
    )  # loads strict=True where the experts did, position_ids and head included
    for name, tensor in by_hand().items():
        assert torch.equal(merged[name], tensor), name
    assert torch.equal(merged["backbone.embeddings.position_ids"], torch.arange(5).reshape(1, 5))


def test_files_that_speak_of_the_bases_names_stay_behind(files: list[str], command: Command) -> None:
    Path("clip").mkdir()
    Path("clip.safetensors").rename("clip/model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        Path("clip", name).write_text("{}")
    arguments = ["--base", "clip", *files[2:], "--preset", "df40", "--out", "merged"]
    assert command("merge", *arguments).code == 0
    assert not {"config.json", "preprocessor_config.json"} & {path.name for path in Path("merged").iterdir()}
    assert command("merge", "--base", "clip", "--expert", "clip", "--out", "same").code == 0
    assert Path("same/config.json").exists()


def test_files_that_do_not_fit_say_which_preset_would_help(files: list[str], command: Command) -> None:
    result = command("merge", *files, "--out", "merged")
    assert result.code == 2
    assert result.err.splitlines()[1].startswith("With --preset df40 they fit (CLIP detectors of DF40")
    assert len(result.err.splitlines()) <= 10
    assert not Path("merged").exists()
    result = command("inspect", files[1], "fs.pth", "fr.pth")
    assert result.code == 1
    assert "With --preset df40 they fit" in result.out
    assert command("inspect", files[1], "fs.pth", "fr.pth", "--preset", "df40").code == 0


def test_towers_of_transformers_5_and_of_open_clip_fit_a_preset(command: Command) -> None:
    tower = {"embeddings.class_embedding": normal(0, 4), "encoder.layers.0.fc.weight": normal(1, 4, 4)}
    tower |= {"pre_layrnorm.weight": normal(2, 4), "post_layernorm.bias": normal(3, 4)}
    whole = {f"vision_model.{name}": one for name, one in tower.items()}
    text = {"text_model.encoder.weight": normal(4, 4, 4), "logit_scale": normal(5)}
    visual = {"visual.conv1.weight": normal(0, 4, 3, 2, 2), "visual.transformer.resblocks.0.weight": normal(1, 4, 4)}
    open_text = {
        "transformer.resblocks.0.weight": normal(2, 4, 4),
        "positional_embedding": normal(3, 4),
        "logit_scale": normal(5),
    }
    detector = {f"backbone.{name}": one + 1 for name, one in tower.items()} | {"head.weight": normal(6, 2, 4)}
    for preset, base, expert, first in (
        ("clip_vision", {**whole, **text}, {name: one + 1 for name, one in tower.items()}, "vision_model."),
        ("clip_vision", tower, {**{name: one + 1 for name, one in whole.items()}, **text}, "vision_model."),
        ("df40", tower, detector, ""),
        ("open_clip_vision", {**visual, **open_text}, {name: one + 1 for name, one in visual.items()}, "visual."),
    ):
        torch.save(base, "b.pth")
        torch.save(expert, "e.pth")
        words = ["--base", "b.pth", "--expert", "e.pth", "--out", "out", "--overwrite"]
        assert f"With --preset {preset} they fit" in command("merge", *words).err
        assert command("merge", *words, "--preset", preset).code == 0
        assert all(name.startswith(first) for name in load_file("out/model.safetensors"))


def test_pointwise_convolutions_stored_as_matrices_fit(command: Command) -> None:
    expert = {"pointwise.weight": normal(0, 4, 3, 1, 1), "conv.weight": normal(1, 4, 3, 3, 3)}
    torch.save({"pointwise.weight": normal(2, 4, 3), "conv.weight": normal(3, 4, 3, 3, 3)}, "b.pth")
    torch.save(expert, "e.pth")
    words = ["--base", "b.pth", "--expert", "e.pth", "--method", "weight_average", "--out", "out"]
    assert command("merge", *words).code == 0
    # θ₀ + (θ₁ − θ₀) in float32: two roundings of numbers below 8
    merged = load_file("out/model.safetensors")["pointwise.weight"]
    assert merged.shape == (4, 3, 1, 1)
    assert (merged - expert["pointwise.weight"]).abs().max() <= 2 * 8 * 2**-24
    torch.save({"pointwise.weight": normal(2, 3, 4), "conv.weight": normal(3, 4, 3, 3, 3)}, "b.pth")
    assert "does not fit" in command("merge", *words, "--overwrite").err


def test_two_things_wrong_at_once_still_get_their_preset_named(command: Command) -> None:
    base = {f"layer{i}.weight": normal(i, 4, 4) for i in range(40)}
    expert = {f"module.{name}": tensor + 1 for name, tensor in base.items()}
    expert["module.layer7.weight"] = normal(1, 4, 5)
    for name, state in (("base", base), ("a", expert), ("b", expert)):
        torch.save(state, f"{name}.pth")
    words = ["--base", "base.pth", "--expert", "a.pth", "--expert", "b.pth", "--out", "merged"]
    result = command("merge", *words)
    assert result.code == 2
    lines = result.err.splitlines()
    assert lines[1].startswith("With --preset wrapped (names begin with module.")
    assert lines[1].endswith("2 of 160 mismatches are left:")
    assert "shape: 'layer7.weight' expected [4, 4], got [4, 5]" in result.err
    assert len(lines) <= 10
    result = command("inspect", "base.pth", "a.pth", "b.pth", "--all")
    assert result.out.count("missing: ") == result.out.count("extra: ") == 80


def test_a_recipe_says_the_same_and_repeats_the_merge(files: list[str], command: Command) -> None:
    assert command("merge", *files, "--out", "merged", "--preset", "df40", "--head", "expert:fr").code == 0
    assert command("merge", "merged/r2m_config.yaml", "--out", "again").code == 0
    assert Path("merged/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_a_buffer_that_no_expert_has_is_left_out(files: list[str], command: Command) -> None:
    save_file(base_model() | {"vision_model.embeddings.position_ids": torch.arange(3)}, "clip.safetensors")
    for seed, name in enumerate(("fs", "fr", "efs"), start=1):
        state = detector(seed)
        del state["backbone.embeddings.position_ids"]
        torch.save(state, f"{name}.pth")
    assert command("merge", *files, "--out", "merged", "--preset", "df40").code == 0
    assert "backbone.embeddings.position_ids" not in load_file("merged/model.safetensors")


@pytest.mark.parametrize("rule", ["mean", "expert:fr", "base"])
def test_the_head_is_what_was_asked_for(rule: str, files: list[str], command: Command) -> None:
    base = {**tower(0, "backbone."), "head.weight": normal(70, 2, WIDTH), "head.bias": normal(71, 2)}
    save_file(base, "clip.safetensors")
    for seed, name in enumerate(("fs", "fr", "efs"), start=1):
        torch.save(detector(seed), f"{name}.pth")
    assert command("merge", *files, "--out", "merged", "--head", rule).code == 0
    merged = load_file("merged/model.safetensors")
    heads = [detector(seed)["head.weight"] for seed in (1, 2, 3)]
    mean = torch.stack(heads).double().mean(0).float()
    expected = {"mean": mean, "expert:fr": heads[1], "base": base["head.weight"]}[rule]
    assert torch.allclose(merged["head.weight"], expected, rtol=1e-6, atol=1e-7 if rule == "mean" else 0)
    if rule != "mean":
        assert torch.equal(merged["head.weight"], expected)
    report = json.loads(Path("merged/r2m_report.json").read_text())
    assert report["arrangement"]["head"] == {"rule": rule, "tensors": ["head.weight", "head.bias"]}
    # The head does not enter the arithmetic of the rest.
    assert torch.equal(
        merged["backbone.encoder.layers.0.self_attn.q_proj.weight"],
        by_hand()["backbone.encoder.layers.0.self_attn.q_proj.weight"],
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--head median", "head: expected mean, merge, base, expert:NAME, refit or refit:logistic, got 'median'"),
        ("--head expert:", "head: expected mean, merge, base, expert:NAME, refit or refit:logistic, got 'expert:'"),
        ("--head mean:fs", "head: expected mean, merge, base, expert:NAME, refit or refit:logistic, got 'mean:fs'"),
        ("--head expert:ef", "head: no expert is called 'ef'; did you mean 'efs'?"),
        ("--head base", "head: no tensor of base (clip.safetensors) looks like a classifier; name it (head_tensors)"),
        ("--head mean --head-tensor top.*", "head: no tensor of expert 'fs' (fs.pth) fits 'top.*'"),
        ("--preset effort", "preset effort: no expert has a tensor that ends in .weight_main"),
    ],
)
def test_a_head_that_is_not_there_is_refused(options: str, sentence: str, files: list[str], command: Command) -> None:
    preset = () if "--preset" in options else ("--preset", "df40")
    result = command("merge", *files, "--out", "merged", *preset, *options.split())
    assert (result.code, result.err) == (2, f"Error: {sentence}\n")
    assert not Path("merged.partial").exists()


def test_named_head_tensors_alone_are_the_head(files: list[str], command: Command) -> None:
    options = ("--preset", "df40", "--head", "expert:efs", "--head-tensor", "head.bias")
    assert command("merge", *files, "--out", "merged", *options).code == 0
    merged = load_file("merged/model.safetensors")
    assert torch.equal(merged["head.bias"], detector(3)["head.bias"])
    assert torch.equal(merged["head.weight"], by_hand()["head.weight"])


def effort(seed: int) -> State:
    """A detector whose weights are W_main + U diag(S) V, and what Effort keeps beside them."""
    state: State = {}
    for name, tensor in detector(seed).items():
        if not name.endswith("_proj.weight"):
            state[name] = tensor
            continue
        start = name.removesuffix("weight")
        state[start + "weight_main"] = tensor
        for number, ending in enumerate(("U_residual", "S_residual", "V_residual", "U_r", "S_r", "V_r")):
            shape = ((WIDTH, 1), (1,), (1, WIDTH), (WIDTH, WIDTH - 1), (WIDTH - 1,), (WIDTH - 1, WIDTH))[number]
            state[start + ending] = normal(seed * 1000 + number, *shape)
    return state


def forward_weight(state: State, start: str) -> Tensor:
    """The weight that an Effort layer computes with."""
    change = (state[start + "U_residual"] * state[start + "S_residual"]) @ state[start + "V_residual"]
    return state[start + "weight_main"] + change


def test_efforts_factors_are_folded_and_written_back_loadable(files: list[str], command: Command) -> None:
    for seed, name in enumerate(("fs", "fr", "efs"), start=1):
        torch.save(effort(seed), f"{name}.pth")
    assert command("merge", *files, "--out", "merged", "--preset", "effort").code == 0
    merged = load_file("merged/model.safetensors")
    assert merged.keys() == effort(1).keys()
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in effort(1).items()}
    plain = []
    for seed in (1, 2, 3):
        state = effort(seed)
        starts = [name.removesuffix("weight_main") for name in state if name.endswith("weight_main")]
        whole = {start + "weight": forward_weight(state, start) for start in starts}
        rest = {
            name: t for name, t in state.items() if not any(name.startswith(s) and name != s + "bias" for s in starts)
        }
        plain.append({**rest, **whole})
    expected = merge(tower(0, "backbone."), plain, extra="average")
    for start in starts:
        assert merged[start + "S_residual"].eq(0).all()
        assert torch.allclose(forward_weight(merged, start), expected[start + "weight"], rtol=1e-6, atol=1e-6)
    report = json.loads(Path("merged/r2m_report.json").read_text())
    assert report["arrangement"]["folded"] == sorted(start + "weight_main" for start in starts)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda state, start: state.pop(start + "V_residual"), "q_proj.weight_main' and lacks"),
        (
            lambda state, start: state.update({start + "V_residual": torch.zeros(2, WIDTH)}),
            "expected factors of shapes (m, r), (r,) and (r, n) beside its (m, n), got (12, 1), (1,), (2, 12) beside "
            "(12, 12)",
        ),
        (lambda state, start: state.update({start + "S_residual": torch.tensor(1.0)}), "got (12, 1), (), (1, 12)"),
    ],
)
def test_factors_that_do_not_go_together(edit: Any, sentence: str, files: list[str], command: Command) -> None:
    for seed, name in enumerate(("fs", "fr", "efs"), start=1):
        torch.save(effort(seed), f"{name}.pth")
    state = effort(2)
    edit(state, "backbone.encoder.layers.0.self_attn.q_proj.")
    torch.save(state, "fr.pth")
    result = command("merge", *files, "--out", "merged", "--preset", "effort")
    assert result.code == 2
    assert sentence in result.err
    assert result.err.startswith("Error: expert 'fr' (fr.pth): ")


def test_tensors_are_left_out_by_the_beginning_of_their_names(command: Command) -> None:
    save_file(base_model(), "clip.safetensors")
    noisy = {name: tensor + 0.1 * normal(1, *tensor.shape) for name, tensor in base_model().items()}
    save_file(noisy, "fs.safetensors")
    arguments = ("merge", "--base", "clip.safetensors", "--expert", "fs.safetensors", "--out", "merged")
    assert command(*arguments, "--drop", "text_", "--rename", "vision_model.=backbone.").code == 0
    kept = {*tower(0, "backbone."), "visual_projection.weight", "logit_scale"}
    assert load_file("merged/model.safetensors").keys() == kept
    assert command("merge", "merged/r2m_config.yaml", "--out", "again").code == 0
    assert Path("merged/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_a_literal_glob_fits_its_name_alone() -> None:
    import fnmatch

    for name in ("a[0].*", "plain.weight", "what?", "[x]"):
        assert fnmatch.fnmatchcase(name, literal(name))
        assert not fnmatch.fnmatchcase(name + "x", literal(name))
    assert not fnmatch.fnmatchcase("a0.b", literal("a[0].*"))


def test_presets_are_described() -> None:
    assert all(preset.title and preset.steps for preset in PRESETS.values())


def features(width: int = WIDTH, name: str = "features.safetensors") -> tuple[torch.Tensor, torch.Tensor]:
    """Two clouds, with a feature that never changes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    values = torch.randn(200, width, generator=generator) + 1.5 * labels[:, None] * torch.linspace(-1, 1, width)
    values[:, 0] = 3.0
    save_file({"features": values, "labels": labels}, name)
    return values, labels


@pytest.mark.parametrize("rule", ["refit", "refit:lda", "refit:logistic"])
def test_a_head_is_fitted_on_features(rule: str, files: list[str], command: Command) -> None:
    values, labels = features()
    options = ("--preset", "df40", "--head", rule, "--head-features", "features.safetensors")
    assert command("merge", *files, "--out", "merged", *options).code == 0
    merged = load_file("merged/model.safetensors")
    assert merged["head.weight"].shape == (2, WIDTH)
    logits = values @ merged["head.weight"].T + merged["head.bias"]
    odds = logits[:, 1] - logits[:, 0]
    assert ((odds > 0) == (labels == 1)).float().mean() > 0.9
    # Log-odds, by scikit-learn itself.
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression

    scaled = (values - values.mean(0)) / values.std(0, correction=0).clamp_min(1e-30).where(
        values.std(0) > 0, torch.tensor(1.0)
    )
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    model = LogisticRegression(max_iter=10_000) if rule.endswith("logistic") else lda
    expected = model.fit(scaled.numpy(), labels.numpy()).decision_function(scaled.numpy())
    assert torch.allclose(odds.double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-3)
    # Nothing else is touched, and the recipe repeats it.
    assert torch.equal(
        merged["backbone.embeddings.patch_embedding.weight"], by_hand()["backbone.embeddings.patch_embedding.weight"]
    )
    assert command("merge", "merged/r2m_config.yaml", "--out", "again").code == 0
    assert Path("again/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()
    assert json.loads(Path("merged/r2m_report.json").read_text())["arrangement"]["head"]["rule"] == rule


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"features": torch.zeros(4, 3)}, "expected tensors features (n, d) and labels (n,), got features"),
        ({"features": torch.zeros(4), "labels": torch.arange(4) % 2}, "got (4,) and (4,)"),
        (
            {"features": torch.zeros(4, 3), "labels": torch.zeros(4).long()},
            "expected labels 0 (real) and 1 (fake), both",
        ),
        ({"features": torch.zeros(4, 3), "labels": torch.arange(4) % 2}, "head: refit: expected 12 features, got 3"),
        ({"features": torch.full((4, 12), torch.nan), "labels": torch.arange(4) % 2}, "features hold NaN or Inf"),
    ],
)
def test_features_that_are_none(tensors: State, sentence: str, files: list[str], command: Command) -> None:
    save_file(tensors, "features.safetensors")
    options = ("--preset", "df40", "--head", "refit", "--head-features", "features.safetensors")
    result = command("merge", *files, "--out", "merged", *options)
    assert result.code == 2
    assert sentence in result.err
    assert not Path("merged.partial").exists()


def test_refit_and_its_features_go_together(files: list[str], command: Command) -> None:
    features()
    for options, sentence in (
        (("--head", "refit"), "head: refit needs features of the merged model (head_features)"),
        (("--head", "mean", "--head-features", "features.safetensors"), "head_features: are for head: refit alone"),
        (
            ("--head", "refit", "--head-features", "features.safetensors", "--head-tensor", "head.bias"),
            "head: refit expects one matrix",
        ),
    ):
        result = command("merge", *files, "--out", "merged", "--preset", "df40", *options)
        assert result.code == 2
        assert sentence in result.err


def test_a_head_is_averaged_unless_it_is_to_be_merged(files: list[str], command: Command) -> None:
    base = {**tower(0, "backbone."), "head.weight": normal(70, 2, WIDTH), "head.bias": normal(71, 2)}
    save_file(base, "base.safetensors")
    for number, name in enumerate(("fs", "fr", "efs"), start=1):
        moved = {key: tensor + 0.01 * normal(100 * number, *tensor.shape) for key, tensor in base.items()}
        save_file(moved, f"{name}.safetensors")
    words = ["merge", "--base", "base.safetensors"]
    words += [word for name in ("fs", "fr", "efs") for word in ("--expert", f"{name}.safetensors")]
    said = command(*words, "--out", "mean")
    assert "Classifier (mean): head.weight, head.bias." in said.out.splitlines()
    report = json.loads(Path("mean/r2m_report.json").read_text())
    assert report["arrangement"]["head"] == {"rule": "mean", "tensors": ["head.weight", "head.bias"]}
    assert command(*words, "--out", "named", "--head-tensor", "head.weight").code == 0
    assert json.loads(Path("named/r2m_report.json").read_text())["arrangement"]["head"]["tensors"] == ["head.weight"]
    assert "Classifier (" not in command(*words, "--out", "merged", "--head", "merge").out
    heads = [load_file(f"{out}/model.safetensors")["head.weight"] for out in ("mean", "merged")]
    assert not torch.equal(*heads)
    assert command("merge", "merged/r2m_config.yaml", "--out", "again", "--quiet").code == 0
    assert Path("merged/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_variances_below_zero_are_told(command: Command) -> None:
    def network(seed: int, variance: float) -> State:
        return {"conv.weight": normal(seed, 4, 3, 3, 3), "bn.running_var": torch.tensor([1.0, variance])}

    for name, state in (("base", network(0, 1.0)), ("a", network(1, 0.0)), ("b", network(2, -0.5))):
        save_file(state, f"{name}.safetensors")
    result = command(
        "merge", "--base", "base.safetensors", "--expert", "a.safetensors", "--expert", "b.safetensors", "--out", "out"
    )
    assert result.code == 0
    assert "(b.safetensors): 'bn.running_var' has variances below zero: is it whole?" in result.err
    assert "(a.safetensors): 'bn.running_var'" not in result.err
    assert "below zero" in json.dumps(json.loads(Path("out/r2m_report.json").read_text())["notes"])
