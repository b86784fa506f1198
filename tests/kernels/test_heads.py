"""Where networks end: names and shapes of classifiers as libraries have them, and of layers that only look like one."""

from __future__ import annotations

import pytest
import torch
from cases import checkpoints, distance

from r2m_kernels import MergeConfig, analyze, merge
from r2m_kernels.heads import head_names

WIDE = 1024


def tower(beginning: str) -> dict[str, tuple[int, ...]]:
    """CLIP's vision tower as transformers has it: attention, MLPs and norms, and no classifier."""
    shapes: dict[str, tuple[int, ...]] = {f"{beginning}embeddings.patch_embedding.weight": (WIDE, 3, 14, 14)}
    for layer in range(2):
        block = f"{beginning}encoder.layers.{layer}."
        shapes |= {f"{block}self_attn.{name}_proj.weight": (WIDE, WIDE) for name in ("q", "k", "v", "out")}
        shapes |= {f"{block}mlp.fc1.weight": (4 * WIDE, WIDE), f"{block}mlp.fc2.weight": (WIDE, 4 * WIDE)}
    return {**shapes, f"{beginning}post_layernorm.weight": (WIDE,)}


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


BLOCKS = {f"stages.0.blocks.{i}.ese.fc.weight": (256, 256 - 64 * i, 1, 1) for i in range(2)}
# What the classifier is, and the rest of the network.
NETWORKS = {
    "DeepfakeBench's CLIP": (["head"], {**tower("backbone."), **linear("head", 2, WIDE)}),
    "one logit": (["head"], {**tower("backbone."), **linear("head", 1, WIDE)}),
    "transformers": (["classifier"], {**tower("vision_model."), **linear("classifier", 2, WIDE)}),
    "1000 classes": (["head"], {**tower(""), **linear("head", 1000, WIDE)}),
    "Xception": (
        ["backbone.last_linear"],
        {"backbone.block1.skip.weight": (128, 64, 1, 1), **linear("backbone.last_linear", 2, 2048)},
    ),
    "EfficientNet": (
        ["backbone.last_layer"],
        {"backbone.efficientnet._conv_head.weight": (1792, 448, 1, 1), **linear("backbone.last_layer", 2, 1792)},
    ),
    "timm's MobileNetV3": (["classifier"], {"conv_head.weight": (1280, 960, 1, 1), **linear("classifier", 2, 1280)}),
    "inception_resnet_v2": (["classif"], {"block8.conv2d.weight": (2080, 448, 1, 1), **linear("classif", 2, 1536)}),
    "distilled": (["head", "head_dist"], {**tower(""), **linear("head", 2, WIDE), **linear("head_dist", 2, WIDE)}),
    "UCF": (
        ["head_spe.mlp.2", "head_sha.mlp.2"],
        {
            **{f"{head}.mlp.0.weight": (512, 512) for head in ("head_spe", "head_sha")},
            **linear("head_spe.mlp.2", 5, 512),
            **linear("head_sha.mlp.2", 2, 512),
            "con_gan.conv.weight": (3, 512, 3, 3),
        },
    ),
    "ese_vovnet": (["head.fc"], {**BLOCKS, **linear("head.fc", 2, 1024)}),
    "selecsls": (
        ["fc"],
        {"head.3.0.weight": (1024, 1280, 1, 1), "head.3.1.weight": (1024,), **linear("fc", 2, 1024)},
    ),
    "sequencer": (
        ["head"],
        {f"stages.0.{i}.rnn_tokens.fc.weight": (192, 384) for i in range(2)} | linear("head", 2, 384),
    ),
    "VGG": (
        ["classifier.6"],
        linear("classifier.0", 4096, 25088) | linear("classifier.3", 4096, 4096) | linear("classifier.6", 2, 4096),
    ),
    "MesoNet": (["fc2"], {"conv1.weight": (8, 3, 3, 3), **linear("fc1", 16, 1024), **linear("fc2", 2, 16)}),
    "layers in a list": (["4"], linear("0", 256, 784) | linear("2", 128, 256) | linear("4", 2, 128)),
    "timm's DLA": (["fc"], {"base_layer.0.weight": (16, 3, 7, 7), "fc.weight": (2, 1024, 1, 1), "fc.bias": (2,)}),
    "GoogLeNet": (
        ["fc"],
        linear("aux1.fc1", 1024, 2048) | linear("aux1.fc2", 2, 1024) | linear("fc", 2, 1024),
    ),
    "a bare tower": ([], tower("vision_model.")),
    "an embedding as wide as its features": ([], {**tower(""), **linear("head", WIDE, WIDE)}),
    "MobileFaceNet": ([], {"conv.weight": (512, 64, 1, 1), **linear("linear", 128, 512), "bn.weight": (128,)}),
    "a narrow sequence": ([], linear("0", 16, 100) | linear("2", 3, 16)),
    "a bare tower's projections": (
        [],
        {**tower("vision_model."), "visual_projection.weight": (768, WIDE), "text_projection.weight": (768, 768)},
    ),
    "open_clip's": ([], {**tower("visual."), "visual.proj": (WIDE, 768), "visual.head.proj.weight": (512, WIDE)}),
    "pooling by attention": (
        [],
        {
            **tower("vision_model."),
            "vision_model.head.probe": (1, 1, WIDE),
            "vision_model.head.attention.out_proj.weight": (WIDE, WIDE),
            **linear("vision_model.head.mlp.fc1", 4304, WIDE),
            **linear("vision_model.head.mlp.fc2", WIDE, 4304),
        },
    ),
    "a language model": ([], {**tower("model."), "lm_head.weight": (32000, WIDE)}),
    "a headless selecsls": ([], {"head.3.0.weight": (1024, 1280, 1, 1), "head.3.1.weight": (1024,)}),
}


@pytest.mark.parametrize("order", [list, sorted], ids=["in order", "sorted"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_classifier_is_where_the_network_ends(name, order):
    wanted, shapes = NETWORKS[name]
    found = head_names({key: shapes[key] for key in order(shapes)})
    there = {f"{module}.{one}" for module in wanted for one in ("weight", "bias")} & shapes.keys()
    assert set(found) == there
    matrices = [key for key in found if len(shapes[key]) > 1]
    assert found[: len(matrices)] == matrices


SHAPES = {"blocks.0.weight": (40, 30), "blocks.0.bias": (40,), "head.weight": (2, 40), "head.bias": (2,)}


def test_a_mean_head_stands_outside_of_everything():
    base, experts = checkpoints(3, shapes=SHAPES, scales=[1.0, 1.5, 0.7])
    for expert in experts:  # a head that would drown the rest
        expert["head.weight"] *= 50
    merged = merge(base, experts)
    for name in ("head.weight", "head.bias"):
        mean = torch.stack([expert[name].double() for expert in experts]).mean(0)
        assert torch.equal(merged[name], mean.float())
    trunk = ("blocks.0.weight", "blocks.0.bias")
    alone = merge({name: base[name] for name in trunk}, [{name: one[name] for name in trunk} for one in experts])
    assert all(torch.equal(merged[name], alone[name]) for name in trunk)
    analysis = analyze(base, experts)
    assert analysis.plan.heads == ("head.weight", "head.bias")
    assert analysis.report()["head"] == ["head.weight", "head.bias"]


def test_other_methods_merge_the_head_like_the_rest():
    base, experts = checkpoints(3, shapes=SHAPES)
    for config in (MergeConfig.task_arithmetic(0.7), MergeConfig.cart(), MergeConfig.r2m(head="merge")):
        assert analyze(base, experts, config).plan.heads == ()
    assert distance(merge(base, experts, head="merge"), merge(base, experts)) > 0


def test_a_head_that_is_kept_tied_or_the_bases_own_business_is_not_taken():
    base, experts = checkpoints(2, shapes=SHAPES)
    assert analyze(base, experts, keep=("head.*",)).plan.heads == ()
    for state in (base, *experts):
        state["embed.weight"] = state["head.weight"]
    assert analyze(base, experts).plan.heads == ()
    bare = {name: tensor for name, tensor in base.items() if not name.startswith(("head", "embed"))}
    found = analyze(bare, experts, extra="average").plan
    assert "head.bias" in found.heads
    assert {tensor.role for tensor in found.tensors if tensor.name in found.heads} == {"extra"}
