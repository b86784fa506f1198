"""Detectors as their users run them: built by a library or a function of the user's, weights loaded strictly."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from r2m.arrangement import plain
from r2m.checkpoints import hub
from r2m.checkpoints.layout import some
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.view import View
from r2m.detector_kinds import FORMS
from r2m.extras import look_here, need
from r2m.places import read_beside
from r2m.preprocessing_files import CONFIG
from r2m.recipe import Arrangement
from r2m_kernels.errors import BadOption, DoesNotFit, InvalidInput, NotFinite, printable, quoted
from r2m_kernels.heads import classifier

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
    if not name or not argument:
        raise BadOption(f"{label}: detector {quoted(kind)}: expected {FORMS}")
    arrangement = arrangement or Arrangement()
    view = plain(open_checkpoint(checkpoint, label, arrangement.key), arrangement)
    if name in _LIBRARIES:
        library_name, build = _LIBRARIES[name]
        outputs = _outputs(view)
        place = hub.local(checkpoint)
        model = _with(library_name, lambda library: build(library, argument, outputs, Path(place)), label, kind)
    else:
        model = _built(name, argument, label)
    _load(model, view, kind)
    return model.eval()


def probabilities(output: Any, label: str) -> Tensor:
    """(n,) of fake, from what a detector gave for n images.

    Logits (n, 2), fake second, or (n, 1) or (n,); also as ``logits`` or ``cls`` of a mapping or an object, or ready as
    its ``prob``, as DeepfakeBench's detectors give them.

    Raises:
        InvalidInput: anything else, or no numbers.
    """
    ready = None
    if not isinstance(output, Tensor):
        named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
        ready, output = named.get("prob"), named.get("logits", named.get("cls"))
    if isinstance(ready, Tensor):
        values = ready.flatten().double()
    elif isinstance(output, Tensor) and output.ndim in (1, 2) and output.shape[1:] in ((), (1,), (CLASSES,)):
        logits = output.double()
        values = logits.softmax(1)[:, 1] if logits.shape[1:] == (CLASSES,) else logits.flatten().sigmoid()
    else:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadOption(f"{label}: expected logits of shape (n, 2), (n, 1) or (n,), got {got}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise NotFinite(f"{label}: gave probabilities that are NaN or not from 0 to 1")
    return values


class _Tower(nn.Module):
    """An image tower under a name of its own, and a linear head on what it gives."""

    def __init__(self, name: str, tower: nn.Module, head: nn.Linear, features: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.add_module(name, tower)
        self.head = head
        self._name, self._features = name, features

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, s, s) to logits (n, 2), or (n, 1)."""
        logits: Tensor = self.head(self._features(self.get_submodule(self._name)(images)))
        return logits


def _outputs(view: View) -> int:
    """Of the checkpoint's classifier, where it has one of one logit; else one a class."""
    found = {view.specs[name].shape[0] for name in classifier(view.specs)}
    return 1 if found == {1} else CLASSES


def _clip(library: Any, directory: str, outputs: int, _place: Path) -> nn.Module:
    config = library.AutoConfig.from_pretrained(hub.local(directory), local_files_only=True)
    config = getattr(config, "vision_config", config)
    tower = library.CLIPVisionModel(config)
    tower = getattr(tower, "vision_model", tower)
    return _Tower("backbone", tower, nn.Linear(config.hidden_size, outputs), lambda output: output.pooler_output)


def _timm(library: Any, name: str, outputs: int, place: Path) -> nn.Module:
    """With the arguments that timm's own configuration beside the checkpoint has for this architecture."""
    config = read_beside((place if place.is_dir() else place.parent) / CONFIG)
    arguments = config.get("model_args") if config.get("architecture") == name else None
    model: nn.Module = library.create_model(name, num_classes=outputs, **(arguments or {}))
    return model


def _open_clip(library: Any, name: str, outputs: int, _place: Path) -> nn.Module:
    name = f"local-dir:{name}" if Path(name).is_dir() else name
    tower = library.create_model(name, load_weights=False).visual
    return _Tower("visual", tower, nn.Linear(tower.output_dim, outputs), lambda embedding: embedding)


# What makes a detector of an argument, a number of outputs and the checkpoint, and the library that it is given.
_LIBRARIES: Mapping[str, tuple[str, Callable[[Any, str, int, Path], nn.Module]]] = {
    "clip": ("transformers", _clip),
    "timm": ("timm", _timm),
    "open_clip": ("open_clip", _open_clip),
}


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
    missing, other = (
        [name if isinstance(name, str) else name[0] for name in sorted(info[key], key=str)]
        for key in ("missing_keys", "mismatched_keys")
    )
    _fit("transformers", label, {"lacks": missing, "has other shapes of": other})
    return model


def _built(module: str, function: str, label: str) -> nn.Module:
    look_here()
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
    _fit(
        kind, view.label, {"lacks": missing, "has, and the detector does not,": strange, "has other shapes of": shapes}
    )
    model.load_state_dict({**before, **{name: view.read(name) for name in view.specs if name in before}}, strict=True)


def _fit(kind: str, label: str, misfits: Mapping[str, list[str]]) -> None:
    for what, names in misfits.items():
        if names:
            raise DoesNotFit(f"{label}: does not fit the detector {quoted(kind)}: it {what} {some(names)}")
