"""Kernels that were compiled before: those of an optional package are put where Triton keeps what it has compiled.

The package ``r2m_kernels_compiled`` holds machine code by target, and of each kernel the hashes that Triton makes of
its source and its options. Triton's own functions make the keys from them here, so that what does not fit is never
found: another Triton, other kernels, other options. A merge whose kernels are all there compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import compiler
from triton.runtime import cache
from triton.runtime.driver import driver

from . import launch

PACKAGE, MANIFEST = "r2m_kernels_compiled", "manifest.json"


@dataclass(frozen=True)
class Hashed:
    """Stands for a source or for options, of which a key takes the hash alone."""

    value: str

    def hash(self) -> str:
        """As it was when the kernel was compiled."""
        return self.value


def sources() -> str:
    """A hash of the kernels and of how they are launched."""
    here, digest = Path(launch.__file__).parent, hashlib.sha256()
    for path in (*sorted(here.glob("*.py")), here / "launch.json"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def name_of(target: Any) -> str:
    """The manifest's name of a ``GPUTarget``."""
    return f"{target.backend}-{target.arch}"


def place() -> Path | None:
    """The directory of the package, if it is installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent if found is not None and found.origin else None


@functools.cache
def fill(device: torch.device) -> str:
    """Give Triton the kernels for a GPU; once in a process.

    Returns:
        What became of it, for the report; empty where the package is not installed.
    """
    directory = place()
    if directory is None or device.type != "cuda":
        return ""
    with torch.cuda.device(device):
        return fill_for(driver.active.get_current_target(), directory)


def fill_for(target: Any, directory: Path) -> str:
    """The same for a ``GPUTarget``, from the package's directory."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        misfit = unfit(manifest, target)
        if misfit:
            return f"{PACKAGE} is not used: {misfit}"
        part = manifest["targets"][name_of(target)]
        backend = compiler.make_backend(target)
        for kernel in part["kernels"]:
            _put(directory / name_of(target), kernel, backend)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return (
            f"{PACKAGE} is not used: it cannot be read, or the cache not be written ({type(error).__name__}: {error})"
        )
    return f"{len(part['kernels'])} kernels for {name_of(target)} were compiled before"


def unfit(manifest: dict[str, Any], target: Any) -> str:
    """Why what is there is not for this installation; empty where it is."""
    if manifest["triton"] != triton.__version__:
        return f"it is for Triton {manifest['triton']}, and this is {triton.__version__}"
    if manifest["sources"] != sources():
        return "it is of other kernels than these; both are to be of one version"
    if name_of(target) not in manifest["targets"]:
        return f"it is for {', '.join(manifest['targets'])}, and not for {name_of(target)}"
    changes = compiler.get_cache_invalidating_env_vars()
    if changes:
        return f"the environment tells the compiler what to do ({', '.join(changes)})"
    if manifest["targets"][name_of(target)]["backend"] != compiler.make_backend(target).hash():
        return "its assembler was another one"
    return ""


def _put(files: Path, kernel: dict[str, str], backend: Any) -> None:
    """One kernel into Triton's cache, if it is not there."""
    text = compiler.get_cache_key(Hashed(kernel["source"]), backend, Hashed(kernel["options"]), env_vars={})
    key = hashlib.sha256(text.encode("utf-8")).hexdigest()
    manager = cache.get_cache_manager(key)
    described, binary = f"{kernel['name']}.json", f"{kernel['name']}.{backend.binary_ext}"
    if manager.get_group(described) is not None:
        return
    metadata = json.loads((files / f"{kernel['file']}.json").read_text(encoding="utf-8"))
    group = {
        binary: manager.put((files / f"{kernel['file']}.{backend.binary_ext}").read_bytes(), binary),
        described: manager.put(json.dumps({**metadata, "hash": key}), described, binary=False),
    }
    manager.put_group(described, group)
