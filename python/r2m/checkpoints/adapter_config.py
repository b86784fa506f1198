"""Adapters of PEFT by their ``adapter_config.json``: what kind one is, how its product is scaled, which base it names.

What cannot be folded into weights, or only into other weights than those of the base that is given, is refused by name.

Reference: ``peft.LoraConfig`` 0.21; rank-stabilised scaling: Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from r2m.places import mapping, read_small
from r2m_kernels.errors import BadCheckpoint, InvalidInput, printable, quoted

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
README = "README.md"
UNLOADED = "merge it into its model and save that: PeftModel.from_pretrained(…).merge_and_unload().save_pretrained(OUT)"

# Kinds by PEFT's names for them, as people call them; others go by PEFT's.
_TITLES = {
    "ADALORA": "AdaLoRA",
    "IA3": "IA³",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "VERA": "VeRA",
    "VBLORA": "VB-LoRA",
    "RANDLORA": "RandLoRA",
    "XLORA": "X-LoRA",
    "FOURIERFT": "FourierFT",
    "LN_TUNING": "layer norm tuning",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "p-tuning",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "TRAINABLE_TOKENS": "trainable tokens",
}
# Kinds that change what a model is fed, and none of its weights.
_PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "ADAPTION_PROMPT", "CPT")
# Fields of a LoRA's configuration that make it something else than base + scale · B · A.
_VARIANTS = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "megatron_config",
    "arrow_config",
    "use_bdlora",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# How factors may have begun: all of these leave the base's weights as they were.
_BEGINNINGS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_QUANTISED_NAME = re.compile(
    r"(?i)(?:^|[-_./])(bnb|gptq|awq|aqlm|hqq|eetq|nf4|fp4|exl2|gguf|int[48]|w[48]a16|[48][-_]?bits?)(?=[-_./]|$)"
)
_QUANTISED_CARD = re.compile(r"quantization config was used during training|load_in_[48]bit: True")
# A pattern is somebody else's program for a machine that can be kept busy for ever: of those PEFT would take, only ones
# without repeated groups are.
_MOST_PATTERN, _MOST_REPEATS = 200, 2
_PATTERN = re.compile(r"(?:[\w.^$|()\[\]*+-]|\\[.dw])*", re.ASCII)
_MOST_RANK = 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA that can be folded.

    Attributes:
        rank, alpha: of modules that no pattern fits.
        ranks, alphas: pattern of module names → the same of those that it fits.
        stabilised: whether the scale is alpha / √rank and not alpha / rank.
        dora: whether rows have magnitudes of their own (arXiv 2402.09353).
        biased: whether modules have a bias of their own, beside their factors.
        transposed: whether square weights are (in, out).
        base: what its base is called, if it says so.
        digest: SHA-256 of the file.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    stabilised: bool
    dora: bool
    biased: bool
    transposed: bool
    base: str | None
    digest: str

    @property
    def title(self) -> str:
        """What it is called."""
        kind = "DoRA" if self.dora else "LoRA"
        return f"{kind} of PEFT, with rank-stabilised scale" if self.stabilised else f"{kind} of PEFT"

    def rank_of(self, module: str) -> int:
        """Of a module by its name in the model."""
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """By which its product is multiplied."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.stabilised else rank)


def read_config(directory: Path, label: str) -> AdapterConfig:
    """The configuration of a LoRA.

    Args:
        directory: PEFT's.
        label: how error messages name it.

    Raises:
        BadCheckpoint: it is none, or of a kind that is not folded.
        OSError: it cannot be read; ``filename`` is set.
    """
    what = f"{label}: {CONFIG}"
    text = read_small(directory / CONFIG, what, error=BadCheckpoint)
    content = mapping(text, what, BadCheckpoint)
    kind = content.get("peft_type")
    if kind != "LORA":
        _refuse_kind(label, kind if isinstance(kind, str) else "")
    base = content.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    _refuse_variants(label, content)
    _refuse_quantised(label, content, base, directory)
    return AdapterConfig(
        rank=_rank(what, "r", content.get("r", 8)),
        alpha=_number(what, "lora_alpha", content.get("lora_alpha", 8)),
        ranks={key: _rank(what, "rank_pattern", one) for key, one in _patterns(what, content, "rank_pattern")},
        alphas={key: _number(what, "alpha_pattern", one) for key, one in _patterns(what, content, "alpha_pattern")},
        stabilised=content.get("use_rslora") is True,
        dora=content.get("use_dora") is True,
        biased=content.get("lora_bias") is True,
        transposed=content.get("fan_in_fan_out") is True,
        base=base,
        digest=hashlib.sha256(text).hexdigest(),
    )


def _refuse_kind(label: str, kind: str) -> None:
    if not kind:
        raise BadCheckpoint(f"{label}: {CONFIG}: expected a peft_type such as LORA, got none")
    title = _TITLES.get(kind, printable(kind[:40]))
    if kind in _PROMPTS:
        raise BadCheckpoint(f"{label}: is an adapter of PEFT by {title}, which changes no weights: nothing to merge")
    raise BadCheckpoint(f"{label}: is a {title} adapter of PEFT, expected LoRA, rsLoRA or DoRA; {UNLOADED}")


def _refuse_variants(label: str, content: Mapping[str, Any]) -> None:
    variant = next((name for name in _VARIANTS if content.get(name)), None)
    if variant is not None:
        raise BadCheckpoint(f"{label}: is a LoRA with {variant}, which is not folded; {UNLOADED}")
    begun = str(content.get("init_lora_weights", True)).lower()
    if begun not in (*_BEGINNINGS, "loftq"):
        raise BadCheckpoint(
            f"{label}: is a LoRA that began as {quoted(begun[:40])}, which changes the base's own weights; save it "
            "with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _refuse_quantised(label: str, content: Mapping[str, Any], base: str | None, directory: Path) -> None:
    named = _QUANTISED_NAME.search(base) if base else None
    says = ""
    if str(content.get("init_lora_weights")).lower() == "loftq":
        says = f"init_lora_weights in its {CONFIG} is loftq"
    elif content.get("use_qalora"):
        says = f"use_qalora in its {CONFIG}"
    elif named and base:
        says = f"its {CONFIG} names {quoted(base)}"
    elif _QUANTISED_CARD.search(_card(directory)):
        says = f"its {README} says so"
    if says:
        raise BadCheckpoint(
            f"{label}: was trained on a quantised base ({says}), from which its weights differ as from no other; merge "
            "it into that base, dequantise the result, and take that"
        )


def _card(directory: Path) -> str:
    try:
        return read_small(directory / README, README).decode(errors="replace")
    except (OSError, InvalidInput):
        return ""


def _patterns(what: str, content: Mapping[str, Any], field: str) -> list[tuple[str, Any]]:
    patterns = content.get(field) or {}
    if not isinstance(patterns, dict):
        raise BadCheckpoint(f"{what}: {field}: expected patterns of names, got {type(patterns).__name__}")
    for pattern in patterns:
        repeats = len(re.findall(r"(?<!\\)[*+]", pattern))
        plain = _PATTERN.fullmatch(pattern) and repeats <= _MOST_REPEATS and not re.search(r"\)[*+]", pattern)
        try:
            if not plain or len(pattern) > _MOST_PATTERN:
                raise ValueError
            re.compile(pattern)
        except (ValueError, re.error):
            raise BadCheckpoint(
                f"{what}: {field}: expected names or plain patterns of them, got {quoted(pattern[:80])}"
            ) from None
    return list(patterns.items())


def _by_pattern(values: Mapping[str, T], module: str, default: T) -> T:
    """As ``peft.utils.other.get_pattern_key`` looks it up: the first pattern that fits the end of a name."""
    fitting = (one for pattern, one in values.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(fitting, default)


def _rank(what: str, field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_RANK:
        raise BadCheckpoint(f"{what}: {field}: expected a whole number from 1, got {printable(str(value)[:40])}")
    return value


def _number(what: str, field: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise BadCheckpoint(f"{what}: {field}: expected a number, got {printable(str(value)[:40])}")
    return float(value)
