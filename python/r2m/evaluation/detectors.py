"""Detectors as their users run them: built by a library or a function of the user's, weights loaded strictly."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2m.arrangement import plain
from r2m.checkpoints.layout import some
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.view import View
from r2m.extras import need
from r2m.recipe import Arrangement
from r2m_kernels.errors import BadOption, DoesNotFit, InvalidInput, NotFinite, printable, quoted

KINDS = "transformers, clip:DIR, timm:NAME, open_clip:NAME or MODULE:FUNCTION"
CLASSES = 2


def load_detector(kind: str, checkpoint: str | Path, label: str, arrangement: Arrangement | None = None) -> nn.Module:
    """A detector in evaluation mode.

    Args:
        kind: ``transformers``: the checkpoint is a directory with ``config.json``; ``clip:DIR``: DeepfakeBench's and
            DF40's, a vision tower as ``backbone`` and a linear ``head``, DIR having transformers' configuration of the
            CLIP; ``timm:NAME``; ``open_clip:NAME``: its image tower as ``visual`` and a linear ``head``; or
            ``MODULE:FUNCTION``, which is imported (also from the current directory) and gives a module.
        checkpoint: whatever ``r2m merge`` reads.
        label: how error messages name it.
        arrangement: under which names the weights are loaded; not with ``transformers``.

    Raises:
        InvalidInput: no such library, function or architecture, or weights that do not fit it strictly.
    """
    name, _, argument = kind.partition(":")
    if name == "transformers" and not argument:
        # It knows its checkpoints' names, which are not always its modules'.
        return _with("transformers", lambda library: _from_transformers(library, checkpoint, label), label, kind).eval()
    if name == "clip" and argument:
        model = _with("transformers", lambda library: Clip(library, argument), label, kind)
    elif name == "timm" and argument:
        model = _with("timm", lambda library: library.create_model(argument, num_classes=CLASSES), label, kind)
    elif name == "open_clip" and argument:
        model = _with("open_clip", lambda library: OpenClip(library, argument), label, kind)
    elif name and argument:
        model = _built(name, argument, label)
    else:
        raise BadOption(f"{label}: detector {quoted(kind)}: expected {KINDS}")
    _load(model, plain(open_checkpoint(checkpoint, label), arrangement or Arrangement()), kind)
    return model.eval()


def probabilities(output: Any, label: str) -> Tensor:
    """(n,) of fake, from what a detector gave for n images.

    Logits (n, 2), fake second, or (n, 1) or (n,); also as ``logits`` or ``cls`` of a mapping or an object, or ready as
    its ``prob``, as DeepfakeBench's detectors give them.

    Raises:
        InvalidInput: anything else, or no numbers.
    """
    if not isinstance(output, Tensor):
        held = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
        if isinstance(held.get("prob"), Tensor):
            return _finite(held["prob"].flatten().double(), label)
        output = held.get("logits", held.get("cls"))
    if not isinstance(output, Tensor) or output.ndim not in (1, 2) or output.shape[1:] not in ((), (1,), (CLASSES,)):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadOption(f"{label}: expected logits of shape (n, 2), (n, 1) or (n,), got {got}")
    logits = output.double()
    if logits.shape[1:] == (CLASSES,):
        return _finite(logits.softmax(1)[:, 1], label)
    return _finite(logits.flatten().sigmoid(), label)


def _finite(values: Tensor, label: str) -> Tensor:
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise NotFinite(f"{label}: gave probabilities that are NaN or not from 0 to 1")
    return values


class Clip(nn.Module):
    """A CLIP vision tower and a linear head on what it pools."""

    def __init__(self, library: Any, directory: str) -> None:
        super().__init__()
        config = library.AutoConfig.from_pretrained(directory, local_files_only=True)
        config = getattr(config, "vision_config", config)
        tower = library.CLIPVisionModel(config)
        self.backbone = getattr(tower, "vision_model", tower)
        self.head = nn.Linear(config.hidden_size, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, s, s) to logits (n, 2)."""
        logits: Tensor = self.head(self.backbone(images).pooler_output)
        return logits


class OpenClip(nn.Module):
    """An image tower of open_clip and a linear head on its embedding."""

    def __init__(self, library: Any, name: str) -> None:
        super().__init__()
        self.visual = library.create_model(name, load_weights=False).visual
        self.head = nn.Linear(self.visual.output_dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, s, s) to logits (n, 2)."""
        logits: Tensor = self.head(self.visual(images))
        return logits


def _with(library: str, build: Callable[[Any], Any], label: str, kind: str) -> nn.Module:
    need(f"{label}: detector {quoted(kind)}", None, library)
    try:
        model = build(importlib.import_module(library))
    except InvalidInput:
        raise
    except Exception as error:  # each library has its own
        line = (str(error).strip().splitlines() or [""])[0]
        raise BadOption(f"{label}: detector {quoted(kind)}: {type(error).__name__}: {printable(line)}") from error
    assert isinstance(model, nn.Module)
    return model


def _from_transformers(library: Any, checkpoint: str | Path, label: str) -> Any:
    build = library.AutoModelForImageClassification.from_pretrained
    model, info = build(checkpoint, local_files_only=True, output_loading_info=True)
    for what, names in (("lacks", info["missing_keys"]), ("has other shapes of", info["mismatched_keys"])):
        if names:
            listed = some([name if isinstance(name, str) else name[0] for name in sorted(names, key=str)])
            raise DoesNotFit(f"{label}: does not fit the detector 'transformers': it {what} {listed}")
    return model


def _built(module: str, function: str, label: str) -> nn.Module:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BadOption(f"{label}: detector {module}:{function}: no module {quoted(str(error.name))}") from None
    build = getattr(imported, function, None)
    if not callable(build):
        raise BadOption(f"{label}: detector {module}:{function}: {module} has no function {quoted(function)}")
    model = build()
    if not isinstance(model, nn.Module):
        raise BadOption(f"{label}: detector {module}:{function}: expected a torch module, got {type(model).__name__}")
    return model


def _load(model: nn.Module, view: View, kind: str) -> None:
    """Weights, every one of them; integer buffers may be missing, as they come and go with versions."""
    before = model.state_dict()
    missing = [name for name, one in before.items() if name not in view.specs and one.is_floating_point()]
    strange = [name for name, one in view.specs.items() if name not in before and one.dtype.is_floating_point]
    shapes = [name for name, one in view.specs.items() if name in before and one.shape != tuple(before[name].shape)]
    for what, names in (
        ("lacks", missing),
        ("has, and the detector does not,", strange),
        ("has other shapes of", shapes),
    ):
        if names:
            raise DoesNotFit(f"{view.label}: does not fit the detector {quoted(kind)}: it {what} {some(names)}")
    model.load_state_dict({**before, **{name: view.read(name) for name in view.specs if name in before}}, strict=True)


def as_batch(images: list[Tensor], device: torch.device) -> Tensor:
    """(n, 3, s, s) float32 on the device."""
    return torch.stack(images).to(device)
