"""A checkpoint as another file (``r2m convert``), and the only door for files that are programs (``allow_pickle``)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2m.arrangement import plain
from r2m.checkpoints import state_dict
from r2m.checkpoints.formats import SAFETENSORS, SUFFIXES, of_suffix
from r2m.checkpoints.reader import open_checkpoint
from r2m.checkpoints.writer import SafetensorsSink
from r2m.extras import look_here
from r2m.places import beside, created, put, sync
from r2m.recipe import Arrangement
from r2m_kernels.errors import BadCheckpoint, BadFile, BadOption, NotFinite, printable, quoted
from r2m_kernels.meanings import composites
from r2m_kernels.streaming import TensorSource, TensorSpec, dtype_name


def convert(
    source: str | Path,
    out: str | Path,
    *,
    arrangement: Arrangement | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> str:
    """Write a checkpoint's tensors to one file, whose ending says in which format.

    The file appears when it is whole and on the disk.

    Args:
        source: whatever ``r2m merge`` reads; with ``allow_pickle`` also a pickled module or a TorchScript archive.
        out: a path that ends in one of :data:`r2m.checkpoints.formats.SUFFIXES`.
        arrangement: names; its rules about heads are a merge's.
        dtype: of the floating-point tensors; ``None``: as they are.
        overwrite: replace a file that is there.
        allow_pickle: load with Python's pickle or as TorchScript, which **runs code from the file**.

    Returns:
        What was done, in a line, and what was left out.

    Raises:
        InvalidInput: the source cannot be read so, or ``out`` cannot be written so.
        OSError: of the file system; ``filename`` is set.
    """
    target = Path(out)
    file_format = of_suffix(target)
    if file_format is None:
        raise BadOption(f"out ({out}): expected a name that ends in {', '.join(SUFFIXES)}")
    if target.is_dir() or (os.path.lexists(target) and not overwrite):
        kind = "is a directory" if target.is_dir() else "exists already; --overwrite replaces it"
        raise BadFile(f"out ({out}): {kind}")
    if not target.parent.is_dir():
        raise BadFile(f"out ({out}): there is no directory {target.parent}")
    label = f"source ({printable(str(source))})"
    with beside(target) as partial:
        arrangement = arrangement or Arrangement()
        readable = _trusted(Path(source), label, partial / "state.pth", arrangement.key) if allow_pickle else source
        opened = open_checkpoint(readable, label, arrangement.key)
        real = Path(os.path.realpath(target))
        if real in {Path(os.path.realpath(file)) for file in (source, *opened.files)}:
            raise BadFile(f"out ({out}): is a file of the source, and inputs are never written to")
        view = plain(opened, arrangement)
        unstorable = [name for name, spec in view.specs.items() if spec.dtype.is_complex]
        if unstorable:
            raise BadCheckpoint(f"{label}: tensor {quoted(unstorable[0])} is complex, which no format here stores")
        meant = [one.sentence for one in composites(view.specs) if one.quantised] if dtype is not None else []
        if meant:
            raise BadCheckpoint(f"{label}: {meant[0]}; without --dtype it is written as it is")
        written = _write(view, partial, dtype)
        if file_format is not SAFETENSORS:
            tensors, written = written, partial / "converted"
            file_format.save(open_checkpoint(tensors, "converted tensors"), written, list(view.specs))
        try:
            put(written, target, replace=overwrite)
        except FileExistsError:
            raise BadFile(f"out ({out}): exists already; --overwrite replaces it") from None
    sync(target.parent)
    return "\n".join(
        [f"{len(view.specs)} tensors from {printable(str(source))} to {printable(str(out))}", *opened.notes]
    )


def _write(source: TensorSource, directory: Path, dtype: torch.dtype | None) -> Path:
    def written(spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.shape, dtype) if dtype is not None and spec.dtype.is_floating_point else spec

    specs = {name: written(spec) for name, spec in source.specs.items()}
    sink = SafetensorsSink(directory, {}, max(1, sum(spec.nbytes for spec in specs.values())))
    sink.tie(source.aliases)
    sink.begin(specs)
    for name, spec in specs.items():
        if name in source.aliases:
            continue
        tensor = source.read(name)
        changed = tensor.to(spec.dtype)
        # Not every type can be searched for Inf, but what it becomes can.
        if spec.dtype != tensor.dtype and changed.isinf().any() and not tensor.float().isinf().any():
            raise NotFinite(f"{source.label}: tensor {quoted(name)} exceeds the range of {dtype_name(spec.dtype)}")
        sink.write(name, changed)
    sink.finish()
    return directory / SAFETENSORS.single


def _trusted(path: Path, label: str, to: Path, key: str | None) -> Path:
    """What a program in a file makes when it runs, as a file that is none."""
    if not path.is_file():
        raise BadCheckpoint(f"{label}: with --allow-pickle expected a file")
    look_here()  # where a module was saved by a script, its classes lie beside it
    loaded: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript goes to torch.jit.load, with a warning
            loaded = torch.load(path, map_location="cpu", weights_only=False)
    except OSError:
        raise
    except ModuleNotFoundError as error:
        raise BadCheckpoint(f"{label}: needs the Python module {quoted(str(error.name))} it was saved with") from None
    except Exception as error:  # whatever a stranger's code raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadCheckpoint(f"{label}: could not be loaded: {printable(lines[0][:200])}") from None
    if isinstance(loaded, Mapping):
        keys = (key, *state_dict.WRAPPERS) if key else state_dict.WRAPPERS
        loaded = next((loaded[one] for one in keys if isinstance(loaded.get(one), nn.Module)), loaded)
    state = (
        loaded.state_dict() if isinstance(loaded, nn.Module) else state_dict.chosen(loaded, label, Tensor, key).tensors
    )
    with created(to) as file:
        torch.save({name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}, file)
    return to
