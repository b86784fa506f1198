"""A merge from files to files: checkpoints in, one output directory and its report out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import r2m_kernels
from r2m.checkpoints.layout import parse_size
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.writer import SafetensorsSink, write_file
from r2m.output import COPIED_FILES, RECIPE_FILE, REPORT_FILE, check_output, new_directory
from r2m_kernels import MergeConfig, ProgressEvent, _checks, analyze

OUTPUT_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


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
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    memory_budget: str | int | None = None,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> dict[str, Any]:
    """Merge checkpoints into a new directory.

    The directory holds ``model.safetensors`` (or shards and their index), ``config.json`` and
    ``preprocessor_config.json`` where the base is a directory that has them, ``r2m_config.yaml`` (the recipe)
    and ``r2m_report.json`` (the report). It appears when all of that is on the disk; after an error or Ctrl-C
    nothing is left of it.

    Args:
        base: a safetensors file or a Hugging Face directory.
        experts: name → the same.
        out: the directory to create.
        config: how to merge.
        method: the name of what ``config`` does, for recipe and report.
        device: where to compute; ``None``: the engine's choice.
        backend: the engine's backend.
        dtype: a key of :data:`OUTPUT_DTYPES` for the floating-point tensors; ``None``: as in the base.
        max_shard_size: bytes of tensors per file, as :func:`r2m.checkpoints.layout.parse_size` reads them. It
            alone decides the layout.
        overwrite: replace ``out`` if it is an empty directory or the output of a former merge.
        memory_budget: working memory, in bytes or as "4GiB"; ``None``: the engine's choice.
        progress: called as the work goes on.

    Returns:
        The report, as in ``r2m_report.json``.

    Raises:
        InvalidInput: an input, an option or ``out`` cannot be used.
        BackendUnavailable: the backend asked for cannot run here.
        OSError: a file cannot be read or written; ``filename`` is set.
    """
    started = time.perf_counter()
    shard_bytes = parse_size(max_shard_size)
    if dtype is not None:
        _checks.choice("dtype", dtype, tuple(OUTPUT_DTYPES))
    base_source = open_checkpoint(base, f"base ({base})")
    sources = {name: open_checkpoint(path, f"expert '{name}' ({path})") for name, path in experts.items()}
    # The files too, and not the directories alone: they may be links that lead into `out`.
    files = [file for source in (base_source, *sources.values()) for file in source.files]
    directory = check_output(out, overwrite=overwrite, inputs=[base, *experts.values(), *files])

    analysis = analyze(
        base_source,
        sources,
        config,
        device=device,
        backend=backend,
        memory_budget=memory_budget,
        spill_directory=directory,  # where the output goes, since the system's may be memory
        progress=progress,
    )
    with new_directory(out, overwrite=overwrite) as partial:
        sink = SafetensorsSink(partial, _metadata(config), shard_bytes)
        analysis.write(sink, dtype=OUTPUT_DTYPES[dtype] if dtype else None, progress=progress)
        sink.finish()
        for name in COPIED_FILES:
            if (Path(base) / name).is_file():
                write_file(partial / name, (Path(base) / name).read_bytes())
        write_file(partial / RECIPE_FILE, _recipe(base, experts, config, method, dtype))
        sizes = {entry.name: entry.stat().st_size for entry in sorted(partial.iterdir())}
        report: dict[str, Any] = {
            "method": method,
            **analysis.report(),
            "output": {
                "files": sizes,
                "bytes": sum(sizes.values()),
                "seconds": time.perf_counter() - started,
            },
        }
        text = json.dumps(report, allow_nan=False, indent=2, ensure_ascii=False) + "\n"
        write_file(partial / REPORT_FILE, text.encode(errors="backslashreplace"))
    return report


def _metadata(config: MergeConfig) -> dict[str, str]:
    # No time, no path, no expert's name: equal merges give equal bytes.
    return {
        "r2m_kernels_version": r2m_kernels.__version__,
        "r2m_config": json.dumps(config.to_dict(), sort_keys=True, allow_nan=False),
    }


def _recipe(
    base: str | Path, experts: Mapping[str, str | Path], config: MergeConfig, method: str, dtype: str | None
) -> bytes:
    """The merge in mergekit's words. Paths are absolute: the recipe is not where the command was given."""
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": os.path.abspath(base),
        "models": [{"model": os.path.abspath(path), "name": name} for name, path in experts.items()],
        "parameters": config.to_dict(),
        "dtype": dtype,
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode(errors="backslashreplace")
