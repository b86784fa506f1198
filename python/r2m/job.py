"""A merge that can begin: its recipe, its options and the headers of its checkpoints, and its steps on them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import r2m_kernels
from r2m import (
    adapted,
    distributed,
    former,
    machine,
    ownership,
    preprocessing,
    preprocessing_files,
    statistics,
)
from r2m.arrangement import Arranged, arrange
from r2m.calibrated_head import CalibratedHead
from r2m.checkpoints import hub
from r2m.checkpoints.adapter_config import CONFIG
from r2m.checkpoints.adapters import made_for
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.formats import ADAPTERS, OUTPUT_FORMATS, Format
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.writer import SafetensorsSink
from r2m.forecast import Forecast, Output, Resources, forecast
from r2m.options import Options
from r2m.output import (
    INPUTS,
    SOURCES,
    STATISTICS,
    PartialOutput,
)
from r2m.places import from_output, read_small
from r2m.preprocessing import Preprocessing
from r2m.recipe import DTYPES, ONE, Recipe
from r2m.recipe_file import dump
from r2m.statistics import NewStatistics
from r2m_kernels import Analysis, Progress, analyze, screen
from r2m_kernels.errors import BadOption, printable, quoted
from r2m_kernels.screening import Screening
from r2m_kernels.streaming import (
    Backend,
    Inputs,
    PartialSink,
    ProcessGroup,
    choose_backend,
    depends_on_others,
    sources_digest,
    usable_device,
)

# Of the memory that is free, what a merge takes unless it is told: the page cache and others want some.
BUDGET_SHARE = 0.6
Asked = TypeVar("Asked")
OUTPUT_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class Job:
    """A merge that can begin: its options are valid, and the headers of all checkpoints are read.

    Attributes:
        recipe: what is merged.
        options: how it is run.
        budget: bytes of working memory of this process.
        sources: the base's checkpoint, then the experts'.
        arranged: the same in one layout, and the configuration for it.
        specialists: of how many each expert is the merge.
        preprocessing: of the merged model, if anything is known.
        copied: small files of the base that go with the merged model: name → content.
    """

    recipe: Recipe
    options: Options
    budget: int
    sources: tuple[Checkpoint, ...]
    arranged: Arranged
    specialists: Mapping[str, int]
    preprocessing: Preprocessing | None
    copied: Mapping[str, bytes]

    @property
    def input_bytes(self) -> int:
        """Bytes of all tensors."""
        views = (self.arranged.base, *self.arranged.experts.values())
        return sum(spec.nbytes for view in views for spec in view.specs.values())

    @property
    def notes(self) -> list[str]:
        """What of the files is left out, and what a file says for itself."""
        left_out = [f"{source.label}: {note}" for source in self.sources for note in source.notes]
        counted = [
            f"expert {quoted(name)} counts as {count} specialists, as the report of the merge beside it says"
            for name, count in self.specialists.items()
            if count > 1
        ]
        adapters = [(source, one.base) for source in self.sources if (one := source.adapter) and one.base]
        others = [
            f"{source.label}: was made for {quoted(named)}, by its {CONFIG}, and not for this base"
            for source, named in adapters
            if made_for(named, self.recipe.base, source.files[0].parent) is False
        ]
        estimated = (
            [f"running means and variances are those of {printable(self.recipe.statistics)}, not the experts' mean"]
            if self.recipe.statistics
            else []
        )
        return left_out + counted + others + estimated

    @property
    def files(self) -> list[Path]:
        """All that are read."""
        return [file for source in self.sources for file in source.files]

    @property
    def inputs(self) -> list[str | Path]:
        """What is read: the files too, and not the directories alone, as they may be links that lead anywhere."""
        recipe = self.recipe
        beside = [path for path in (recipe.file, recipe.arrangement.head_features, recipe.statistics) if path]
        return [recipe.base, *(one.path for one in recipe.experts.values()), *self.files, *beside]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the output; ``None``: the base's."""
        return OUTPUT_DTYPES[self.recipe.dtype] if self.recipe.dtype else None

    @property
    def metadata(self) -> dict[str, str]:
        """Of the output's headers. No time, no path, no expert's name: equal merges give equal bytes."""
        return {
            "r2m_kernels_version": r2m_kernels.__version__,
            "r2m_config": json.dumps(self.arranged.config.to_dict(), sort_keys=True, allow_nan=False),
        }

    @property
    def format(self) -> Format:
        """Of the output."""
        return OUTPUT_FORMATS[self.recipe.format]

    @property
    def backend(self) -> Backend:
        """What computes."""
        return choose_backend(self.options.backend, usable_device(self.options.device or "cpu"))

    def state(self, out: str | Path) -> dict[str, Any]:
        """What decides the bytes of an output, as ``--resume`` compares it. Memory and processes do not."""
        recipe = dump(self.recipe, Path(out))
        experts = {model.pop("name"): model for model in recipe.pop("models")}
        for name, order in self.arranged.agreed.turned.items():
            experts[name]["order of rows"] = order
        backend = self.backend
        return {
            "r2m_kernels": r2m_kernels.__version__,
            "torch": torch.__version__,
            "backend": f"{backend.name} ({backend.variant})",
            SOURCES: sources_digest(backend.name, Path(__file__).parent),
            "device": usable_device(self.options.device or "cpu").type,
            **recipe,
            **({STATISTICS: statistics.digest(self.recipe.statistics)} if self.recipe.statistics else {}),
            "order of experts": list(experts),
            "experts": experts,
            "max_shard_size": self.options.shard_bytes,
            "specialists": dict(self.specialists),
            "features": self.arranged.features,
            INPUTS: {
                from_output(out, str(one.pop("file"))): one for source in self.sources for one in source.fingerprints
            },
        }

    def single(self, out: str | Path) -> dict[str, Any]:
        """For each expert all that decides the truncations of its own, if they depend on no other's."""
        base, *own = ([from_output(out, str(one["file"])) for one in source.fingerprints] for source in self.sources)
        files = {name: [*base, *theirs] for name, theirs in zip(self.recipe.experts, own, strict=True)}
        return former.of_each(self.state(out), files)

    @property
    def not_single(self) -> str:
        """Why they do depend on others, as a clause; empty where they do not."""
        return depends_on_others(self.arranged.config, self.backend.operators)

    def analyze(self, **more: Any) -> Analysis:
        """Steps 1 to 3; ``more`` are arguments of :func:`r2m_kernels.analyze`."""
        return self._asked(analyze, **more)

    def screen(self, processes: ProcessGroup, progress: Progress | None) -> Screening:
        """Who of the experts is suspected; one pass over all inputs. Errors are :func:`r2m_kernels.screen`'s."""
        return self._asked(screen, processes=processes, progress=progress)

    def _asked(self, ask: Callable[..., Asked], **more: Any) -> Asked:
        """What a function of checkpoints, configuration and machine finds of this merge's."""
        return ask(
            self.arranged.base,
            self.arranged.experts,
            self.arranged.config,
            device=self.options.device,
            backend=self.options.backend,
            memory_budget=self.budget,
            **more,
        )

    def write(self, analysis: Analysis, sink: SafetensorsSink, progress: Progress | None) -> None:
        """Steps 4 and 5, of which adapters have a part of their own, and a calibration the classifier."""
        if self.format is ADAPTERS and self.recipe.adapters != ONE:
            analysis.adapters(self.arranged.config).write(sink, dtype=self.dtype, progress=progress)
        else:
            calibration, names = self.recipe.calibration, self.recipe.arrangement.head_tensors
            to: PartialSink = sink if calibration is None else CalibratedHead(sink, calibration, names)
            if self.recipe.statistics is not None:
                to = NewStatistics(to, statistics.read_statistics(self.recipe.statistics))
            analysis.write(to, self.arranged.config, dtype=self.dtype, progress=progress)

    def forecast(self, directory: Path, resources: Resources) -> Forecast:
        """What it takes with these resources; ``directory`` is on the file system of the output."""
        beside = (
            adapted.nbytes(self.arranged, self.recipe.adapters, self.recipe.adapter_size)
            if self.format is ADAPTERS
            else 0
        )
        layout = (self.metadata, self.dtype, self.options.shard_bytes, self.format.copies)
        written = Output(directory, *layout, beside, self.options.keep_factors)
        inputs = Inputs(self.arranged.base, self.arranged.experts)
        return forecast(inputs, self.arranged.config, self.backend, written, resources)

    def sink(self, partial: PartialOutput, *, create: bool = True) -> SafetensorsSink:
        """Where merged tensors go. Another format is written from that when all is merged: resumed is one alone."""
        directory = partial.output if self.format.direct else partial.tensors
        if create:
            directory.mkdir(exist_ok=True)
        return SafetensorsSink(directory, self.metadata, self.options.shard_bytes, create=create)


def open_job(recipe: Recipe, options: Options | None = None) -> Job:
    """Arguments and errors are :func:`r2m.merge.merge_files`'s; of checkpoints, nothing but headers is read."""
    options = options or Options()
    options = replace(options, device=distributed.local_device(options.device))
    budget = options.budget_bytes
    if budget is None:
        budget = int(BUDGET_SHARE * machine.free_memory() / distributed.local_processes())
    key = recipe.arrangement.key
    base = open_checkpoint(recipe.base, f"base ({printable(recipe.base)})", key)
    experts = {
        name: open_checkpoint(one.path, f"expert {quoted(name)} ({printable(one.path)})", key, adapters=True)
        for name, one in recipe.experts.items()
    }
    if key is not None and not any(key in source.keys for source in (base, *experts.values())):
        raise BadOption(f"key: no checkpoint has anything under {quoted(key)}")
    known, counts = {}, {}
    for name, one in recipe.experts.items():
        known[name] = one.preprocessing or preprocessing_files.beside(hub.local(one.path))
        counts[name] = 1 if hub.is_reference(one.path) else former.specialists(Path(one.path))
    config = recipe.config
    if config.weights is None and any(count > 1 for count in counts.values()):
        config = config.replace(weights=tuple(map(float, counts.values())))
    renames = {name: one.rename for name, one in recipe.experts.items()}
    fakes = {name: one.fake for name, one in recipe.experts.items() if one.fake is not None}
    arranged = arrange(base, experts, config, recipe.arrangement, renames, fakes)
    if OUTPUT_FORMATS[recipe.format] is ADAPTERS:
        if recipe.calibration is not None or recipe.statistics is not None:
            raise BadOption(f"temperature, head_bias, statistics: are for one model, got --format {ADAPTERS.name}")
        arranged = adapted.arrange(arranged, recipe.adapters)
    # They speak of the base's own tensors: under other names nothing of it would load what is made.
    beside = hub.local(recipe.base)
    copied = {
        name: read_small(beside / name, f"base ({printable(recipe.base)}): {name}")
        for name in ownership.COPIED_FILES
        if arranged.base.specs.keys() == base.specs.keys() and os.path.lexists(beside / name)
    }
    common = preprocessing.common(known, recipe.preprocessing)
    job = Job(recipe, options, budget, (base, *experts.values()), arranged, counts, common, copied)
    if options.keep_factors and job.not_single:
        what = "expected a method and a backend that truncate each expert by itself"
        raise BadOption(f"keep_factors: {what}; {job.not_single}")
    return job
