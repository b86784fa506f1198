"""The optional package of kernels compiled ahead, for every GPU target; no GPU needed.

    python -m bench.release.compiled [--out dist] [--target sm_90 ...] [--cache build/triton]

Compiled is what the compile gate compiles (`bench.compile_check`): all that the operators can launch. Triton's cache
holds what `make kernels` has compiled of the same sources, and then this takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from bench.release.check import NAME, version
from bench.release.wheels import ROOT, ReleaseError, run

PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "{version}"
description = "Triton kernels of {name} {version}, compiled for Triton {triton}: a first merge compiles nothing"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["{name}=={version}"]

[tool.setuptools]
packages = ["{package}"]

[tool.setuptools.package-data]
{package} = ["*.json", "*/*"]
"""


def aligned(one: Any) -> Any:
    """The same launch with tensors at addresses as a GPU's allocator gives them."""
    import torch

    arguments = (
        torch.empty_like(argument) if isinstance(argument, torch.Tensor) and argument.data_ptr() % 16 else argument
        for argument in one.arguments
    )
    return dataclasses.replace(one, arguments=tuple(arguments))


def collect(targets: list[str], directory: Path, wanted: Callable[[Any], bool] = lambda launch: True) -> dict[str, int]:
    """Machine code and manifest into a directory.

    Args:
        targets: of ``launch.TARGETS``.
        wanted: which launches.

    Returns:
        How many kernels there are for each target.
    """
    import triton
    from triton.compiler import compiler
    from triton.runtime.driver import driver

    from bench import compile_check
    from r2m_kernels._triton import ahead

    key_of = compiler.get_cache_key
    keys: list[tuple[str, str, str]] = []

    def noted(source: Any, backend: Any, options: Any, env_vars: Any) -> str:
        keys.append((source.hash(), backend.hash(), options.hash()))
        return str(key_of(source, backend, options, env_vars=env_vars))

    parts: dict[str, Any] = {}
    for name in targets:
        target = compile_check.CHIPS[name].target
        place = directory / ahead.name_of(target)
        place.mkdir(parents=True)
        part: dict[str, Any] = {"kernels": {}}
        with mock.patch.object(compiler, "get_cache_key", noted):
            caught = [one for one in compile_check.launches(name) if wanted(one)]
            for one in [*caught, *map(aligned, caught)]:
                driver.set_active(compile_check.CompileOnly(name))
                keys.clear()
                kernel = one.compiled()
                if not keys:
                    continue  # the same as one before
                ((source, part["backend"], options),) = keys
                file = str(len(part["kernels"]))
                for what, path in kernel.metadata_group.items():
                    suffix = what.rpartition(".")[2]
                    if suffix in ("cubin", "hsaco", "json"):
                        shutil.copy2(path, place / f"{file}.{suffix}")
                named = {"name": kernel.src.name[:150], "source": source, "options": options, "file": file}
                part["kernels"][source, options] = named
        parts[ahead.name_of(target)] = {**part, "kernels": [*part["kernels"].values()]}
    manifest = {"triton": triton.__version__, "sources": ahead.sources(), "targets": parts}
    (directory / ahead.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    (directory / "__init__.py").write_text(f'"""Compiled kernels of {NAME} {version()}."""\n')
    return {name: len(part["kernels"]) for name, part in parts.items()}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--target", nargs="+", help="default: all of them")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "triton")
    options = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        import triton

        from r2m_kernels._triton import launch
        from r2m_kernels._triton.ahead import PACKAGE

        project = Path(place)
        counts = collect(options.target or list(launch.TARGETS), project / PACKAGE)
        texts = {"package": PACKAGE, "version": version(), "name": NAME, "triton": triton.__version__}
        (project / "pyproject.toml").write_text(PROJECT.format(**texts))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
        try:
            run([*pip, "--no-build-isolation", "--wheel-dir", options.out.resolve(), "."], project)
        except ReleaseError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 1
    (wheel,) = options.out.glob(f"{PACKAGE}-*.whl")
    print(f"{wheel}  {wheel.stat().st_size / 1e6:.1f} MB, Triton {triton.__version__}, kernels {counts}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
