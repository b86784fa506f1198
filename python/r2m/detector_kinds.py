"""What checkpoints are the weights of, as options and recipes say it, and as files beside a checkpoint do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from r2m.places import read_beside
from r2m.preprocessing_files import CONFIG, OPEN_CLIP
from r2m_kernels.errors import BadOption, quoted

KINDS: Mapping[str, str] = {"transformers": "", "clip": "DIR", "timm": "NAME", "open_clip": "NAME"}  # and what follows
FORMS = ", ".join(":".join(filter(None, one)) for one in KINDS.items()) + " or MODULE:FUNCTION"
WHAT = (
    "What checkpoints are weights of: transformers; clip:DIR (DF40, DeepfakeBench; DIR: its CLIP's config.json); "
    "timm:NAME; open_clip:NAME; MODULE:FUNCTION, which gives a torch module."
)
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check(name: str, kind: object) -> str:
    """A detector as an option or a recipe has it.

    Raises:
        BadOption: it is none of them.
    """
    if isinstance(kind, str):
        library, _, argument = kind.partition(":")
        if (bool(argument) == bool(KINDS[library])) if library in KINDS else _MODULE.fullmatch(kind):
            return kind
    raise BadOption(f"{name}: expected {FORMS}, got {quoted(str(kind)[:80])}")


def placed(kind: str, place: Callable[[str], str]) -> str:
    """With the path in it, if there is one, as somebody else has it."""
    library, _, argument = kind.partition(":")
    is_path = library == "clip" or (library == "open_clip" and "/" in argument and not argument.startswith("hf-hub:"))
    return f"{library}:{place(argument)}" if is_path else kind


def recognised(checkpoint: Path) -> str | None:
    """What the files beside a checkpoint say it is, if they do."""
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    config = read_beside(directory / CONFIG)
    if isinstance(config.get("architecture"), str):
        return f"timm:{config['architecture']}"
    if "model_type" in config and checkpoint.is_dir():
        return "transformers"
    return f"open_clip:{directory}" if "model_cfg" in read_beside(directory / OPEN_CLIP) else None
