"""Merges described in a file, in mergekit's words where they exist; every merge leaves one that repeats it.

    base_model: base.safetensors
    merge_method: r2m_truncated
    models:
      - model: fs.safetensors
      - model: fr.safetensors
        name: reenactment
        weight: 2
    parameters:
      rank: 0.2
    dtype: bfloat16
    rename:
      module.: ""
      text_model.: null
    preset: df40
    head: mean

Paths are relative to the recipe. ``parameters`` are fields of :class:`r2m_kernels.MergeConfig`, on top of what the
method is. As in mergekit, ``rank`` may be a list of values with filters, globs of names here:
``[{filter: "*.attn.*", value: 0.2}, {value: 0.1}]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from r2m import hub
from r2m.arrangement import Arrangement
from r2m.checkpoints.formats import FORMATS
from r2m.naming import name_experts
from r2m.places import read_small
from r2m.preprocessing import Preprocessing
from r2m.presets import PRESETS
from r2m_kernels import MergeConfig, checks
from r2m_kernels.config import METHODS, OPTIONS, make_config
from r2m_kernels.errors import BadFile, InvalidInput, printable, quoted

DTYPES = ("float32", "bfloat16", "float16", "float64")  # of the output
_MOST_BYTES = 2**20  # of a recipe: hundreds of experts


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Preprocessing(_Strict):
    size: int = Field(description="pixels of a side")
    mean: list[float | int] = Field(description="of the channels, of values in [0, 1]")
    std: list[float | int] = Field(description="of the channels")

    def value(self) -> Preprocessing:
        return Preprocessing.of(self.size, self.mean, self.std)


class _Expert(_Strict):
    model: str = Field(min_length=1, description="checkpoint: a path relative to the recipe, or hf://owner/name")
    name: str | None = Field(None, pattern="^[^=]+$", description="how it is called in the report")
    weight: float | int | None = Field(None, description="in all means; 1 where others have one")
    rename: dict[str, str | None] = Field(default_factory=dict, description="as for all, before those")
    preprocessing: _Preprocessing | None = Field(None, description="what it was trained with")


class _Recipe(_Strict):
    base_model: str = Field(min_length=1, description="the checkpoint all experts started from")
    models: list[_Expert] = Field(min_length=1, description="the experts")
    merge_method: str = Field("r2m", description="how they are merged")
    parameters: dict[str, Any] = Field(default_factory=dict, description="on top of what the method is")
    dtype: str | None = Field(None, description="of the output's floating-point tensors; the base's if left out")
    format: str = Field("safetensors", description="of the output; pth: a state dict of torch.save")
    rename: dict[str, str | None] = Field(
        default_factory=dict,
        description="what names of tensors begin with: what they begin with instead, or null to leave them out",
    )
    preset: str | None = Field(None, description="names as known detectors have them")
    head: str | None = Field(
        None, description="the classifier: mean, base, expert:NAME, refit or refit:logistic; merged if left out"
    )
    head_tensors: list[str] = Field(default_factory=list, description="globs of the classifier's names")
    head_features: str | None = Field(None, description="for refit: a file with features (n, d) and labels (n,)")
    preprocessing: _Preprocessing | None = Field(None, description="of the merged model, whatever the experts have")


@dataclass(frozen=True)
class Recipe:
    """A merge as its file describes it, paths resolved.

    Attributes:
        base: the base's path.
        experts: name → path.
        method: a key of :data:`r2m_kernels.config.METHODS`.
        config: the method's configuration with the recipe's parameters and weights.
        dtype: of the output; ``None``: the base's.
        file_format: a key of :data:`r2m.checkpoints.formats.FORMATS`.
        arrangement: how checkpoints are brought into one layout.
        preprocessing: of the merged model, whatever the experts have.
        expert_preprocessing: what experts are said to have.
    """

    base: str
    experts: dict[str, str]
    method: str
    config: MergeConfig
    dtype: str | None
    file_format: str
    arrangement: Arrangement
    preprocessing: Preprocessing | None = None
    expert_preprocessing: Mapping[str, Preprocessing] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """All of it, as :func:`r2m.execute.open_job` and ``merge_files`` call it."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def read_recipe(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML or JSON file.
        changes: ``KEY=VALUE`` each, dotted keys and YAML values, such as ``parameters.rank=0.2``: they replace what the
            file says.

    Raises:
        InvalidInput: no such file, no YAML, unknown keys, wrong types or values.
    """
    what = f"recipe ({path})"
    content = _loaded(Path(path), what)
    for change in changes:
        _apply(content, change)
    try:
        recipe = _Recipe.model_validate(content)
    except ValidationError as error:
        raise InvalidInput(f"{what}: {_explained(error)}") from None
    directory = Path(path).parent
    words = [_word(expert, directory) for expert in recipe.models]
    if recipe.merge_method not in METHODS:
        near = checks.did_you_mean(recipe.merge_method, METHODS)
        known = ", ".join(METHODS)
        raise InvalidInput(f"{what}: merge_method: expected one of {known}, got {quoted(recipe.merge_method)}{near}")
    parameters = dict(recipe.parameters)
    weights = [expert.weight for expert in recipe.models]
    if any(weight is not None for weight in weights):
        if parameters.get("weights") is not None:
            raise InvalidInput(f"{what}: weights: given both with the models and as a parameter")
        parameters["weights"] = [1.0 if weight is None else weight for weight in weights]
    try:
        config = make_config(recipe.merge_method, {}).replace(**_fields(parameters))
    except InvalidInput as error:
        raise InvalidInput(f"{what}: parameters: {error}") from None
    experts = name_experts(words)
    renames = {name: expert.rename for name, expert in zip(experts, recipe.models, strict=True) if expert.rename}
    features = _beside(directory, recipe.head_features) if recipe.head_features else None
    wanted = Arrangement(recipe.preset, recipe.rename, renames, recipe.head, recipe.head_tensors, features)
    base = _beside(directory, recipe.base_model)
    try:
        chosen = recipe.preprocessing.value() if recipe.preprocessing else None
        own = {
            name: expert.preprocessing.value()
            for name, expert in zip(experts, recipe.models, strict=True)
            if expert.preprocessing
        }
    except InvalidInput as error:
        raise InvalidInput(f"{what}: {error}") from None
    return Recipe(base, experts, recipe.merge_method, config, recipe.dtype, recipe.format, wanted, chosen, own)


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors."""
    found = _Recipe.model_json_schema()
    properties = found["properties"]
    properties["merge_method"]["enum"] = list(METHODS)
    choices = (("preset", (*PRESETS, None)), ("dtype", (*DTYPES, None)), ("format", tuple(FORMATS)))
    for name, values in choices:
        properties[name]["enum"] = list(values)
    options = TypeAdapter(MergeConfig).json_schema()["properties"]
    for name, one in options.items():
        one["description"] = OPTIONS[name].text
    by_name = {
        "filter": {"type": "string", "description": "a glob of names; none: all others"},
        "value": options["rank"],
    }
    item = {"type": "object", "properties": by_name, "required": ["value"], "additionalProperties": False}
    either = [dict(options["rank"]), {"type": "array", "items": item}]
    options["rank"] = {"description": options["rank"]["description"], "anyOf": either}
    properties["parameters"].update(properties=options, additionalProperties=False)
    found["title"] = "A merge, as r2m merge takes it"
    return found


def _loaded(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise BadFile(f"{what}: no such file")
    text = read_small(path, what, _MOST_BYTES)
    try:
        content = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, UnicodeError, ValueError, RecursionError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InvalidInput(f"{what}: not valid YAML{where}: {printable(problem)}") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"{what}: expected keys such as base_model and models, got {type(content).__name__}")
    return content


class PlainLoader(yaml.SafeLoader):
    """YAML without anchors, with which a few lines can stand for gigabytes, and without keys given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the document; an alias is none."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not used in recipes", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys all differ."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {quoted(str(key.value))} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _apply(content: dict[str, Any], change: str) -> None:
    """One ``KEY=VALUE`` into the recipe."""
    key, separator, text = change.partition("=")
    if not separator or not all(key.split(".")):
        raise InvalidInput(f"--set {change}: expected KEY=VALUE, such as parameters.rank=0.2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InvalidInput(f"--set {change}: {text!r} is not a YAML value") from None
    *path, last = key.split(".")
    place: Any = content
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise InvalidInput(f"--set {change}: {key.rpartition('.')[0]} holds no keys")
    place[last] = value


def _explained(error: ValidationError) -> str:
    """The first thing that is wrong, in one clause."""
    first = error.errors(include_url=False)[0]
    *path, last = first["loc"]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        kind: type[BaseModel] = _Expert if path and path[0] == "models" else _Recipe
        known = (_Preprocessing if path and path[-1] == "preprocessing" else kind).model_fields
        holder = f" in {'.'.join(map(str, path))}" if path else ""
        return f"unknown key {quoted(str(last))}{holder}{checks.did_you_mean(str(last), known)}"
    if first["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, got {quoted(str(first['input'])[:80])}"


def _beside(directory: Path, path: str) -> str:
    """A path as the recipe's reader has it."""
    return path if hub.is_reference(path) else str(directory / path)


def _word(expert: _Expert, directory: Path) -> str:
    path = _beside(directory, expert.model)
    return f"{expert.name}={path}" if expert.name else path


def _fields(parameters: dict[str, Any]) -> dict[str, Any]:
    """As the configuration has them: lists as tuples, a rank with filters as pairs."""
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}
    if isinstance(found.get("rank"), tuple):
        pairs = [_filtered(one) for one in found.pop("rank")]
        found["ranks"] = (*found.get("ranks", ()), *(pair for pair in pairs if pair[0] is not None))
        for rank in [rank for glob, rank in pairs if glob is None][:1]:
            found["rank"] = rank
    return found


def _filtered(one: Any) -> tuple[str | None, Any]:
    """A rank and the names it is for; without a filter those that no other is for."""
    if not isinstance(one, dict) or not {"value"} <= one.keys() <= {"filter", "value"}:
        raise InvalidInput(f"rank: expected a value with or without a filter, got {quoted(str(one))}")
    return one.get("filter"), one["value"]
