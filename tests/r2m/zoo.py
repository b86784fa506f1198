"""Detectors made and judged by the libraries that people make them with; run by test_zoo.py in their environment.

``zoo.py make DIR`` saves for each kind a base and three experts as these libraries do. ``zoo.py check DIR`` loads
DIR/KIND/merged with ``strict=True`` and compares its forward pass with that of the mean, taken by hand. ``zoo.py
evaluate DIR`` runs ``r2m evaluate`` and ``detect`` on such detectors.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

# PyPI's torchvision holds operators for another build of torch; these two are looked up when it is imported.
for operator in ("nms", "qnms"):
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402
from safetensors.torch import load_file, load_model, save_file  # noqa: E402
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification  # noqa: E402

State = Mapping[str, Tensor]
EXPERTS = ("fs", "fr", "efs")
SIZE = 32

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 99}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": SIZE,
    "patch_size": 8,
}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1},
}


def clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


class Detector(nn.Module):
    """As DeepfakeBench and DF40 build theirs: CLIP's vision tower and a linear head on what it pools."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = clip().vision_model
        self.head = nn.Linear(VISION["hidden_size"], 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).pooler_output)


class Factored(nn.Module):
    """Effort's layer: a frozen weight, what was trained as U diag(S) V, and the factors of the frozen part."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        m, n = linear.weight.shape
        rank = min(m, n) - 1
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.weight_main = nn.Parameter((u[:, :rank] * s[:rank]) @ v[:rank], requires_grad=False)
        self.bias = linear.bias
        self.U_residual, self.V_residual = nn.Parameter(u[:, rank:]), nn.Parameter(v[rank:])
        self.S_residual = nn.Parameter(s[rank:])
        for name, value in (("U_r", u[:, :rank]), ("S_r", s[:rank]), ("V_r", v[:rank])):
            setattr(self, name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        change = self.U_residual @ torch.diag(self.S_residual) @ self.V_residual
        return nn.functional.linear(x, self.weight_main + change, self.bias)


class EffortDetector(Detector):
    """A detector whose attention is factored."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.backbone.encoder.layers:
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(layer.self_attn, name, Factored(getattr(layer.self_attn, name)))


@dataclass(frozen=True)
class Kind:
    """How one is made, saved and run.

    Attributes:
        build: a model with random weights.
        options: of ``r2m merge``, beside base and experts.
        ending: of the files; "" for directories of transformers.
        wrapped: how an expert's state dict is put into its file, by expert.
        mean_of: an expert's tensors as they are averaged by hand.
        base: makes the base, where it is another kind of model.
    """

    build: Callable[[], nn.Module]
    options: tuple[str, ...] = ()
    ending: str = ".pth"
    wrapped: Mapping[str, Callable[[State], Any]] | None = None
    base: Callable[[], nn.Module] | None = None


def ddp(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def df40(state: State) -> State:
    renamed = {name.replace("backbone.", "base_model.", 1): tensor for name, tensor in state.items()}
    return {name.replace("head.", "classifier.", 1): tensor for name, tensor in renamed.items()}


def svdd(state: State) -> Any:
    return {"R": torch.tensor(0.5), "c": torch.zeros(8), "state_dict": state}


WRAPPED = {"fs": ddp, "fr": df40, "efs": svdd}
PTH = ("--format", "pth")
KINDS: dict[str, Kind] = {
    "deepfakebench": Kind(Detector, ("--preset", "df40", *PTH), wrapped=WRAPPED, base=clip),
    "effort": Kind(EffortDetector, ("--preset", "effort", *PTH), wrapped={"fs": ddp}, base=clip),
    "timm_vit": Kind(
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=SIZE, patch_size=8, depth=2), PTH
    ),
    "timm_efficientnet": Kind(lambda: timm.create_model("efficientnet_b0", num_classes=2), PTH),
    "timm_xception": Kind(lambda: timm.create_model("legacy_xception", num_classes=2), (), ".safetensors"),
    "torchvision_efficientnet": Kind(lambda: torchvision.models.efficientnet_b0(num_classes=2), PTH),
    "open_clip": Kind(lambda: open_clip.CLIP(**OPEN_CLIP), (), ".safetensors"),
    "transformers_clip": Kind(clip, ("--max-shard-size", "50kB"), ""),
    "transformers_vit": Kind(lambda: ViTForImageClassification(ViTConfig(**VISION, num_labels=2)), (), ""),
}


def make(directory: Path) -> None:
    for number, (name, kind) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        place = directory / name
        place.mkdir(parents=True)
        start = (kind.base or kind.build)()
        if kind.base is None:
            save(start, place / f"base{kind.ending}", kind.ending)
        else:
            start.save_pretrained(place / "base")
        for expert in EXPERTS:
            model = kind.build()
            if kind.base is not None:
                load_tower(model, start)
            else:
                model.load_state_dict(start.state_dict())
            disturb(model)
            wrap = (kind.wrapped or {}).get(expert, dict)
            save(model, place / f"{expert}{kind.ending}", kind.ending, wrap)
    print(json.dumps({name: [list(kind.options), kind.ending, kind.base is not None] for name, kind in KINDS.items()}))


def load_tower(model: nn.Module, base: CLIPModel) -> None:
    """The base's vision tower into a detector, factored or not."""
    plain = Detector()
    plain.backbone.load_state_dict(base.vision_model.state_dict())
    if isinstance(model, EffortDetector):
        for layer in plain.backbone.encoder.layers:
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(layer.self_attn, name, Factored(getattr(layer.self_attn, name)))
    model.backbone.load_state_dict(plain.backbone.state_dict())


def disturb(model: nn.Module) -> None:
    """What fine-tuning and its data do to parameters and statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer *= 1 + 0.2 * torch.rand_like(buffer)
            elif name.endswith("running_mean"):
                buffer += 0.1 * torch.randn_like(buffer)
            elif name.endswith("num_batches_tracked"):
                buffer += 7


def save(model: nn.Module, path: Path, ending: str, wrap: Callable[[State], Any] = dict) -> None:
    if not ending:
        model.save_pretrained(path)
    elif ending == ".pth":
        torch.save(wrap(model.state_dict()), path)
    else:
        save_file(model.state_dict(), path)


def load(path: Path, kind: Kind) -> nn.Module:
    """The merged model as its users load it, strictly."""
    if not kind.ending:
        return type(kind.build()).from_pretrained(path).eval()
    model = kind.build()
    if (path / "model.pth").exists():
        model.load_state_dict(torch.load(path / "model.pth", weights_only=True), strict=True)
    else:
        load_model(model, path / "model.safetensors", strict=True)
    return model.eval()


def mean(directory: Path, kind: Kind) -> nn.Module:
    """The experts' mean by hand; counters and other integers are the base's, or the first expert's."""
    models = []
    for expert in EXPERTS:
        path = directory / f"{expert}{kind.ending}"
        if not kind.ending:
            models.append(type(kind.build()).from_pretrained(path))
            continue
        saved = load_file(path) if kind.ending == ".safetensors" else torch.load(path, weights_only=True)
        saved = saved.get("state_dict", saved)
        model = kind.build()
        undone = {
            name.removeprefix("module.").replace("base_model.", "backbone.", 1).replace("classifier.", "head.", 1)
            if kind.wrapped
            else name: tensor
            for name, tensor in saved.items()
        }
        model.load_state_dict(undone, strict=True)
        models.append(model)
    for model in models:
        for module in list(model.modules()):
            if isinstance(module, Factored):
                with torch.no_grad():
                    module.weight_main += module.U_residual @ torch.diag(module.S_residual) @ module.V_residual
                    module.S_residual.zero_()
    result, states = models[0], [model.state_dict() for model in models]
    averaged = {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }
    result.load_state_dict(averaged, strict=True)
    return result.eval()


def output(model: nn.Module) -> Tensor:
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        if isinstance(model, CLIPModel):
            found = model.vision_model(images).pooler_output
        elif isinstance(model, open_clip.CLIP):
            found = model.encode_image(images)
        else:
            found = model(images)
    return found if isinstance(found, Tensor) else found.logits


def check(directory: Path) -> None:
    found = {}
    for name, kind in KINDS.items():
        merged, expected = output(load(directory / name / "merged", kind)), output(mean(directory / name, kind))
        first = output(load_expert(directory / name, kind))
        size = float((first - expected).abs().max())
        found[name] = {"difference": float((merged - expected).abs().max()), "from the first expert": size}
    print(json.dumps(found))


def load_expert(directory: Path, kind: Kind) -> nn.Module:
    """The first expert alone: what a merge must not be."""
    if not kind.ending:
        return type(kind.build()).from_pretrained(directory / "fs").eval()
    path = directory / f"fs{kind.ending}"
    saved = load_file(path) if kind.ending == ".safetensors" else torch.load(path, weights_only=True)
    model = kind.build()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in saved.items()}, strict=True)
    return model.eval()


class OpenClipDetector(nn.Module):
    """An image tower of open_clip and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = open_clip.create_model("r2m-tiny", load_weights=False).visual
        self.head = nn.Linear(OPEN_CLIP["embed_dim"], 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.visual(images))


def one_logit() -> nn.Module:
    return timm.create_model("efficientnet_b0", num_classes=1)


def evaluate(directory: Path) -> None:
    """``r2m evaluate`` and ``detect`` on detectors of each library, beside probabilities of their own forward pass."""
    from r2m.commands.main import main

    (directory / "r2m-tiny.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(directory / "r2m-tiny.json")
    dice = np.random.default_rng(0)
    paths = [directory / "set" / label / f"{number}.png" for label in ("real", "fake") for number in range(3)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(path)
    images = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(path), np.float32).transpose(2, 0, 1)) for path in paths]
    )
    base = directory / "deepfakebench" / "base"
    runs = {
        "clip": (f"clip:{base}", Detector, directory / "clip.pth"),
        "effort": (f"clip:{base} --preset effort", EffortDetector, directory / "effort.pth"),
        "timm": ("timm:efficientnet_b0", KINDS["timm_efficientnet"].build, directory / "timm.pth"),
        "timm, one logit": ("timm:efficientnet_b0", one_logit, directory / "one.pth"),
        "open_clip": ("open_clip:r2m-tiny", OpenClipDetector, directory / "open_clip.pth"),
        "transformers": ("transformers", KINDS["transformers_vit"].build, directory / "vit"),
    }
    found = {}
    for name, (kind, build, path) in runs.items():
        torch.manual_seed(1)
        model = build()
        save(model, path, path.suffix)
        with torch.no_grad():
            expected = model.eval()((images / 255 - 0.5) / 0.25)
        logits = expected if isinstance(expected, Tensor) else expected.logits
        out = directory / f"evaluated-{name}"
        given = ["--detector", *kind.split(), "--size", str(SIZE), "--mean", "0.5", "--std", "0.25"]
        pictures = str(directory / "set")
        words = ["evaluate", "--model", str(path), *given, "--data", pictures, "--out", str(out), "--bootstrap", "5"]
        code = main(words)
        with contextlib.redirect_stdout(io.StringIO()) as told:
            main(["detect", str(path), pictures, *given, "--json"])
        detected = {row["file"]: row["score"] for row in map(json.loads, told.getvalue().splitlines())}
        rows = {row["path"]: float(row["probability"]) for row in csv.DictReader((out / "scores-1.csv").open())}
        theirs = [rows[str(path)] for path in paths]
        of_fake = logits.double().flatten().sigmoid() if logits.shape[1] == 1 else logits.double().softmax(1)[:, 1]
        difference = (torch.tensor(theirs) - of_fake).abs().max()
        found[name] = {"code": code, "difference": float(difference), "spread": max(theirs) - min(theirs)}
        found[name]["detected"] = max(abs(detected[one] - score) for one, score in rows.items())
    print(json.dumps(found))


if __name__ == "__main__":
    {"make": make, "check": check, "evaluate": evaluate}[sys.argv[1]](Path(sys.argv[2]))
