"""A commented recipe for checkpoints at hand (``r2m init``): what they are, and which preset makes them fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from r2m.arrangement import Arranged, arrange, fitting
from r2m.checkpoints import hub
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.reader import open_checkpoint
from r2m.detector_kinds import check, placed, recognised
from r2m.inspection import family
from r2m.naming import name_experts
from r2m.preprocessing import common
from r2m.preprocessing_files import beside
from r2m.presets import PRESETS
from r2m.recipe import OUTPUT, Arrangement
from r2m_kernels import MergeConfig
from r2m_kernels.config import METHODS, OFFERED
from r2m_kernels.errors import InvalidInput, printable, quoted
from r2m_kernels.heads import classifier


def starter(base: str, words: Sequence[str], to: Path, detector: str | None = None) -> str:
    """The text of a recipe.

    Args:
        base: a checkpoint.
        words: ``[NAME=]PATH`` of the experts.
        to: where the recipe will be; its paths are relative to that directory.
        detector: what the checkpoints are weights of; None: what files beside them say.

    Raises:
        InvalidInput: a checkpoint cannot be read, or they do not fit whatever the preset.
    """
    experts = name_experts(words)
    origin = open_checkpoint(base, f"base ({printable(base)})")
    sources = {
        name: open_checkpoint(path, f"expert {quoted(name)} ({printable(path)})", adapters=True)
        for name, path in experts.items()
    }
    preset, arranged = _fitting(origin, sources)
    directory = to.parent
    lines = [
        f"# r2m merge {printable(str(to))} --out merged",
        "# Paths are relative to this file; hf://owner/name works too. `r2m schema` prints a JSON schema for editors.",
        f"base_model: {_text(_relative(base, directory))}  # {_described(origin)}",
        "models:",
    ]
    for name, path in experts.items():
        lines.append(f"  - model: {_text(_relative(path, directory))}  # {_described(sources[name])}")
        lines.append(f"    name: {_text(name)}")
        lines.append("    # weight: 2  # counts as two specialists")
    lines += [
        "merge_method: r2m",
        *(f"#   {name}: {printable(one.title)}" for name, one in {**OFFERED, **METHODS.load_others()[0]}.items()),
        "parameters: {}",
        "#   rank: 0.2  # or by name: [{filter: '*attn*', value: 0.2}, {value: 0.4}]",
        "#   exclude: ['*.embeddings.*']  # kept out of subspace and truncation",
        *(f"# {name}: {OUTPUT[name].choices[1]}  # {OUTPUT[name].sentence}" for name in ("dtype", "format")),
    ]
    lines.append(f"preset: {preset}  # {PRESETS[preset].title}" if preset else "# preset: df40  # `r2m merge --help`")
    heads = classifier(next(iter(arranged.experts.values())).specs)
    what = f"{printable(heads[0])}, …" if heads else "none was found; head_tensors: [GLOB, …] names it"
    lines.append(f"# head: mean  # or merge, base, expert:NAME; the classifier: {what}")
    lines.append(_detector(detector, (base, *experts.values()), directory))
    lines.append(_preprocessing({name: path for name, path in experts.items() if not hub.is_reference(path)}))
    return "\n".join(lines) + "\n"


def _fitting(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> tuple[str | None, Arranged]:
    """The preset they need, if any."""
    config = MergeConfig()
    try:
        return None, arrange(base, experts, config, Arrangement())
    except InvalidInput:
        needed = fitting(base, experts, config, Arrangement())
        if needed is None:
            raise
        return needed


def _detector(detector: str | None, paths: Sequence[str], directory: Path) -> str:
    """As it was asked for, or as the first says beside whom it stands; transformers' is recognised at any time."""
    if detector is not None:
        check("--detector", detector)
    places = (Path(path) for path in paths if not hub.is_reference(path))
    found = detector or next(filter(None, map(recognised, places)), None)
    if found is None or (found == "transformers" and detector is None):
        return "# detector: timm:NAME  # what evaluate and detect run it as; also transformers, clip:DIR and others"
    return f"detector: {_text(placed(found, lambda path: _relative(path, directory)))}"


def _preprocessing(experts: Mapping[str, str]) -> str:
    try:
        shared = common({name: beside(path) for name, path in experts.items()}, None)
    except InvalidInput as error:
        return f"# {printable(str(error))}"
    if shared is not None:
        return f"# preprocessing, from the experts' directories: {shared}"
    return "# preprocessing: {size: 224, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}  # goes with the merged model"


def _described(source: Checkpoint) -> str:
    if source.adapter is not None:
        return source.adapter.title
    shapes = {name: spec.shape for name, spec in source.specs.items()}
    return f"{family(shapes) or 'unknown family'}, {len(shapes)} tensor{'s' * (len(shapes) != 1)}"


def _relative(path: str, directory: Path) -> str:
    return path if hub.is_reference(path) else os.path.relpath(path, directory)


def _text(value: str) -> str:
    """As YAML on one line."""
    return yaml.safe_dump(value, allow_unicode=False, width=10**6, default_style='"').strip()
