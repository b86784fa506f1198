"""How the names of known detectors begin, and what makes them one layout with their base: data, not code.

A preset is asked for by name (``--preset``, ``preset:`` in a recipe). Where checkpoints do not fit and one would make
them fit, the message says so; none is ever taken by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Rules of a rename: what a name begins with → what it begins with instead; None: the tensor is left out.
Rules = Mapping[str, str | None]

# What training scripts put before all names: DistributedDataParallel, torch.compile.
_WRAPPED: Rules = {"module.": "", "_orig_mod.": ""}
# The text half of a CLIP, and the projections into the space that both halves share.
_NO_TEXT: Rules = dict.fromkeys(("text_model.", "text_projection.", "visual_projection.", "logit_scale"), None)
# The vision half as transformers 5 saves it alone, without what stands before its names in a whole CLIP.
_TOWER = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
# The text half of an open_clip model, and what both halves share.
_NO_OPEN_TEXT: Rules = {
    "visual.": "visual.",
    **dict.fromkeys(("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection"), None),
    **dict.fromkeys(("text.", "logit_scale", "logit_bias"), None),
}


@dataclass(frozen=True)
class Preset:
    """What becomes of names.

    Attributes:
        title: what it is for, in a few words.
        steps: rules, each set applied to what the one before gave, on base and experts alike.
        experts_layout: the output has the experts' layout: a head that the base lacks is the mean of theirs, and
            integer buffers are there where the experts have them.
        factored: weights of the experts are W + U diag(S) V (:data:`FACTORS`) and are merged as their sum.
    """

    title: str
    steps: tuple[Rules, ...] = field(default=())
    experts_layout: bool = False
    factored: bool = False


# The tensors of an Effort layer, beside its bias: the weight, the factors that were trained, and those that were not.
MAIN, PLAIN = "weight_main", "weight"
FACTORS = ("U_residual", "S_residual", "V_residual")
FROZEN = ("U_r", "S_r", "V_r")

_DF40: tuple[Rules, ...] = (
    _WRAPPED,
    {"base_model.": "backbone.", "classifier.": "head.", "vision_model.": "backbone.", **_NO_TEXT},
    {start: f"backbone.{start}" for start in _TOWER},
)

PRESETS: Mapping[str, Preset] = {
    "wrapped": Preset("names begin with module. or _orig_mod. in some of the files", (_WRAPPED,)),
    "clip_vision": Preset(
        "the vision tower of transformers' CLIP, its text half left out",
        (_WRAPPED, _NO_TEXT, {start: f"vision_model.{start}" for start in _TOWER}),
    ),
    "open_clip_vision": Preset("the vision tower of open_clip, its text half left out", (_WRAPPED, _NO_OPEN_TEXT)),
    "df40": Preset(
        "CLIP detectors of DF40 and DeepfakeBench (backbone.*, head.*), the base transformers' CLIP",
        _DF40,
        experts_layout=True,
    ),
    "effort": Preset(
        "Effort detectors, their residual factors folded into the weights, the base transformers' CLIP",
        _DF40,
        experts_layout=True,
        factored=True,
    ),
}
