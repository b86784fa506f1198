"""Names that transformers 5 has for the tensors of a model, and others for them in its files.

Files keep the names of transformers 4. PEFT names what an adapter changes as the model does, which its base's files do
not.

Reference: ``transformers.conversion_mapping`` 5.24, read from right to left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from r2m.places import mapping
from r2m_kernels.errors import InvalidInput


class Family(NamedTuple):
    """Models with the same names.

    Attributes:
        kinds: by the ``model_type`` of their configurations.
        layers: what comes before a layer's number, in a model and in its files.
        parts: what in a layer has another name in files.
    """

    kinds: tuple[str, ...]
    layers: tuple[str, str]
    parts: Mapping[str, str]


def _attention(inner: str) -> dict[str, str]:
    queries = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    parts = {f"attention.{name}": f"attention.{inner}.{saved}" for name, saved in queries.items()}
    return {**parts, "attention.o_proj": "attention.output.dense"}


_MLP = {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
FAMILIES = (
    Family(
        ("vit", "deit", "beit", "vit_mae", "vivit"),
        ("layers.", "encoder.layer."),
        {**_attention("attention"), **_MLP},
    ),
    Family(("dinov2", "dinov2_with_registers"), ("encoder.layer.", "encoder.layer."), _attention("attention")),
    Family(("swin",), ("blocks.", "blocks."), {**_attention("self"), **_MLP}),
)


def family_of(config: bytes) -> Family | None:
    """That of a model, by what is in its ``config.json``."""
    try:
        kind = mapping(config, "config.json").get("model_type")
    except InvalidInput:
        return None
    return next((family for family in FAMILIES if kind in family.kinds), None)


def in_files(name: str, family: Family) -> str:
    """What files call a module, or a tensor of one, that a model has under a name."""
    return _moved(name, family.layers, family.parts)


def in_models(name: str, family: Family) -> str:
    """What a model calls a module, or a tensor of one, that files have under a name."""
    return _moved(name, family.layers[::-1], {saved: part for part, saved in family.parts.items()})


def _moved(name: str, layers: tuple[str, str], parts: Mapping[str, str]) -> str:
    match = re.fullmatch(rf"((?:.*\.)?){re.escape(layers[0])}(\d+\.)(.+)", name)
    if match is None:
        return name
    before, number, rest = match.groups()
    part = next((part for part in parts if f"{rest}.".startswith(f"{part}.")), "")
    return f"{before}{layers[1]}{number}{parts.get(part, '')}{rest.removeprefix(part)}"
