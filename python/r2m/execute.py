"""A merge from files to files: checkpoints in, one output directory and its report out."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import r2m_kernels
from r2m import distributed, hub, machine
from r2m.arrangement import Arranged, Arrangement, arrange
from r2m.card import card
from r2m.checkpoints.files import Checkpoint
from r2m.checkpoints.formats import FORMATS, OUTPUTS
from r2m.checkpoints.layout import parse_size
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.writer import SafetensorsSink
from r2m.forecast import Forecast, Output, Resources, forecast, lines, measured_rates
from r2m.journal import FileJournal
from r2m.output import (
    CARD_FILE,
    COPIED_FILES,
    INPUTS,
    RECIPE_FILE,
    REPORT_FILE,
    SOURCES,
    STATE_FILE,
    Workplace,
    check_output,
    difference,
    workplace,
)
from r2m.places import MOST_RECORD, read_mapping, read_small, write_file
from r2m.preprocessing import FILE as PREPROCESSOR_FILE
from r2m.preprocessing import Preprocessing
from r2m.preprocessing import common as common_preprocessing
from r2m.preprocessing import found as found_preprocessing
from r2m.recipe import DTYPES
from r2m_kernels import Analysis, InvalidInput, MergeConfig, ProgressEvent, analyze, checks
from r2m_kernels.errors import R2MError
from r2m_kernels.streaming import Inputs, ProcessGroup, SingleProcess, choose_backend, sources_digest, usable_device

# Of the memory that is free, what a merge takes unless it is told: the page cache and others want some.
BUDGET_SHARE = 0.6
OUTPUT_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class Job:
    """What is merged from where to where; see :func:`merge_files` for the fields.

    Made by :func:`open_job`, which has read the headers of all checkpoints and found the options valid.
    """

    base: str | Path
    experts: Mapping[str, str | Path]
    out: str | Path
    config: MergeConfig
    method: str
    device: str | None
    backend: str
    dtype: str | None
    file_format: str
    shard_bytes: int
    budget: int
    arrangement: Arrangement
    sources: tuple[Checkpoint, ...]  # the base's, then the experts'
    arranged: Arranged
    counts: Mapping[str, int]  # of specialists in each expert
    chosen_preprocessing: Preprocessing | None
    expert_preprocessing: Mapping[str, Preprocessing]  # as it was told
    preprocessing: Preprocessing | None  # of the merged model, if anything is known

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Of the output; ``None``: the base's."""
        return OUTPUT_DTYPES[self.dtype] if self.dtype else None

    @property
    def metadata(self) -> dict[str, str]:
        """Of the output's headers. No time, no path, no expert's name: equal merges give equal bytes."""
        return self.metadata_of(self.arranged.config)

    @staticmethod
    def metadata_of(config: MergeConfig) -> dict[str, str]:
        """The same for a merge with another configuration."""
        return {
            "r2m_kernels_version": r2m_kernels.__version__,
            "r2m_config": json.dumps(config.to_dict(), sort_keys=True, allow_nan=False),
        }

    def recipe(self, config: MergeConfig | None = None) -> dict[str, Any]:
        """The merge in mergekit's words, or one with another configuration.

        Paths are absolute: the recipe is not where the command was given.
        """
        wanted = self.arrangement
        models: list[dict[str, Any]] = []
        for name, path in self.experts.items():
            rules = wanted.expert_renames.get(name)
            own: dict[str, Any] = {"rename": dict(rules)} if rules else {}
            if name in self.expert_preprocessing:
                own["preprocessing"] = self.expert_preprocessing[name].plain()
            models.append({"model": _fixed(path), "name": name, **own})
        return {
            "merge_method": self.method,
            "base_model": _fixed(self.base),
            "models": models,
            "parameters": (config or self.config).to_dict(),
            "dtype": self.dtype,
            **({"format": self.file_format} if self.file_format != "safetensors" else {}),
            **({"rename": dict(wanted.rename)} if wanted.rename else {}),
            **({"preset": wanted.preset} if wanted.preset else {}),
            **({"head": wanted.head} if wanted.head else {}),
            **({"head_tensors": list(wanted.head_tensors)} if wanted.head_tensors else {}),
            **({"head_features": _fixed(wanted.head_features)} if wanted.head_features else {}),
            **({"preprocessing": self.chosen_preprocessing.plain()} if self.chosen_preprocessing else {}),
        }

    def state(self) -> dict[str, Any]:
        """What decides the output's bytes, as ``--resume`` compares it. Memory and processes do not."""
        recipe = self.recipe()
        experts = {model.pop("name"): model for model in recipe.pop("models")}
        device = usable_device(self.device or "cpu")
        chosen = choose_backend(self.backend, device)
        return {
            "r2m_kernels": r2m_kernels.__version__,
            "torch": torch.__version__,
            "backend": f"{chosen.name} ({chosen.variant})",
            SOURCES: sources_digest(chosen.name, Path(__file__).parent),
            "device": device.type,
            **recipe,
            "order of experts": list(experts),
            "experts": experts,
            "max_shard_size": self.shard_bytes,
            "specialists": dict(self.counts),
            "features": self.arranged.features,
            INPUTS: {one.pop("file"): one for source in self.sources for one in source.fingerprints},
        }


def open_job(
    base: str | Path,
    experts: Mapping[str, str | Path],
    out: str | Path,
    config: MergeConfig,
    *,
    method: str = "r2m",
    device: str | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    file_format: str = "safetensors",
    max_shard_size: str | int = "5GB",
    memory_budget: str | int | None = None,
    arrangement: Arrangement | None = None,
    preprocessing: Preprocessing | None = None,
    expert_preprocessing: Mapping[str, Preprocessing] | None = None,
) -> Job:
    """Arguments and errors are :func:`merge_files`'s; nothing but headers is read."""
    shard_bytes = parse_size(max_shard_size)
    if dtype is not None:
        checks.choice("dtype", dtype, tuple(OUTPUT_DTYPES))
    checks.choice("format", file_format, tuple(FORMATS))
    if memory_budget is None:
        budget = int(BUDGET_SHARE * machine.free_memory() / distributed.local_processes())
    else:
        budget = checks.byte_size("memory_budget", memory_budget)
    wanted = arrangement or Arrangement()
    first, *rest = (
        open_checkpoint(base, f"base ({base})"),
        *(open_checkpoint(path, f"expert '{name}' ({path})") for name, path in experts.items()),
    )
    told = expert_preprocessing or {}
    known = {name: told.get(name) or found_preprocessing(_local(path)) for name, path in experts.items()}
    counts = {name: 1 if hub.is_reference(path) else _specialists(path) for name, path in experts.items()}
    effective = config
    if config.weights is None and any(count > 1 for count in counts.values()):
        effective = config.replace(weights=tuple(map(float, counts.values())))
    arranged = arrange(first, dict(zip(experts, rest, strict=True)), effective, wanted)
    sources = (first, *rest)
    return Job(
        base,
        experts,
        out,
        config,
        method,
        device,
        backend,
        dtype,
        file_format,
        shard_bytes,
        budget,
        wanted,
        sources,
        arranged,
        counts,
        preprocessing,
        told,
        common_preprocessing(known, preprocessing),
    )


def merge_files(
    base: str | Path,
    experts: Mapping[str, str | Path],
    out: str | Path,
    config: MergeConfig,
    *,
    method: str = "r2m",
    device: str | None = None,
    backend: str = "auto",
    dtype: str | None = None,
    file_format: str = "safetensors",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    memory_budget: str | int | None = None,
    arrangement: Arrangement | None = None,
    preprocessing: Preprocessing | None = None,
    expert_preprocessing: Mapping[str, Preprocessing] | None = None,
    reuse: bool = False,
    team: ProcessGroup | None = None,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> dict[str, Any]:
    """Merge checkpoints into a new directory.

    The directory holds ``model.safetensors`` (or shards and their index), ``config.json`` and
    ``preprocessor_config.json`` where the base is a directory that has them, ``r2m_config.yaml`` (the recipe)
    and ``r2m_report.json`` (the report). It appears when all of that is on the disk. A run that is cut off leaves its
    work in ``OUT.partial``, for ``resume``; one that finds its input unusable leaves nothing.

    Args:
        base: a safetensors file, a file of ``torch.save`` or a Hugging Face directory.
        experts: name → the same.
        out: the directory to create.
        config: how to merge.
        method: the name of what ``config`` does, for recipe and report.
        device: where to compute; ``None``: the engine's choice.
        backend: the engine's backend.
        dtype: a key of :data:`OUTPUT_DTYPES` for the floating-point tensors; ``None``: as in the base.
        file_format: a key of :data:`r2m.checkpoints.formats.FORMATS`; all but ``"safetensors"`` are one file.
        max_shard_size: bytes of tensors per file, as :func:`r2m.checkpoints.layout.parse_size` reads them. It
            alone decides the layout.
        overwrite: replace ``out`` if it is an empty directory or the output of a former merge.
        resume: go on from where a former run of the same merge was cut off; from the start if there is none.
        memory_budget: working memory of this process, in bytes or as "4GiB"; ``None``: ``BUDGET_SHARE`` of what is free
            on the machine, by the processes of the job on it. It touches no bit of the output.
        arrangement: how the checkpoints are brought into one layout, and what becomes of the head.
        preprocessing: of the merged model, whatever the experts have; ``None``: theirs, which must not differ.
        expert_preprocessing: what experts have, beside those whose directory says so.
        reuse: take what a former merge into ``out`` found, where this one would find the same to the bit.
        team: the processes that share the work; all of them call this alike.
        progress: called as the work goes on.

    Returns:
        The report, as in ``r2m_report.json``.

    Raises:
        InvalidInput: an input, an option or ``out`` cannot be used.
        BackendUnavailable: the backend asked for cannot run here.
        OSError: a file cannot be read or written; ``filename`` is set.
    """
    started = time.perf_counter()
    team = team or SingleProcess()
    with contextlib.ExitStack() as stack:
        job, place, trouble = None, None, None
        try:
            job = open_job(
                base,
                experts,
                out,
                config,
                method=method,
                device=distributed.local_device(device),
                backend=backend,
                dtype=dtype,
                file_format=file_format,
                max_shard_size=max_shard_size,
                memory_budget=memory_budget,
                arrangement=arrangement,
                preprocessing=preprocessing,
                expert_preprocessing=expert_preprocessing,
            )
            state = job.state()
            if team.index == 0:
                # The files too, and not the directories alone: they may be links that lead into `out`.
                inputs = [base, *experts.values(), *(file for source in job.sources for file in source.files)]
                check_output(out, overwrite=overwrite, inputs=inputs, resume=resume)
                place = stack.enter_context(workplace(out, overwrite=overwrite, resume=resume, state=state))
        except (R2MError, OSError) as error:
            trouble = error
        shared = team.gather({} if place is None else {"place": place, "state": state}, trouble)
        assert job is not None
        place = shared["place"]
        team.gather({}, _other_state(team, state, shared["state"]))
        if place.finished:
            return read_mapping(Path(out) / REPORT_FILE, f"out ({out}): {REPORT_FILE}", MOST_RECORD)
        known = _recalled(out, job) if reuse else {}
        return _merge(job, place, team, started, known, progress)


def plan_merge(
    base: str | Path,
    experts: Mapping[str, str | Path],
    out: str | Path,
    config: MergeConfig,
    *,
    overwrite: bool = False,
    processes: int | None = None,
    machines: int = 1,
    **options: Any,
) -> tuple[Forecast, list[str]]:
    """What :func:`merge_files` would read, write, hold and take, before any work.

    Args:
        base, experts, out, config, overwrite, options: as there.
        processes: how many would share the work.
        machines: like this one, for all of them.

    Returns:
        The forecast, and lines that tell it.

    Raises:
        InvalidInput: what ``merge_files`` would refuse before it reads a tensor.
    """
    job = open_job(base, experts, out, config, **options)
    files = [file for source in job.sources for file in source.files]
    directory = check_output(out, overwrite=overwrite, inputs=[base, *experts.values(), *files])
    cores = machine.threads() * machines
    count = processes or 1
    told = options.get("memory_budget") is not None
    memory = job.budget if told else job.budget * machines // max(machines, count)
    found = forecast(
        Inputs(job.arranged.base, job.arranged.experts),
        job.arranged.config,
        choose_backend(job.backend, usable_device(job.device or "cpu")),
        Output(directory, job.metadata, job.torch_dtype, job.shard_bytes, FORMATS[job.file_format].copies),
        Resources(memory, count, max(1, cores // count)),
    )
    return found, lines(found, measured_rates(files[0], directory), cores, str(out))


def _merge(
    job: Job,
    place: Workplace,
    team: ProcessGroup,
    started: float,
    known: Mapping[str, Any],
    progress: Callable[[ProgressEvent], None] | None,
) -> dict[str, Any]:
    """All of it but for the renaming."""
    # Another format is written from that one when all is merged: what can be resumed is in one format.
    directory = place.output if FORMATS[job.file_format].direct else place.tensors
    if team.index == 0:
        directory.mkdir(exist_ok=True)
    sink = SafetensorsSink(directory, job.metadata, job.shard_bytes, create=team.index == 0)
    with closing(FileJournal(place.directory, team.index, before=sink.sync)) as journal:
        team.gather({})  # nobody appends before all have read what former runs wrote
        journal.recall("task Gram", known)
        analysis = analyze(
            job.arranged.base,
            job.arranged.experts,
            job.arranged.config,
            device=job.device,
            backend=job.backend,
            memory_budget=job.budget,
            spill_directory=place.directory,  # where the output goes, since the system's may be memory
            progress=progress,
            processes=team,
            journal=journal,
        )
        sink.tie(analysis.plan.aliases)
        sink.mark_written(journal.known("combination"))
        sink.leave(analysis.elsewhere)
        analysis.write(sink, dtype=job.torch_dtype, progress=progress)
        sink.sync()
    team.gather({})
    if team.index != 0:
        return analysis.report()
    return complete(job, place.output, place.tensors, sink, analysis, started)


def complete(
    job: Job,
    output: Path,
    tensors: Path,
    sink: SafetensorsSink,
    analysis: Analysis,
    started: float,
    config: MergeConfig | None = None,
    effective: MergeConfig | None = None,
) -> dict[str, Any]:
    """What is written when all tensors are.

    Args:
        job: whose merge it is.
        output: the directory with the output's files.
        tensors: where the sink wrote them, if the output's format is another.
        sink: which has all of them.
        analysis: what they were made from.
        started: when, by ``time.perf_counter``.
        config: what was asked for; ``None``: the job's.
        effective: what they were made with, as the arrangement has it; ``None``: the analysis's.

    Returns:
        The report.
    """
    sink.finish()
    file_format = FORMATS[job.file_format]
    if not file_format.direct:
        file_format.save(open_checkpoint(tensors, "merged tensors"), output / file_format.output, sink.names)
    base = _local(job.base)
    # They speak of the base's own tensors: under other names nothing of it would load what is here.
    for name in COPIED_FILES if job.arranged.base.specs.keys() == job.sources[0].specs.keys() else ():
        if (base / name).is_file():
            write_file(output / name, read_small(base / name, f"base ({job.base}): {name}"))
    if job.preprocessing is not None and found_preprocessing(output) != job.preprocessing:
        write_file(output / PREPROCESSOR_FILE, job.preprocessing.for_transformers())
    recipe = yaml.safe_dump(job.recipe(config), sort_keys=False, allow_unicode=True)
    write_file(output / RECIPE_FILE, recipe.encode(errors="backslashreplace"))
    if config is None:
        found = {name: gram.tolist() for name, gram in analysis.grams.items()}
        checked = {tensor.name: None for tensor in analysis.plan.of("statistic", "extra")}
        state = {"state": job.state(), "grams": dict(sorted({**found, **checked}.items()))}
        write_file(output / STATE_FILE, json.dumps(state).encode())
    sizes = {entry.name: entry.stat().st_size for entry in sorted(output.iterdir()) if entry.name != REPORT_FILE}
    report: dict[str, Any] = {
        "method": job.method,
        **analysis.report(effective),
        "specialists": job.counts,
        "preprocessing": job.preprocessing.plain() if job.preprocessing else None,
        "arrangement": {
            "preset": job.arrangement.preset,
            "head": {"rule": job.arrangement.head, "tensors": job.arranged.head},
            "folded": job.arranged.folded,
        },
        "output": {
            "files": sizes,
            "bytes": sum(sizes.values()),
            "seconds": time.perf_counter() - started,
        },
    }
    text = json.dumps(report, allow_nan=False, indent=2, ensure_ascii=False) + "\n"
    write_file(output / REPORT_FILE, text.encode(errors="backslashreplace"))
    write_file(output / CARD_FILE, card(output).encode(errors="backslashreplace"))
    return report


def _recalled(out: str | Path, job: Job) -> dict[str, Any]:
    """Gram matrices of the experts of ``job`` from a former merge into ``out`` that had them all, and more perhaps.

    They are what the job would find, to the bit: same files, same options, and kernels whose inner products do not
    depend on who else is there, which are the native ones. Empty where any of that is not so.
    """
    try:
        content = read_mapping(Path(out) / STATE_FILE, STATE_FILE, MOST_RECORD)
        before, grams = dict(content["state"]), dict(content["grams"])
        names = list(before["order of experts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    now = json.loads(json.dumps(job.state()))
    if not now["backend"].startswith("native") or not set(job.experts) <= set(names):
        return {}
    inputs = now[INPUTS].keys()
    before["experts"] = {name: one for name, one in before["experts"].items() if name in job.experts}
    before[INPUTS] = {file: one for file, one in before[INPUTS].items() if file in inputs}
    for state in (before, now):
        for free in ("merge_method", "dtype", "format", "max_shard_size", "order of experts", "specialists"):
            state.pop(free, None)
        state["parameters"] = {name: one for name, one in state["parameters"].items() if name != "weights"}
    if difference(before, now):
        return {}
    places = [names.index(name) for name in job.experts]
    return {
        name: None if rows is None else [[rows[i][j] for j in places] for i in places] for name, rows in grams.items()
    }


def _specialists(path: str | Path) -> int:
    """How many specialists a checkpoint stands for: those of the merge that wrote it, or one."""
    place = Path(path)
    report = (place if place.is_dir() else place.parent) / REPORT_FILE
    if not report.is_file() or (place.is_file() and place.name not in OUTPUTS):
        return 1
    try:
        content = read_mapping(report, REPORT_FILE, MOST_RECORD)
        return sum(int(count) for count in content["specialists"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 1


def _local(path: str | Path) -> Path:
    """Where a checkpoint lies on this machine."""
    return hub.fetch(str(path)).path if hub.is_reference(path) else Path(path)


def _fixed(path: str | Path) -> str:
    """A path that means the same from everywhere, and on the Hub tomorrow."""
    return hub.fetch(str(path)).pinned if hub.is_reference(path) else os.path.abspath(path)


def _other_state(team: ProcessGroup, state: Mapping[str, Any], first: Mapping[str, Any]) -> InvalidInput | None:
    """Why this process cannot share the work of the first one."""
    found = difference(first, state)
    return InvalidInput(f"process {team.index} of {team.size} is not on the same merge: {found}") if found else None
