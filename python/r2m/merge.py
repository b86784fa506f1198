"""A merge from files to files: checkpoints in, one output directory and its report out."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

from r2m import (
    adapted,
    former,
    kept_factors,
    labels,
    machine,
    ownership,
    plain_yaml,
    preprocessing,
    preprocessing_files,
)
from r2m.card import card
from r2m.checkpoints.formats import ADAPTERS
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.saved_names import family_of
from r2m.checkpoints.writer import SafetensorsSink
from r2m.forecast import Forecast, Resources, lines, measured_rates
from r2m.job import Job, open_job
from r2m.journal import FileJournal
from r2m.kept_factors import FactorFiles
from r2m.options import Options
from r2m.output import (
    PartialOutput,
    Workplace,
    check_output,
    difference,
    held,
    partial_output,
)
from r2m.ownership import CARD_FILE, RECIPE_FILE
from r2m.places import from_output, write_file
from r2m.recipe import ONE, Recipe
from r2m.recipe_file import dump
from r2m.records import REPORT, STATE, WRITTEN
from r2m_kernels import Analysis, Progress
from r2m_kernels.errors import DoesNotFit, R2MError
from r2m_kernels.heads import classifier
from r2m_kernels.screening import Screening
from r2m_kernels.streaming import (
    ProcessGroup,
    SingleProcess,
)

# What is known of how a calibration was found where a recipe alone says it.
_UNTOLD = dict.fromkeys(("rule", "pictures", "fakes", "before", "after"))


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
        job, partial, trouble, kept = None, None, None, None
        run = {"overwrite": options.overwrite, "resume": options.resume}
        screening: dict[str, Any] | None = None
        try:
            job = open_job(recipe, options)
            if options.screen is not None:
                check_output(out, inputs=job.inputs, **run)  # before it is read
                found = job.screen(processes, progress)
                job = _without(job, found, options.screen)
                screening = {"asked": options.screen, **found.plain()}
            state = job.state(out)
            kept = _kept(job, out)
            if processes.index == 0:
                workplace = workplace or stack.enter_context(held(out))
                check_output(out, inputs=job.inputs, **run)
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
        analysis, sink = _merge(job, partial, processes, known, kept, progress)
        everyone = processes.gather({} if kept is None else {f"kept factors {processes.index}": kept.counts})
        if processes.index != 0:
            return analysis.report()
        assert workplace is not None
        workplace.check()
        about = None if kept is None else _about(kept, analysis, everyone.values())
        report = complete(job, partial, sink, analysis, state, started, calibrated, screening, about)
        if kept is not None:
            kept.sweep()
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


def _kept(job: Job, out: str | Path) -> FactorFiles | None:
    """Where truncations of single experts are kept, if they are asked for or a former merge into ``out`` kept them."""
    known = job.options.reuse and kept_factors.is_there(out)
    if job.not_single or not (job.options.keep_factors or known):
        return None
    return FactorFiles(kept_factors.directory_of(out), job.single(out))


def _about(kept: FactorFiles, analysis: Analysis, counts: Iterable[Sequence[int]]) -> dict[str, int]:
    """How many truncations of single experts all processes of this run took and made, and of how many none is kept."""
    taken, made = map(sum, zip(*counts, strict=True))
    single = [one.name for one in analysis.plan.tensors if one.truncated and not (one.whole or one.factored)]
    return {"taken": taken, "made": made, "not_kept": kept.missing(single)}


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
    directory = check_output(out, overwrite=job.options.overwrite, inputs=job.inputs)
    cores, budget = machine.threads() * machines, job.budget
    if job.options.memory_budget is None:
        budget = budget * machines // max(machines, processes)
    planned = job.forecast(directory, Resources(budget, processes, max(1, cores // processes)))
    return planned, lines(planned, measured_rates(job.files[0], directory), cores, str(out))


def _merge(
    job: Job,
    partial: PartialOutput,
    processes: ProcessGroup,
    known: Mapping[str, Any],
    kept: FactorFiles | None,
    progress: Progress | None,
) -> tuple[Analysis, SafetensorsSink]:
    """All tensors, wherever a former run was cut off; ``known`` are Gram matrices, ``kept`` has truncations."""
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
            kept=kept,
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
    factors: Mapping[str, int] | None = None,
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
        factors: how many truncations were taken, made and not kept, where they may be.

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
        family = family_of(job.copied.get(labels.FILE, b""))
        if recipe.adapters == ONE:
            base = adapted.Base(adapted.base_name(recipe.base, job.arranged), family)
            adapters = adapted.write_one(directory, job.arranged, limits, analysis, model, base)
        else:
            kind, base = recipe.adapters, adapted.Base(partial.target.name, family)
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
        **({} if factors is None else {"factors": factors}),
        **({"statistics": from_output(partial.target, recipe.statistics)} if recipe.statistics else {}),
        "output": {"files": sizes, "bytes": sum(sizes.values()), "seconds": time.perf_counter() - started},
    }
    write_file(directory / CARD_FILE, card(directory, report, at=partial.target).encode(errors="backslashreplace"))
    text = REPORT.text({**report, WRITTEN: ownership.written(directory)})
    write_file(directory / REPORT.file, text)
    return dict(json.loads(text))
