"""Adapters made by PEFT on models of several libraries; run by test_adapters.py in their environment.

``zoo_adapters.py make DIR`` saves for each kind a base, three adapters, and the three models that
``merge_and_unload()`` makes of them. ``zoo_adapters.py apart DIR`` merges specialists into a model and adapters, which
PEFT loads on it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.pytorch_utils import Conv1D

EXPERTS = ("fs", "fr", "efs")


class Pooled(nn.Module):
    """Layers that no detector of the others has: an embedding, PyTorch's attention, Conv1D, a 1-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.wide, self.square = Conv1D(24, 16), Conv1D(24, 24)
        self.along = nn.Conv1d(24, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.tokens(indices)
        x = self.square(self.wide(self.attention(x, x, x)[0]))
        return self.head(self.along(x.mT).mean(-1))


@dataclass(frozen=True)
class Kind:
    """A model and the adapters on it.

    Attributes:
        build: the base.
        options: of PEFT's configuration, of all three.
        each: of the second and the third alone.
        whole: whether the base is saved as a directory of transformers.
    """

    build: Callable[[], nn.Module]
    options: Mapping[str, Any]
    each: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default=({}, {}))
    whole: bool = False


def tower() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**zoo.VISION))


KINDS = {
    "timm_vit": Kind(
        zoo.KINDS["timm_vit"].build,
        {"target_modules": ["qkv", "proj", "fc1"], "modules_to_save": ["head"]},
        (
            {"use_rslora": True, "rank_pattern": {"qkv": 6}, "alpha_pattern": {r"blocks\.1\.attn\.qkv": 3}},
            {"bias": "all", "lora_alpha": 1},
        ),
    ),
    "clip_tower": Kind(
        tower,
        {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]},
        ({"use_dora": True}, {"target_modules": ["fc1", "fc2", "patch_embedding"], "use_dora": True}),
        whole=True,
    ),
    "resnet": Kind(
        lambda: zoo.torchvision.models.resnet18(num_classes=2),
        {"target_modules": ["conv1", "conv2", "downsample.0"], "modules_to_save": ["fc"]},
        ({"use_dora": True}, {"lora_bias": True, "target_modules": ["fc"], "modules_to_save": None}),
    ),
    "others": Kind(
        Pooled,
        {"target_modules": ["tokens", "attention", "along"]},
        (
            {"target_modules": ["tokens", "wide", "square"], "use_dora": True, "fan_in_fan_out": True},
            {"target_modules": ["wide", "square", "along"], "fan_in_fan_out": True},
        ),
    ),
    # Its files have other names than its modules.
    "transformers_vit": Kind(
        zoo.KINDS["transformers_vit"].build,
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "modules_to_save": ["classifier", "layernorm_after"]},
        ({"target_modules": "all-linear"}, {"use_dora": True, "bias": "lora_only"}),
        whole=True,
    ),
}


def make(directory: Path) -> None:
    for number, (name, kind) in enumerate(KINDS.items()):
        place = directory / name
        place.mkdir()
        torch.manual_seed(number)
        base = kind.build()
        state = {key: value.clone() for key, value in base.state_dict().items()}
        if kind.whole:
            base.save_pretrained(place / "base")
        else:
            save_file(state, place / "base.safetensors")
        for expert, more in zip(EXPERTS, ({}, *kind.each), strict=True):
            model = kind.build()
            model.load_state_dict(state, strict=True)
            adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **kind.options, **more}))
            trained(adapted)
            adapted.save_pretrained(place / expert)
            merged = adapted.merge_and_unload()
            if kind.whole:
                merged.save_pretrained(place / f"{expert}-unloaded")
            else:
                save_file(contiguous(merged.state_dict()), place / f"{expert}-unloaded.safetensors")
    print(json.dumps({name: kind.whole for name, kind in KINDS.items()}))


# Models that are taken apart.
APART: dict[str, Callable[[], nn.Module]] = {
    "timm_vit": zoo.KINDS["timm_vit"].build,
    "clip_tower": tower,
    "resnet": lambda: zoo.torchvision.models.resnet18(num_classes=2),
    "open_clip": lambda: zoo.open_clip.CLIP(**zoo.OPEN_CLIP).visual,
}
RANK = 6  # of three specialists' residuals, each of rank 2


def apart(directory: Path) -> None:
    """How far PEFT's models are from those that are put together by hand, in bounds, and their outputs."""
    warnings.filterwarnings("error", message=".*(missing|no bias).*")
    found: dict[str, Any] = {}
    for number, (name, build) in enumerate(APART.items()):
        torch.manual_seed(number)
        place, base = directory / name, build().eval()
        place.mkdir()
        states = {expert: specialist(base.state_dict()) for expert in EXPERTS}
        merged = merges(place, base.state_dict(), states)
        images = torch.randn(4, 3, *picture(name), generator=torch.Generator().manual_seed(9))
        about = json.loads((place / "ensemble" / "r2m_report.json").read_text())["adapters"]
        mean, core = (load_file(place / kind / "model.safetensors") for kind in ("ensemble", "merge"))
        bounds, forward = [], []
        # An ensemble, its adapters on one model; and each on one of its own, to look at the weights.
        adapted = with_adapters(loaded(build, mean), place / "ensemble", EXPERTS)
        for expert, state in states.items():
            own = {key: mean[key] if key in about["averaged"] else value for key, value in state.items()}
            rest = {key: truncated(key, expert, states) for key in about["ranks"]}
            expected = own | {key: (mean[key].double() + one).float() for key, one in rest.items()}
            adapted.set_adapter(expert)
            forward += [distance(adapted, loaded(build, one), images) for one in (own, expected)]
            alone = with_adapters(loaded(build, mean), place / "ensemble", [expert])
            bounds.append(beyond(alone.merge_and_unload().state_dict(), expected, mean))
        # A merge: all at once.
        together = with_adapters(loaded(build, core), place / "merge", EXPERTS)
        together.base_model.set_adapter(list(EXPERTS))
        forward.append(distance(together, loaded(build, merged), images))
        bounds.append(beyond(together.merge_and_unload().state_dict(), merged, base.state_dict()))
        # An ensemble of a size, whose layers have ranks of their own: PEFT makes of each what we make of it.
        sized = place / "sized"
        mean = load_file(sized / "model.safetensors")
        for expert in EXPERTS:
            alone = with_adapters(loaded(build, mean), sized, [expert])
            bounds.append(beyond(alone.merge_and_unload().state_dict(), folded(sized, expert), mean))
        ranks = json.loads((sized / "r2m_report.json").read_text())["adapters"]["ranks"]
        sizes = len(set(ranks.values()))
        found[name] = {"beyond": max(bounds), "forward": max(forward), "sizes": sizes, **about}
    print(json.dumps(found | {"transformers_vit": named_otherwise(directory / "transformers_vit")}))


def named_otherwise(place: Path) -> dict[str, Any]:
    """The same of a model whose files have other names than its modules: beside what we make of its adapters."""
    from r2m.commands.main import main
    from r2m.evaluation.ensemble import load_ensemble
    from r2m.recipe import Arrangement

    base, read = zoo.KINDS["transformers_vit"].build(), zoo.ViTForImageClassification.from_pretrained
    base.save_pretrained(place / "base")
    words = ["merge", "--quiet", "--base", str(place / "base"), "--rank", "4", "--whole-up-to", "0"]
    for expert in EXPERTS:
        loaded(zoo.KINDS["transformers_vit"].build, specialist(base.state_dict())).save_pretrained(place / expert)
        words += ["--expert", str(place / expert)]
    out = place / "out"
    assert main([*words, "--format", "adapters", "--out", str(out)]) == 0
    mean, bounds, forward = read(out).eval(), [], []
    ours = load_ensemble("transformers", str(out), "out", Arrangement())
    images = torch.randn(4, 3, zoo.SIZE, zoo.SIZE, generator=torch.Generator().manual_seed(9))
    for expert in EXPERTS:
        folded(out, expert, out)
        expected, alone = read(out / "folded" / expert).eval(), with_adapters(read(out), out, [expert])
        forward += [distance(alone, one, images) for one in (expected, ours.with_adapter(expert))]
        bounds.append(beyond(alone.merge_and_unload().state_dict(), expected.state_dict(), mean.state_dict()))
        assert distance(mean, expected, images) > 1e-3
    about = json.loads((out / "r2m_report.json").read_text())["adapters"]
    return {"beyond": max(bounds), "forward": max(forward), **about}


def merges(place: Path, base: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Both kinds into files; the merge as one model."""
    from r2m.commands.main import main

    save_file(contiguous(base), place / "base.safetensors")
    words = ["merge", "--quiet", "--base", str(place / "base.safetensors"), "--rank", str(RANK), "--svd", "exact"]
    for expert, state in states.items():
        save_file(contiguous(state), place / f"{expert}.safetensors")
        words += ["--expert", f"{expert}={place / expert}.safetensors"]
    apart = ["--format", "adapters", "--adapters"]
    for kind in (["ensemble"], ["merge", "--method", "r2m"]):
        assert main([*words, *apart, *kind, "--out", str(place / kind[0])]) == 0
    assert main([*words, *apart, "ensemble", "--adapter-size", "0.25", "--out", str(place / "sized")]) == 0
    assert main([*words, "--out", str(place / "merged")]) == 0
    return load_file(place / "merged" / "model.safetensors")


def folded(out: Path, expert: str, base: Path | None = None) -> dict[str, Tensor]:
    """The model with one of its adapters, as ``r2m merge`` makes it of them; ``base``: of a directory."""
    from r2m.commands.main import main

    words = ["--base", str(base or out / "model.safetensors"), "--expert", f"e={out / 'adapters' / expert}"]
    made = out / "folded" / expert
    assert main(["merge", "--quiet", "--method", "weight_average", *words, "--out", str(made)]) == 0
    return load_file(made / "model.safetensors")


def with_adapters(model: nn.Module, out: Path, experts: Sequence[str]) -> PeftModel:
    first, *others = experts
    adapted = PeftModel.from_pretrained(model, str(out / "adapters" / first), adapter_name=first).eval()
    for expert in others:
        missing = adapted.load_adapter(str(out / "adapters" / expert), expert).missing_keys
        assert not [key for key in missing if f".{expert}." in key], missing
    return adapted


def truncated(name: str, expert: str, states: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """What a specialist has beyond the mean, at rank :data:`RANK`: the short side's leading eigenvectors, float64."""
    own = states[expert][name].double()
    rest = (own - sum(state[name].double() for state in states.values()) / len(states)).flatten(1)
    rest = rest if rest.shape[0] <= rest.shape[1] else rest.T  # a square one is as it is
    leading = torch.linalg.eigh(rest @ rest.T).eigenvectors[:, -RANK:]
    found = leading @ (leading.T @ rest)
    return (found if found.shape == own.flatten(1).shape else found.T).reshape(own.shape)


def picture(name: str) -> tuple[int, int]:
    return (64, 64) if name == "resnet" else (zoo.SIZE, zoo.SIZE)


def specialist(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that floats has moved, matrices by rank 2."""
    state = {}
    for name, tensor in base.items():
        m = tensor.shape[0] if tensor.ndim > 1 else 0
        if not tensor.is_floating_point():
            state[name] = tensor + 7
        elif m and min(m, tensor.numel() // m) > 2:
            left, right = torch.randn(m, 2), torch.randn(2, tensor.numel() // m)
            state[name] = tensor + 0.02 * (left @ right).view(tensor.shape)
        else:
            state[name] = tensor + 0.02 * torch.rand_like(tensor)
    return state


def loaded(build: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    model = build()
    model.load_state_dict(state)
    return model.eval()


def distance(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Between two models' outputs, relative to the second's."""
    with torch.no_grad():
        outputs = [one(images) for one in (model, other)]
    found, expected = (one if isinstance(one, Tensor) else one[-1] for one in outputs)
    return float((found - expected).abs().max() / expected.abs().max())


def beyond(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """By how many times the bound tensors differ: 4 ulp of float32, and a millionth of the update."""
    worst = 0.0
    for name, right in expected.items():
        if right.is_floating_point():
            bound = 4 * 2**-23 * right.abs() + 1e-6 * (right - before[name]).abs().max()
            worst = max(worst, float(((found[name] - right).abs() / bound.clamp_min(1e-30)).max()))
    return worst


def trained(model: nn.Module) -> None:
    """As after some steps: whatever could be trained has moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)


def contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items()}


if __name__ == "__main__":
    {"make": make, "apart": apart}[sys.argv[1]](Path(sys.argv[2]))
