"""Models as they were asked for, or as the recipe of their merge and the files beside them say.

A checkpoint as a detector, or one with adapters; what it takes pictures to be; and which of its outputs is the fake's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from r2m.checkpoints import hub
from r2m.checkpoints.formats import OUTPUTS
from r2m.checkpoints.reader import open_checkpoint
from r2m.detector_kinds import FORMS, recognised
from r2m.evaluation.detectors import load_detector
from r2m.evaluation.ensemble import Ensemble, load_ensemble
from r2m.evaluation.request import Request
from r2m.labels import Classes
from r2m.log_odds import Calibration
from r2m.ownership import RECIPE_FILE
from r2m.places import FileSystemWarning
from r2m.preprocessing import Preprocessing
from r2m.preprocessing_files import stated
from r2m.recipe import Arrangement, Expert, Recipe
from r2m.recipe_file import read_recipe
from r2m_kernels.errors import BadOption, InvalidInput, printable
from r2m_kernels.heads import classifier


@dataclass(frozen=True)
class Fake:
    """Which output stands for fake.

    Attributes:
        index: of the output.
        label: what it is called, where that is known.
        by: who says so.
    """

    index: int
    label: str | None
    by: str

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        called = f" ({printable(self.label)})" if self.label is not None else ""
        return f"fake is output {self.index}{called}, {self.by}"


def kind_of(name: str, path: str, request: Request, of: str | None = None) -> str:
    """What a checkpoint is the weights of: as it was asked for, as its merge's recipe says, or the files beside it.

    Args:
        name: of the model, for error messages.
        path: of its checkpoint.
        request: what was asked for.
        of: the merge that it is an expert of, or beside which it is judged.

    Raises:
        BadOption: nothing says it.
    """
    if request.detector:
        return request.detector
    merges = [recipe for recipe in (_recipe(path), _recipe(of)) if recipe is not None]
    said = next((recipe.detector for recipe in merges if recipe.detector), None)
    beside = [path, *(one.path for recipe in merges for one in recipe.experts.values())]
    places = (Path(hub.local(one)) for one in beside if hub.is_reference(one) or os.path.exists(one))
    found = said or next(filter(None, map(recognised, places)), None)
    if found is None:
        raise BadOption(
            f"model '{name}' ({path}): nothing says what it is the weights of; expected --detector {FORMS}, or a "
            "detector in the recipe of its merge"
        )
    return found


def load(name: str, path: str, request: Request, adapters: bool, of: str | None = None) -> nn.Module | Ensemble:
    """A detector in evaluation mode, of two outputs the second fake.

    Args:
        name, path, request, of: as of :func:`kind_of`.
        adapters: whether it is one with adapters.

    Raises:
        InvalidInput: it cannot be loaded.
    """
    kind, what = kind_of(name, path, request, of), f"model '{name}' ({path})"
    made = load_ensemble if adapters else load_detector
    found = made(kind, path, what, _arrangement(path, request, of))
    if fake_of(name, path, request, of).index == 0:
        (found.model if isinstance(found, Ensemble) else found).register_forward_hook(_turned)
    return found


def fake_of(name: str, path: str, request: Request, of: str | None = None) -> Fake:
    """Which of a detector's outputs is the fake's: as asked for, as the recipe says, or labels beside the checkpoint.

    Arguments are :func:`kind_of`'s.

    Raises:
        BadOption: an output that a detector of one logit does not have.
    """
    what = f"model '{name}' ({path})"
    source = open_checkpoint(path, what, adapters=True)
    outputs = next((source.specs[one].shape[0] for one in classifier(source.specs)), 0)
    if outputs == 1:
        if request.fake == 0:
            raise BadOption(f"--fake 0: {what} has one output, which is the fake's")
        return Fake(1, None, "its only one")
    classes = Classes.beside(source).of(outputs)
    labels = classes.labels
    recipe, expert = _recipe(path), _expert(path, of)
    said = recipe.arrangement.fake if recipe is not None else None if expert is None else expert.fake
    by = {"--fake": request.fake, "as the recipe says": said}
    by[f"as {classes.where} says"] = classes.fake
    others = [] if recipe is None else recipe.experts.values()
    by["as an expert's in the recipe"] = next((one.fake for one in others if one.fake is not None), None)
    index, who = next(((index, who) for who, index in by.items() if index is not None), (1, "by default (--fake)"))
    if index not in (0, 1):
        raise BadOption(f"fake: expected 0 or 1, got {index} for {what}")
    return Fake(index, labels[index] if labels and index < len(labels) else None, who)


def calibration_of(path: str, fake: Fake) -> Calibration | None:
    """What r2m calibrate has folded into a checkpoint that a merge wrote, of the log-odds of fake; None: nothing."""
    recipe = _recipe(path)
    found = None if recipe is None else recipe.calibration
    return found if found is None or fake.index == 1 else replace(found, bias=-found.bias)


def _turned(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """What a detector gives whose first output is the fake's, as one whose second is."""
    if isinstance(output, Tensor):
        return output.flip(1) if output.ndim == 2 else output
    named = output if isinstance(output, Mapping) else vars(output)
    logits = named.get("logits", named.get("cls"))
    return {**named, "logits": logits.flip(1)} if isinstance(logits, Tensor) and logits.ndim == 2 else output


def _arrangement(path: str, request: Request, of: str | None) -> Arrangement:
    """Under which names its weights are loaded: an output of a merge has the names that all were brought to."""
    recipe, merge, expert = _recipe(path), _recipe(of), _expert(path, of)
    if merge is not None and expert is not None and recipe is None:
        rename = {**expert.rename, **merge.arrangement.rename}
        return Arrangement(rename, preset=request.preset or merge.arrangement.preset, key=merge.arrangement.key)
    preset = recipe.arrangement.preset if recipe is not None else None
    return Arrangement(preset=request.preset or preset)


def _expert(path: str, of: str | None) -> Expert | None:
    """What the recipe of a merge says of a checkpoint that it is made of."""
    recipe = _recipe(of)
    experts = [] if recipe is None else recipe.experts.values()
    return next((one for one in experts if os.path.realpath(one.path) == os.path.realpath(path)), None)


def _recipe(path: str | None) -> Recipe | None:
    """Of the merge that wrote a checkpoint, if one did."""
    place = None if path is None or hub.is_reference(path) else Path(path)
    if place is None or not (place.is_dir() or place.name in OUTPUTS):
        return None
    return _read((place if place.is_dir() else place.parent) / RECIPE_FILE)


def _read(file: Path) -> Recipe | None:
    if not file.is_file():
        return None
    try:
        return read_recipe(file)
    except InvalidInput as error:
        warnings.warn(f"{error}; nothing is taken from it", FileSystemWarning, stacklevel=2)
        return None


def preprocessing_of(name: str, path: str, request: Request, of: str | None = None) -> Preprocessing:
    """What was asked for, on top of the recipe's, of what stands beside the checkpoint, or beside its merge.

    Arguments are :func:`kind_of`'s.

    Raises:
        InvalidInput: it is not known, or not done here.
    """
    asked = {"size": request.size, "mean": _triple("mean", request.mean), "std": _triple("std", request.std)}
    given: dict[str, Any] = {field: one for field, one in asked.items() if one is not None}
    if len(given) == len(asked):
        return Preprocessing.of(**given)
    recipe, expert = _recipe(path), _expert(path, of)
    said = recipe.preprocessing if recipe is not None else None if expert is None else expert.preprocessing
    stored = said or stated(hub.local(path))
    if stored is None and of is not None:
        stored = stated(hub.local(of))
    if stored is None:
        missing = ", ".join(f"--{field}" for field in asked if field not in given)
        raise BadOption(
            f"model '{name}' ({path}): its preprocessing is not known: nothing beside it says it; expected {missing}"
        )
    # Another size is another geometry: a square that pictures are resized to.
    kept = ("mean", "std", "resample", "rescale") if "size" in given else tuple(vars(stored))
    return Preprocessing.of(**{field: getattr(stored, field) for field in kept} | given)


def _triple(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        values = [float(one) for one in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise BadOption(f"--{name} {text}: expected a number or three with commas, such as 0.5,0.5,0.5")
    return values
