"""What is merged, and how: checkpoints, method, what becomes of names, classifier and preprocessing.

Where it is run and written is not its business (:class:`r2m.options.Options`); :mod:`r2m.recipe_file` reads and writes
it. A key that a plain value fills is declared here once: its sentence is the command's help and the schema's.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from r2m.checkpoints.formats import ADAPTERS, OUTPUT_FORMATS, SAFETENSORS
from r2m.detector_kinds import WHAT
from r2m.detector_kinds import check as check_detector
from r2m.log_odds import Calibration
from r2m.naming import name_experts
from r2m.preprocessing import Preprocessing
from r2m.presets import PRESETS, Preset, Rules
from r2m_kernels import checks
from r2m_kernels.checks import did_you_mean
from r2m_kernels.config import FLAGS, METHODS, MergeConfig, make_config
from r2m_kernels.errors import BadOption, quoted
from r2m_kernels.fields import FILES
from r2m_kernels.options import Option, flag, option, read_options

ENSEMBLE, ONE = "ensemble", "one"
# Of adapters, where nothing else is asked for: the method, and what it is merged with.
_ENSEMBLE_METHOD = "cart"
_ADAPTED: Mapping[str, Mapping[str, Any]] = {
    ENSEMBLE: {"rank": 0.05, "head": "mean", "whole_up_to": 16},
    "merge": {"rank": 0.05},
}
_OF_SIZE: Mapping[str, Any] = {"rank": 0.75, "whole_up_to": 0}  # an ensemble's, where columns of all layers compete
DTYPES = ("float32", "bfloat16", "float16", "float64")  # of the output


def _temperature(name: str, value: Any) -> float:
    return checks.number(name, value, _COLDEST)


_COLDEST = 1e-3  # a detector that is a thousand times too unsure


@dataclass(frozen=True)
class Arrangement:
    """How checkpoints are brought into one layout, and what becomes of the classifier.

    Attributes:
        rename: what names of tensors begin with → what instead, None: left out; in every checkpoint, before the preset.
        preset, head, head_tensors, head_features, fake, key: as their sentences say; no head: what the method
            does with it.

    Raises:
        BadOption: no such preset.
    """

    rename: Rules = field(default_factory=dict)
    preset: str | None = option(
        None,
        FILES,
        "Names as known detectors have them: " + "; ".join(f"{name}: {one.title}" for name, one in PRESETS.items()),
        choices=tuple(PRESETS),
    )
    head: str | None = option(
        None,
        FILES,
        "What becomes of the classifier: mean of the experts', merge (like the rest), base, expert:NAME, or refit "
        "(refit:logistic) on features of the merged model.",
        metavar="RULE",
        unset="mean in r2m and its kin, merge in others",
    )
    head_tensors: tuple[str, ...] = option(
        (), FILES, "The classifier's names.", flag="head-tensor", unset="where the network ends"
    )
    head_features: str | None = option(
        None, FILES, "For refit: a file with tensors features (n, d) and labels (n,).", metavar="PATH"
    )

    fake: int | None = option(
        None,
        FILES,
        "Which output of the merged head stands for fake, 0 or 1; heads that have it elsewhere are turned.",
        metavar="INDEX",
        unset="as the base's or the first expert's config.json says",
    )
    key: str | None = option(
        None,
        FILES,
        "What the weights lie under in files of torch.save that have it, with dots; others are looked through.",
        metavar="KEY",
        unset="state_dict, model, net, … where they are there",
    )

    def __post_init__(self) -> None:
        ARRANGEMENT["preset"].checked(self.preset)

    @property
    def layout(self) -> Preset:
        """What the preset asks for."""
        return Preset("as they are") if self.preset is None else PRESETS[self.preset]

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Arrangement:
        """From options of the command by their flags; those that were not given are absent."""
        rename: dict[str, str | None] = dict(map(read_rule, given.get("rename", ())))
        rename.update(dict.fromkeys(given.get("drop", ())))
        return cls(rename, **{one.name: given[one.key] for one in ARRANGEMENT.values() if one.key in given})


@dataclass(frozen=True)
class Expert:
    """A checkpoint that is merged into the base, and what is said of it alone.

    Attributes:
        path: where it is.
        rename: as :class:`Arrangement`'s, before that one.
        preprocessing: what it was trained with; None: what its directory says.
        fake: which output of its head stands for fake; None: what its directory says.
    """

    path: str
    rename: Rules = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    fake: int | None = None

    @classmethod
    def each(cls, paths: Mapping[str, str | Path]) -> dict[str, Expert]:
        """Experts of which nothing but paths is said, by name."""
        return {name: cls(str(path)) for name, path in paths.items()}


@dataclass(frozen=True)
class Recipe:
    """A merge, wherever it is run.

    Attributes:
        base: the checkpoint that all experts started from: a safetensors file, one of ``torch.save``, a Hugging Face
            directory or ``hf://owner/name``.
        experts: by name, in their order.
        config: how they are merged.
        method: a key of :data:`r2m_kernels.config.METHODS` that made ``config``; recipe and report name it.
        dtype, format, adapters, adapter_rank, adapter_size, detector, temperature, head_bias, statistics: of the
            output, as their sentences say.
        arrangement: how checkpoints are brought into one layout.
        preprocessing: of the merged model, whatever the experts have; None: theirs, which must not differ.
        notes: what who asked for it has to know, once; no part of what is written.
        file: that it was read from; no part of what is written, and never written to.

    Raises:
        BadOption: no such dtype or format, or adapters of another method.
    """

    base: str
    experts: Mapping[str, Expert]
    config: MergeConfig = field(default_factory=MergeConfig)
    method: str = "r2m"
    dtype: str | None = option(
        None, FILES, "Floating-point type of the output.", choices=DTYPES, unset="as in the base"
    )
    format: str = option(
        SAFETENSORS.name,
        FILES,
        "Of the output; "
        + "; ".join(f"{name}: {one.title}" for name, one in OUTPUT_FORMATS.items() if one is not SAFETENSORS)
        + ".",
        choices=tuple(OUTPUT_FORMATS),
    )
    arrangement: Arrangement = field(default_factory=Arrangement)
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = ()
    file: str | None = None
    adapters: str = option(
        ENSEMBLE,
        FILES,
        "With --format adapters: on the experts' mean, so that with its own it is an expert again (ensemble); on the "
        "core, so that with all of them it is the merge (merge); or, of adapters alone, the merge as one adapter on "
        "the base (one).",
        "An ensemble is of the method cart, at rank 0.05 unless another is given.",
        choices=(ENSEMBLE, "merge", ONE),
    )
    adapter_rank: int | None = option(
        None,
        FILES,
        "Of --adapters one, at most.",
        "The best approximation of the merge's change at that rank.",
        minimum=1,
        metavar="R",
        unset="all that the experts' adapters have together",
    )
    adapter_size: float | None = option(
        None,
        FILES,
        "Numbers in an adapter at most, as a share of the model's (0.1): columns go to the layers where they count "
        "most, one to each at least. Not with --adapters merge.",
        "By the energy of all experts' k-th singular values for each number that they take. What is saved whole "
        "counts. An ensemble takes them from those of rank 0.75 unless another is given; where not all fit, its norms "
        "are the mean, and what is cut gets half of the length back that it lost.",
        check=checks.share,
        metavar="SHARE",
        unset="columns as the ranks say",
    )

    detector: str | None = option(
        None,
        FILES,
        WHAT,
        "Kept with the merge, so that evaluate and detect need not be told.",
        metavar="KIND",
        check=check_detector,
    )

    temperature: float | None = option(
        None,
        FILES,
        "Log-odds of the output are divided by it, in the classifier's tensors.",
        "Found by r2m calibrate.",
        check=_temperature,
        metavar="T",
        unset="1",
    )
    head_bias: float | None = option(
        None,
        FILES,
        "Then added to the second output against the first, or to the only one.",
        "Found by r2m calibrate.",
        metavar="B",
        unset="0",
    )
    statistics: str | None = option(
        None,
        FILES,
        "A file with running means and variances of the output, by its names, in place of the experts' mean.",
        "Made by r2m calibrate --statistics.",
        metavar="PATH",
    )

    def __post_init__(self) -> None:
        for name, declared in OUTPUT.items():
            declared.checked(getattr(self, name))
        if self.adapters != ENSEMBLE and self.format != ADAPTERS.name:
            raise BadOption(f"adapters: {self.adapters} is for --format {ADAPTERS.name}, got {self.format}")
        if self.adapter_rank is not None and self.adapters != ONE:
            raise BadOption(f"adapter_rank: is for --adapters {ONE}, got {self.adapters}")
        if self.adapter_size is not None and (self.format != ADAPTERS.name or self.adapters not in (ENSEMBLE, ONE)):
            got = self.adapters if self.format == ADAPTERS.name else f"--format {self.format}"
            raise BadOption(
                f"adapter_size: is for --format {ADAPTERS.name} with --adapters {ENSEMBLE} or {ONE}, got {got}"
            )
        if self.format == ADAPTERS.name and self.adapters == ENSEMBLE and self.method != _ENSEMBLE_METHOD:
            raise BadOption(
                f"adapters: an ensemble is the mean and what each expert has beyond it, the method {_ENSEMBLE_METHOD}; "
                f"for {self.method} give --adapters merge"
            )

    @property
    def calibration(self) -> Calibration | None:
        """What is folded into the classifier; None: nothing."""
        if self.temperature is None and self.head_bias is None:
            return None
        return Calibration(self.temperature or 1.0, self.head_bias or 0.0)

    def uncalibrated(self) -> Recipe:
        """The same without a calibration, which was of this merge and of no other; a note says so."""
        known = {"temperature": self.temperature, "head_bias": self.head_bias, "statistics": self.statistics}
        gone = [name for name, value in known.items() if value is not None]
        if not gone:
            return self
        note = f"the calibration of the merge before ({', '.join(gone)}) is gone; r2m calibrate makes a new one"
        return replace(self, temperature=None, head_bias=None, statistics=None, notes=(*self.notes, note))

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Recipe:
        """From options of the command by their flags; those that were not given are absent.

        Raises:
            BadOption: one is missing, has a value it may not have, or is not used by the method.
        """
        for key in ("base", "expert"):
            if key not in given:
                raise BadOption(f"Missing option '{flag(key)}', or a recipe.")
        output = {one.name: given[one.key] for one in OUTPUT.values() if one.key in given}
        method = given.get("method", default_method(output))
        options = {key: value for key, value in given.items() if key in FLAGS}
        return cls(
            given["base"],
            Expert.each(name_experts(given["expert"])),
            adapted(make_config(method, options), output, options),
            method,
            notes=tuple(filter(None, [METHODS[method].former])),
            arrangement=Arrangement.from_options(given),
            **output,
        )

    def with_expert(self, name: str, expert: Expert, weight: float | None = None) -> Recipe:
        """The same with one expert more.

        Args:
            name, expert: the new one.
            weight: its weight, those so far having 1 if they have none; ``None``: 1 where others have weights.

        Raises:
            BadOption: the name is taken, or the weight is none.
        """
        if name in self.experts:
            raise BadOption(f"expert {quoted(name)}: there is one already; another name, or remove that one first")
        config = self.config
        if config.weights is not None or weight is not None:
            before = config.weights or (1.0,) * len(self.experts)
            config = config.replace(weights=(*before, 1.0 if weight is None else weight))
        return replace(self.uncalibrated(), experts={**self.experts, name: expert}, config=config)

    def without_expert(self, name: str) -> Recipe:
        """The same with one expert less.

        Raises:
            BadOption: no such expert, or it is the last.
        """
        if name not in self.experts:
            near = did_you_mean(name, self.experts)
            raise BadOption(f"expert {quoted(name)}: there is none; there are {', '.join(self.experts)}{near}")
        if len(self.experts) == 1:
            raise BadOption(f"expert {quoted(name)}: it is the only one, and a merge of none is none")
        kept = [other != name for other in self.experts]
        config = self.config
        if config.weights is not None:
            config = config.replace(weights=tuple(itertools.compress(config.weights, kept)))
        kept_experts = dict(itertools.compress(self.experts.items(), kept))
        return replace(self.uncalibrated(), experts=kept_experts, config=config)


def default_method(output: Mapping[str, Any]) -> str:
    """The method of a merge that asks for none; ``output``: what is said of that, by fields."""
    ensemble = output.get("format") == ADAPTERS.name and output.get("adapters", ENSEMBLE) == ENSEMBLE
    return _ENSEMBLE_METHOD if ensemble else "r2m"


def adapted(config: MergeConfig, output: Mapping[str, Any], given: Collection[str]) -> MergeConfig:
    """A configuration for adapters, if the output is to have some; what was ``given`` stays."""
    if output.get("format") != ADAPTERS.name or config.spectrum != "truncate":
        return config
    kind = output.get("adapters", ENSEMBLE)
    fields = _ADAPTED.get(kind, {})
    if kind == ENSEMBLE and output.get("adapter_size") is not None:
        fields = {**fields, **_OF_SIZE}
    return config.replace(**{name: value for name, value in fields.items() if name not in given})


def read_rule(text: str) -> tuple[str, str]:
    """``OLD=NEW``: what names begin with, and what instead."""
    old, separator, new = text.partition("=")
    if not old or not separator:
        raise BadOption(f"--rename {text}: expected OLD=NEW, such as 'module.='.")
    return old, new


ARRANGEMENT: dict[str, Option] = read_options(Arrangement)
OUTPUT: dict[str, Option] = read_options(Recipe)
