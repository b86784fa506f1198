"""Models as they were asked for: a checkpoint as a detector, or one with adapters, and what it takes pictures to be."""

from __future__ import annotations

from typing import Any

from torch import nn

from r2m.checkpoints import hub
from r2m.evaluation.detectors import load_detector
from r2m.evaluation.ensemble import Ensemble, load_ensemble
from r2m.evaluation.request import Request
from r2m.preprocessing import Preprocessing
from r2m.preprocessing_files import stated
from r2m.recipe import Arrangement
from r2m_kernels.errors import BadOption


def load(name: str, path: str, request: Request, adapters: bool) -> nn.Module | Ensemble:
    """A detector in evaluation mode.

    Args:
        name: of the model, for error messages.
        path: of its checkpoint.
        request: what it is the weights of, and how they are called.
        adapters: whether it is one with adapters.

    Raises:
        InvalidInput: it cannot be loaded.
    """
    if not request.detector:
        raise BadOption(f"model '{name}' ({path}): expected --detector, which says what it is the weights of")
    made = load_ensemble if adapters else load_detector
    return made(request.detector, path, f"model '{name}' ({path})", Arrangement(preset=request.preset))


def preprocessing_of(name: str, path: str, request: Request, of: str | None = None) -> Preprocessing:
    """What was asked for, on top of what stands beside the checkpoint or, of an expert, beside the merge.

    Args:
        name: of the model, for error messages.
        path: of its checkpoint.
        request: what was asked for.
        of: the merge that is judged beside it.

    Raises:
        InvalidInput: it is not known, or not done here.
    """
    asked = {"size": request.size, "mean": _triple("mean", request.mean), "std": _triple("std", request.std)}
    given: dict[str, Any] = {field: one for field, one in asked.items() if one is not None}
    stored = None if len(given) == len(asked) else stated(hub.local(path))
    if stored is None and of is not None and len(given) < len(asked):
        stored = stated(hub.local(of))
    if stored is None:
        missing = [f"--{field}" for field in asked if field not in given]
        if missing:
            raise BadOption(
                f"model '{name}' ({path}): its preprocessing is not known: nothing beside it says it; expected "
                f"{', '.join(missing)}"
            )
        return Preprocessing.of(**given)
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
