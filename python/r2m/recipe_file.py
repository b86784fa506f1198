"""Merges described in a file, in mergekit's words where they exist; every merge leaves one that repeats it.

    base_model: base.safetensors
    merge_method: r2m
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
``[{filter: "*.attn.*", value: 0.2}, {value: 0.4}]``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    create_model,
)

from r2m import plain_yaml
from r2m.checkpoints import hub
from r2m.detector_kinds import placed
from r2m.naming import named
from r2m.places import from_output, read_small, to_output
from r2m.preprocessing import Corner, Preprocessing, Resample, Resize
from r2m.recipe import ARRANGEMENT, OUTPUT, Arrangement, Expert, Recipe, adapted, default_method
from r2m_kernels import MergeConfig, checks
from r2m_kernels.config import METHODS, OFFERED, make_config
from r2m_kernels.errors import BadFile, BadOption, InvalidInput, printable, quoted
from r2m_kernels.fields import OPTIONS
from r2m_kernels.options import Option

Place = Callable[[str], str]  # a path as it is written
_MOST_BYTES = 2**20  # of a recipe: hundreds of experts
_SHOWN = 80  # letters of a value in a message
# What merges did before there were these options. A recipe that lists all others and not these was written by one of
# 0.1.0, and means what it meant.
_BEFORE = {"head": "merge", "truncate": (), "rank_rounding": "up", "whole_up_to": 0}
FORMER_FIELDS = OPTIONS.keys() - _BEFORE.keys()
# What is different in recipes without parameters.
_CHANGED = {
    "r2m": "rank 0.4 instead of whole residuals, but for matrices with a side of up to 16, and the head is averaged",
    "r2m_paper": "the authors' public kit (uncentred, residual τ − core) instead of the summaries' reading, which is "
    "r2m_centred, and the head is averaged",
}
_GONE = "merge_method: {} is of a package that is not installed; the parameters say all that it decided"

# What mergekit calls methods that are here by another name.
_ELSEWHERE = {
    "linear": "weight_average here, or task_arithmetic for the sum of the changes",
    "dare_linear": "dare here",
    "dare_ties": "not here; dare drops changes at random, ties elects signs",
    "breadcrumbs": "not here; ties trims the smallest changes",
    "breadcrumbs_ties": "not here; ties trims the smallest changes",
    "della": "not here; dare drops changes at random",
    "slerp": "not here; weight_average is near it where models are alike",
    "model_stock": "not here; weight_average is its centre",
}


class _Keys(BaseModel):
    """Keys of a mapping: what they may hold, how that is read, and how it is written."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("input should be a valid string")
    return value


def _name(value: Any) -> str:
    if "=" in _text(value):
        raise ValueError("expected a text without =")
    return str(value)


# A path, and a name that may be made of one: of any bytes, which pydantic's own texts are not.
_Path = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string", "minLength": 1})]
_Name = Annotated[str, PlainValidator(_name), WithJsonSchema({"type": "string", "pattern": "^[^=]+$"})]


class _Preprocessing(_Keys):
    size: int = Field(description="pixels of a side of what the detector sees")
    mean: list[float | int] = Field(description="of the channels, of values in [0, 1]")
    std: list[float | int] = Field(description="of the channels")
    resize: Resize = Field("squash", description="which side is resized to scale: both, the shorter, the longer, none")
    scale: int = Field(0, description="pixels; what is more than size is cut off around the centre; 0: size")
    resample: Resample = Field("bicubic", description="how pixels in between are found")
    rescale: float | int = Field(1 / 255, description="what values from 0 to 255 are multiplied with")
    corner: Corner = Field("down", description="how a cut that is not in the middle is rounded")
    fill: list[int] = Field([0, 0, 0], description="of the channels, where a picture is smaller than size")

    def read(self) -> Preprocessing:
        return Preprocessing.of(**dict(self))


class _Expert(_Keys):
    model: _Path = Field(description="checkpoint: a path relative to the recipe, or hf://owner/name")
    name: _Name | None = Field(None, description="how it is called in the report")
    weight: float | int | None = Field(None, description="in all means; 1 where others have one")
    rename: dict[str, str | None] = Field(default_factory=dict, description="as for all, before those")
    preprocessing: _Preprocessing | None = Field(None, description="what it was trained with")
    fake: int | None = Field(None, description="which output of its head stands for fake, 0 or 1")

    def read(self, directory: Path) -> Expert:
        preprocessing = self.preprocessing.read() if self.preprocessing else None
        return Expert(_beside(directory, self.model), self.rename, preprocessing, self.fake)

    @staticmethod
    def written(name: str, expert: Expert, place: Place) -> dict[str, Any]:
        return {
            "model": place(expert.path),
            "name": name,
            **({"rename": dict(expert.rename)} if expert.rename else {}),
            **({"preprocessing": expert.preprocessing.plain()} if expert.preprocessing else {}),
            **({} if expert.fake is None else {"fake": expert.fake}),
        }


class _Special(_Keys):
    """The keys of a recipe that are more than a plain value; a weight of an expert is one of the parameters."""

    base_model: _Path = Field(description="the checkpoint all experts started from")
    models: list[_Expert] = Field(min_length=1, description="the experts")
    merge_method: str = Field(
        "r2m", description="how they are merged", json_schema_extra={"enum": [*OFFERED, *METHODS.others]}
    )
    parameters: dict[str, Any] = Field(default_factory=dict, description="on top of what the method is")
    rename: dict[str, str | None] = Field(
        default_factory=dict,
        description="what names of tensors begin with: what they begin with instead, or null to leave them out",
    )
    preprocessing: _Preprocessing | None = Field(None, description="of the merged model, whatever the experts have")

    def read(self, directory: Path) -> Recipe:
        plain = {name: _read_plain(getattr(self, name), one, directory) for name, one in _PLAIN.items()}
        output = {name: plain.pop(name) for name in OUTPUT}
        method = self.merge_method if "merge_method" in self.model_fields_set else default_method(output)
        if method in _ELSEWHERE:
            raise BadOption(f"merge_method: {method} of mergekit is {_ELSEWHERE[method]}")
        # What a merge wrote says all that its method decided: it is read without the package that brought the method.
        whole = self.parameters.keys() >= FORMER_FIELDS
        # `r2m init` lists none of them; who wrote a recipe by hand left the key out, or had something to say in it.
        started = "parameters" in self.model_fields_set and not self.parameters
        gone = whole and method not in METHODS and method.isascii() and method.isidentifier()
        if not gone:
            checks.choice("merge_method", method, tuple(METHODS))
        experts = [one.read(directory) for one in self.models]
        names = named([(one.name, expert.path) for one, expert in zip(self.models, experts, strict=True)])
        return Recipe(
            _beside(directory, self.base_model),
            dict(zip(names, experts, strict=True)),
            self._config(default_method(output) if whole else method, output),
            method,
            **output,
            arrangement=Arrangement(self.rename, **plain),
            preprocessing=self.preprocessing.read() if self.preprocessing else None,
            notes=(_GONE.format(method),) if gone else () if whole or started else _notes(method),
        )

    def _config(self, method: str, output: Mapping[str, Any]) -> MergeConfig:
        parameters = dict(self.parameters)
        weights = [expert.weight for expert in self.models]
        if any(weight is not None for weight in weights):
            if parameters.get("weights") is not None:
                raise BadOption("weights: given both with the models and as a parameter")
            parameters["weights"] = [1.0 if weight is None else weight for weight in weights]
        if parameters.keys() >= FORMER_FIELDS:
            parameters = {**_BEFORE, **parameters}
        try:
            return adapted(make_config(method, {}), output, parameters).replace(**_fields(parameters))
        except InvalidInput as error:
            raise BadOption(f"parameters: {error}") from None

    @staticmethod
    def written(recipe: Recipe, place: Place) -> dict[str, Any]:
        arrangement = recipe.arrangement
        return {
            "merge_method": recipe.method,
            "base_model": place(recipe.base),
            "models": [_Expert.written(name, expert, place) for name, expert in recipe.experts.items()],
            "parameters": recipe.config.to_dict(),
            "dtype": recipe.dtype,
            **_plain_written(recipe, OUTPUT, place),
            **({"rename": dict(arrangement.rename)} if arrangement.rename else {}),
            **_plain_written(arrangement, ARRANGEMENT, place),
            **({"preprocessing": recipe.preprocessing.plain()} if recipe.preprocessing else {}),
        }


def _notes(method: str) -> tuple[str, ...]:
    """Where words that somebody wrote mean something else than they once did."""
    changed = f"merge_method: {method} is another than in 0.1.0: {_CHANGED[method]}" if method in _CHANGED else ""
    return tuple(filter(None, [changed, METHODS[method].former]))


_PLAIN: dict[str, Option] = {**OUTPUT, **ARRANGEMENT}  # the other keys


def _plain_key(declared: Option) -> Any:
    """A type and a field, as pydantic takes them."""
    several = declared.kind == tuple[str, ...]
    kind = list[str] if several else _Path if declared.metavar == "PATH" else declared.kind
    choices: list[Any] = [*declared.choices, *([None] if declared.optional and declared.choices else ())]
    default: Any = list(declared.default) if several else declared.default
    field: Any = Field(default, description=declared.text, json_schema_extra={"enum": choices} if choices else None)
    return (kind | None if declared.optional else kind), field


_Recipe = create_model("_Recipe", __base__=_Special, **{name: _plain_key(one) for name, one in _PLAIN.items()})


def _read_plain(value: Any, declared: Option, directory: Path) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if value and declared.metavar == "KIND":
        return placed(declared.checked(value), functools.partial(_beside, directory))
    return _beside(directory, value) if value and declared.metavar == "PATH" else value


def _plain_written(holder: Recipe | Arrangement, declared: Mapping[str, Option], place: Place) -> dict[str, Any]:
    """What is not as it is by default."""
    written: dict[str, Any] = {}
    for name, one in declared.items():
        value = getattr(holder, name)
        if value != one.default:
            written[name] = list(value) if isinstance(value, tuple) else value
            if one.metavar == "PATH":
                written[name] = place(value)
            if one.metavar == "KIND":
                written[name] = placed(value, place)
    return written


def read_recipe(path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML or JSON file.
        changes: ``KEY=VALUE`` each, dotted keys and YAML values, such as ``parameters.rank=0.2``: they replace what the
            file says.

    Raises:
        BadFile: no such file, or no YAML.
        BadOption: unknown keys, wrong types or values.
    """
    what = f"recipe ({printable(str(path))})"
    content = _loaded(Path(path), what)
    for change in changes:
        _apply(content, change)
    try:
        return replace(_Recipe.model_validate(content).read(Path(path).parent), file=str(path))
    except ValidationError as error:
        raise BadOption(f"{what}: {_explained(error)}") from None
    except InvalidInput as error:
        raise BadOption(f"{what}: {error}") from None


def dump(recipe: Recipe, directory: Path | None = None) -> dict[str, Any]:
    """What a file says that :func:`read_recipe` reads as this recipe.

    On the Hub paths are of a commit, so that it means the same tomorrow.

    Args:
        recipe: what to write.
        directory: where the file will be, for :func:`r2m.places.from_output`; ``None``: paths are absolute.
    """
    local = os.path.abspath if directory is None else functools.partial(from_output, directory)
    return _Recipe.written(recipe, lambda path: hub.fetch(path).pinned if hub.is_reference(path) else local(path))


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors."""
    whole = _Recipe.model_json_schema()
    options = TypeAdapter(MergeConfig).json_schema()["properties"]
    for name, one in options.items():
        one["description"] = OPTIONS[name].text
    rank = options["rank"]
    by_name = {"filter": {"type": "string", "description": "a glob of names; none: all others"}, "value": dict(rank)}
    item = {"type": "object", "properties": by_name, "required": ["value"], "additionalProperties": False}
    options["rank"] = {"description": rank["description"], "anyOf": [dict(rank), {"type": "array", "items": item}]}
    whole["properties"]["parameters"].update(properties=options, additionalProperties=False)
    return {**whole, "title": "A merge, as r2m merge takes it"}


def _loaded(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise BadFile(f"{what}: no such file")
    content = plain_yaml.load(read_small(path, what, _MOST_BYTES, named=True), what)
    if not isinstance(content, dict):
        raise BadFile(f"{what}: expected keys such as base_model and models, got {type(content).__name__}")
    return content


def _apply(content: dict[str, Any], change: str) -> None:
    """One ``KEY=VALUE`` into the recipe."""
    key, separator, text = change.partition("=")
    if not separator or not all(key.split(".")):
        raise BadOption(f"--set {change}: expected KEY=VALUE, such as parameters.rank=0.2")
    try:
        value = plain_yaml.load(text, change)
    except BadFile:
        shown = printable(change[:_SHOWN]), quoted(text[:_SHOWN])
        raise BadOption("--set {}: {} is not a YAML value".format(*shown)) from None
    *path, last = key.split(".")
    place: Any = content
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise BadOption(f"--set {change}: {key.rpartition('.')[0]} holds no keys")
    place[last] = value


def _explained(error: ValidationError) -> str:
    """The first thing that is wrong, in one clause."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # of the whole: a key that is no text
        return "a key is not UTF-8"
    *path, last = first["loc"]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        if last in ("parameters", "density") and path and path[0] == "models":
            return f"{where}: of a model there is its weight alone ({{model: …, weight: 2}}); parameters are for all"
        kind: type[BaseModel] = _Expert if path and path[0] == "models" else _Recipe
        known = (_Preprocessing if path and path[-1] == "preprocessing" else kind).model_fields
        holder = f" in {'.'.join(map(str, path))}" if path else ""
        return f"unknown key {quoted(str(last))}{holder}{checks.did_you_mean(str(last), known)}"
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "model_type":
        example = "model: PATH" if path == ["models"] else next(iter(_Preprocessing.model_fields)) + ": …"
        return f"{where}: expected keys and values ({{{example}}}), got {quoted(str(first['input'])[:_SHOWN])}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}, got {quoted(str(first['input'])[:_SHOWN])}"


def _beside(directory: Path, path: str) -> str:
    """A path as the recipe's reader has it."""
    return path if hub.is_reference(path) else to_output(directory, os.path.expanduser(path))


def _fields(parameters: dict[str, Any]) -> dict[str, Any]:
    """As the configuration has them: lists as tuples, a rank with filters as pairs."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}
    if isinstance(fields.get("rank"), tuple):
        pairs = [_filtered(one) for one in fields.pop("rank")]
        fields["ranks"] = (*fields.get("ranks", ()), *(pair for pair in pairs if pair[0] is not None))
        for rank in [rank for glob, rank in pairs if glob is None][:1]:
            fields["rank"] = rank
    return fields


def _filtered(one: Any) -> tuple[str | None, Any]:
    """A rank and the names it is for; without a filter those that no other is for."""
    if not isinstance(one, dict) or not {"value"} <= one.keys() <= {"filter", "value"}:
        raise BadOption(f"rank: expected a value with or without a filter, got {quoted(str(one))}")
    return one.get("filter"), one["value"]
