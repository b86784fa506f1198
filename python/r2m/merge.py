"""A merge from files to files: checkpoints in, one output directory and its report out."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

import r2m_kernels
from r2m import (
    adapted,
    distributed,
    former,
    labels,
    machine,
    ownership,
    plain_yaml,
    preprocessing,
    preprocessing_files,
    statistics,
)
from r2m.arrangement import Arranged, arrange
from r2m.calibrated_head import CalibratedHead
from r2m.card import card
from r2m.checkpoints import hub
from r2m.checkpoints.adapter_config import CONFIG
from r2m.checkpoints.adapters import made_for
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.formats import ADAPTERS, OUTPUT_FORMATS, Format
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.writer import SafetensorsSink
from r2m.forecast import Forecast, Output, Resources, forecast, lines, measured_rates
from r2m.journal import FileJournal
from r2m.options import Options
from r2m.output import (
    INPUTS,
    SOURCES,
    STATISTICS,
    PartialOutput,
    Workplace,
    check_output,
    difference,
    held,
    partial_output,
)
from r2m.ownership import CARD_FILE, RECIPE_FILE
from r2m.places import from_output, read_small, write_file
from r2m.preprocessing import Preprocessing
from r2m.recipe import DTYPES, ONE, Recipe
from r2m.recipe_file import dump
from r2m.records import REPORT, STATE, WRITTEN
from r2m.statistics import NewStatistics
from r2m_kernels import Analysis, Progress, analyze, screen
from r2m_kernels.errors import BadOption, DoesNotFit, R2MError, printable, quoted
from r2m_kernels.heads import classifier
from r2m_kernels.screening import Screening
from r2m_kernels.streaming import (
    Backend,
    Inputs,
    PartialSink,
    ProcessGroup,
    SingleProcess,
    choose_backend,
    sources_digest,
    usable_device,
)

# Of the memory that is free, what a merge takes unless it is told: the page cache and others want some.
BUDGET_SHARE = 0.6
# What is known of how a calibration was found where a recipe alone says it.
_UNTOLD = dict.fromkeys(("rule", "pictures", "fakes", "before", "after"))
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

    def analyze(self, **more: Any) -> Analysis:
        """Steps 1 to 3; ``more`` are arguments of :func:`r2m_kernels.analyze`."""
        return analyze(
            self.arranged.base,
            self.arranged.experts,
            self.arranged.config,
            device=self.options.device,
            backend=self.options.backend,
            memory_budget=self.budget,
            **more,
        )

    def screen(self, processes: ProcessGroup, progress: Progress | None) -> Screening:
        """Who of the experts is suspected; one pass over all inputs. Errors are :func:`r2m_kernels.screen`'s."""
        return screen(
            self.arranged.base,
            self.arranged.experts,
            self.arranged.config,
            device=self.options.device,
            backend=self.options.backend,
            memory_budget=self.budget,
            progress=progress,
            processes=processes,
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
        written = Output(directory, self.metadata, self.dtype, self.options.shard_bytes, self.format.copies, beside)
        inputs = Inputs(self.arranged.base, self.arranged.experts)
        return forecast(inputs, self.arranged.config, self.backend, written, resources)

    def sink(self, partial: PartialOutput, *, create: bool = True) -> SafetensorsSink:
        """Where merged tensors go. Another format is written from that when all is merged: resumed is one alone."""
        directory = partial.output if self.format.direct else partial.tensors
        if create:
            directory.mkdir(exist_ok=True)
        return SafetensorsSink(directory, self.metadata, self.options.shard_bytes, create=create)


def open_job(recipe: Recipe, options: Options | None = None) -> Job:
    """Arguments and errors are :func:`merge_files`'s; of checkpoints, nothing but headers is read."""
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
    return Job(recipe, options, budget, (base, *experts.values()), arranged, counts, common, copied)


def merge_files(
    recipe: Recipe,
    out: str | Path,
    options: Options | None = None,
    *,
    processes: ProcessGroup | None = None,
    progress: Progress | None = None,
    workplace: Workplace | None = None,
    calibrated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge checkpoints into a new directory.

    The directory holds ``model.safetensors`` (or shards and their index; or ``model.pth``; or a model and ``adapters``
    on it), ``config.json`` and
    ``preprocessor_config.json`` where the base is a directory that has them, ``r2m_config.yaml`` (the recipe)
    and ``r2m_report.json`` (the report). It appears when all of that is on the disk. A run that is cut off leaves its
    work in ``OUT.partial``, for ``resume``; one that finds its input unusable leaves nothing.

    >>> experts = Expert.each({"fs": "fs.pth", "fr": "hf://me/fr"})
    >>> report = merge_files(Recipe("base.safetensors", experts, MergeConfig.r2m(rank=0.2)), "merged")
    >>> again = merge_files(read_recipe("merged/r2m_config.yaml"), "again", Options(memory_budget="2GiB"))

    Args:
        recipe: what is merged: made by hand, by :meth:`Recipe.from_options`, or by ``read_recipe`` from a file.
        out: the directory to create.
        options: how it is run: device, backend, memory, overwriting, resuming; default: ``Options()``.
        processes: those that share the work; all of them call this alike.
        progress: called as the work goes on, such as :class:`r2m_kernels.ProgressLines`.
        workplace: of ``out``, where it is held already.
        calibrated: what the report says of how the recipe's temperature and bias were found.

    Returns:
        The report, as in ``r2m_report.json``.

    Raises:
        InvalidInput: an input, an option or ``out`` cannot be used.
        BackendUnavailable: the backend asked for cannot run here.
        OSError: a file cannot be read or written; ``filename`` is set.
    """
    started = time.perf_counter()
    options, processes = options or Options(), processes or SingleProcess()
    with contextlib.ExitStack() as stack:
        job, partial, trouble = None, None, None
        run = {"overwrite": options.overwrite, "resume": options.resume}
        screening: dict[str, Any] | None = None
        try:
            job = open_job(recipe, options)
            if options.screen is not None:
                check_output(out, inputs=_inputs(job), **run)  # before it is read
                found = job.screen(processes, progress)
                job = _without(job, found, options.screen)
                screening = {"asked": options.screen, **found.plain()}
            state = job.state(out)
            if processes.index == 0:
                workplace = workplace or stack.enter_context(held(out))
                check_output(out, inputs=_inputs(job), **run)
                partial = stack.enter_context(partial_output(out, state=state, workplace=workplace, **run))
        except (R2MError, OSError) as error:
            trouble = error
        shared = processes.gather({} if partial is None else {"partial": partial, "state": state}, trouble)
        assert job is not None
        partial = shared["partial"]
        other = difference(shared["state"], state)
        which = f"process {processes.index} of {processes.size}"
        processes.gather({}, DoesNotFit(f"{which} is not on the same merge: {other}") if other else None)
        if partial.finished:
            return former.report_of(out)
        known = former.grams(out, state) if options.reuse and job.backend.independent_pairs else {}
        analysis, sink = _merge(job, partial, processes, known, progress)
        if processes.index != 0:
            return analysis.report()
        assert workplace is not None
        workplace.check()
        report = complete(job, partial, sink, analysis, state, started, calibrated, screening)
        del analysis  # Windows removes no file that is open, and its factors may lie beside the output
    return report


def _without(job: Job, found: Screening, mode: str) -> Job:
    """The same merge without whom a screening suspects.

    Raises:
        DoesNotFit: they are refused.
    """
    found.kept(mode)
    if not found.suspects:
        return job
    recipe = reduce(Recipe.without_expert, found.suspects, job.recipe)
    told = tuple(f"left out by --screen: {line}" for line in found.told)
    return open_job(replace(recipe, notes=(*recipe.notes, *told)), job.options)


def plan_merge(
    recipe: Recipe,
    out: str | Path,
    options: Options | None = None,
    *,
    processes: int = 1,
    machines: int = 1,
) -> tuple[Forecast, list[str]]:
    """What :func:`merge_files` would read, write, hold and take, before any work.

    Args:
        recipe, out, options: as there.
        processes: how many would share the work.
        machines: like this one, for all of them.

    Returns:
        The forecast, and lines that tell it.

    Raises:
        InvalidInput: what ``merge_files`` would refuse before it reads a tensor.
    """
    job = open_job(recipe, options)
    directory = check_output(out, overwrite=job.options.overwrite, inputs=_inputs(job))
    cores, budget = machine.threads() * machines, job.budget
    if job.options.memory_budget is None:
        budget = budget * machines // max(machines, processes)
    planned = job.forecast(directory, Resources(budget, processes, max(1, cores // processes)))
    return planned, lines(planned, measured_rates(job.files[0], directory), cores, str(out))


def _merge(
    job: Job, partial: PartialOutput, processes: ProcessGroup, known: Mapping[str, Any], progress: Progress | None
) -> tuple[Analysis, SafetensorsSink]:
    """All tensors, wherever a former run was cut off; ``known`` are Gram matrices."""
    if job.budget < 2 * job.input_bytes:  # with results and factors beside them inputs hardly fit
        machine.return_buffers(job.budget)
    sink = job.sink(partial, create=processes.index == 0)
    with closing(FileJournal(partial.directory, processes.index, before=sink.sync)) as journal:
        processes.gather({})  # nobody appends before all have read what former runs wrote
        journal.recall("task Gram", known)
        analysis = job.analyze(
            spill_directory=partial.directory,  # where the output goes, since the system's may be memory
            progress=progress,
            processes=processes,
            journal=journal,
        )
        sink.tie(analysis.plan.aliases)
        sink.mark_written(journal.known("combination"))
        sink.leave(analysis.elsewhere)
        job.write(analysis, sink, progress)
        sink.sync()
    processes.gather({})
    return analysis, sink


def complete(
    job: Job,
    partial: PartialOutput,
    sink: SafetensorsSink,
    analysis: Analysis,
    state: Mapping[str, Any],
    started: float,
    calibrated: Mapping[str, Any] | None = None,
    screening: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is written when all tensors are.

    Args:
        job: whose merge it is, with the configuration of the tensors.
        partial, sink: where they were written.
        analysis: what they were made from.
        state: what decides their bytes.
        started: when, by ``time.perf_counter``.
        calibrated: as :func:`merge_files` has it.
        screening: what it found of each expert, those that were left out among them.

    Returns:
        The report.
    """
    sink.finish()
    recipe, directory, calibration = job.recipe, partial.output, job.recipe.calibration
    if not job.format.direct:
        job.format.save(open_checkpoint(partial.tensors, "merged tensors"), directory / job.format.output, sink.names)
    adapters = None
    if job.format is ADAPTERS:
        model = open_checkpoint(directory, "the model")
        limits = adapted.Limits(recipe.adapter_rank, recipe.adapter_size)
        if recipe.adapters == ONE:
            base = adapted.base_name(recipe.base, job.arranged)
            adapters = adapted.write_one(directory, job.arranged, limits, analysis, model, base)
        else:
            kind, base = recipe.adapters, partial.target.name
            adapters = adapted.write(directory, job.arranged, kind, limits, analysis, model, base)
    merged = {tensor.name: tensor.spec for tensor in analysis.plan.tensors}
    heads, agreed = job.arranged.head or list(analysis.plan.heads), job.arranged.agreed
    outputs = next((merged[name].shape[0] for name in heads or classifier(merged)), 0)
    for name, content in job.copied.items():
        if name == labels.FILE:
            content = labels.into_config(content, agreed.classes, outputs, recipe.dtype)
        write_file(directory / name, content)
    if job.preprocessing is not None and preprocessing_files.beside(directory) != job.preprocessing:
        text = job.preprocessing.for_transformers()
        if text is None:  # the report alone says it, and not what the base has instead
            (directory / preprocessing.FILE).unlink(missing_ok=True)
        else:
            write_file(directory / preprocessing.FILE, text)
    write_file(directory / RECIPE_FILE, plain_yaml.dump(dump(recipe, partial.target)).encode())
    write_file(directory / STATE.file, former.record(state, analysis))
    made = sorted({*ownership.files(directory)} - {CARD_FILE, REPORT.file})
    sizes = {name: (directory / name).stat().st_size for name in made}
    report: dict[str, Any] = {
        "method": recipe.method,
        "notes": [*recipe.notes, *job.notes, *agreed.notes],
        **analysis.report(job.arranged.config),
        "specialists": job.specialists,
        "preprocessing": job.preprocessing.plain() if job.preprocessing else None,
        "arrangement": {
            "preset": recipe.arrangement.preset,
            "head": {
                "rule": recipe.arrangement.head or job.arranged.config.head,
                "tensors": heads,
            },
            "labels": list(agreed.classes.labels or ()) or None,
            "folded": job.arranged.folded,
        },
        "adapters": adapters,
        "calibration": {**_UNTOLD, **asdict(calibration), **(calibrated or {})} if calibration else None,
        **({} if screening is None else {"screening": screening}),
        **({"statistics": from_output(partial.target, recipe.statistics)} if recipe.statistics else {}),
        "output": {"files": sizes, "bytes": sum(sizes.values()), "seconds": time.perf_counter() - started},
    }
    write_file(directory / CARD_FILE, card(directory, report, at=partial.target).encode(errors="backslashreplace"))
    text = REPORT.text({**report, WRITTEN: ownership.written(directory)})
    write_file(directory / REPORT.file, text)
    return dict(json.loads(text))


def _inputs(job: Job) -> list[str | Path]:
    """What is read: the files too, and not the directories alone, as they may be links that lead anywhere."""
    recipe = job.recipe
    beside = [path for path in (recipe.file, recipe.arrangement.head_features, recipe.statistics) if path]
    return [recipe.base, *(one.path for one in recipe.experts.values()), *job.files, *beside]
