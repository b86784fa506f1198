"""Small SigLIP detectors merged by mergekit's and fusion_bench's own commands with our methods, in their environment.

``plugin_merges.py DIR`` writes models, runs both commands on them, and prints what they said, as JSON.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from transformers import SiglipConfig, SiglipForImageClassification, ViTConfig, ViTForImageClassification

EXPERTS = ("fs", "fr", "efs")
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 99}
VISION = {**TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
del VISION["vocab_size"]
LOADED = "transformers.SiglipForImageClassification.from_pretrained"


def sliced(layer: int) -> dict[str, object]:
    """One layer of all models, for mergekit to stack."""
    return {"sources": [{"model": name, "layer_range": [layer, layer + 1]} for name in ("base", *EXPERTS)]}


# name → a configuration of mergekit, or what of one that works is changed.
ASKED: dict[str, dict[str, object]] = {
    "r2m": {"parameters": {"rank": 0.3, "core_mode": "mean"}},
    "tsv_m": {"merge_method": "r2m_tsv_m", "parameters": {"scale": 0.7}},
    "weighted": {"models": [{"model": name, "parameters": {"weight": i + 1}} for i, name in enumerate(EXPERTS)]},
    "bfloat16": {"dtype": "bfloat16"},
    "gradient": {"parameters": {"rank": [0.1, 0.4]}},
    "unknown option": {"parameters": {"core_mode": "median"}},
    "layers moved": {"models": None, "slices": [sliced(1), sliced(0)]},
    "names in memory": {"base_model": "vit/base", "models": [{"model": "vit/fs"}, {"model": "vit/fr"}]},
}


def make(directory: Path, kind: type, config: object) -> None:
    """A base and three models that lie around it."""
    torch.manual_seed(0)
    base = kind(config)
    base.save_pretrained(directory / "base")
    for name in EXPERTS:
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        base.save_pretrained(directory / name)


def run(module: str, *arguments: str) -> str:
    """A command by its module; what it ends with, empty if all went well."""
    with mock.patch.object(sys, "argv", [module, *arguments]):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as error:
            return "" if error.code in (0, None) else f"exit code {error.code}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def main(directory: Path) -> dict[str, str]:
    make(directory, SiglipForImageClassification, SiglipConfig(text_config=TEXT, vision_config=VISION, num_labels=2))
    make(directory / "vit", ViTForImageClassification, ViTConfig(**VISION, num_labels=2))
    pool = {name: {"_target_": LOADED, "pretrained_model_name_or_path": str(directory / name)} for name in EXPERTS}
    pool["_pretrained_"] = {"_target_": LOADED, "pretrained_model_name_or_path": str(directory / "base")}
    said = {}
    for name, change in ASKED.items():
        usual = {"merge_method": "r2m", "base_model": "base", "models": [{"model": expert} for expert in EXPERTS]}
        asked = json.loads(json.dumps({**usual, **change}))
        asked["base_model"] = str(directory / asked["base_model"])
        for one in asked["models"] or [source for slice in asked["slices"] for source in slice["sources"]]:
            one["model"] = str(directory / one["model"])
        recipe = directory / f"{name}.yaml"
        recipe.write_text(json.dumps(asked))  # which YAML reads
        options = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card")
        said[name] = run("r2m.plugins.mergekit", str(recipe), str(directory / f"mergekit {name}"), *options)
    said["fusion_bench"] = run(
        "fusion_bench.scripts.cli",
        "hydra.searchpath=[pkg://r2m.plugins.fusion_bench]",
        *("method=r2m", "+method.options.rank=0.3", "+method.options.core_mode=mean", "taskpool=dummy", "~modelpool"),
        f"+modelpool={{_target_: fusion_bench.BaseModelPool, models: {pool}}}".replace("'", ""),
        f"merged_model_save_path={directory}/fusion_bench.pth",
        *(f"path.log_dir={directory}/logs", f"hydra.run.dir={directory}/hydra", "print_config=false"),
    )
    return said


print(json.dumps(main(Path(sys.argv[1]).resolve())))
