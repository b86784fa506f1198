"""The repository from which Hugging Face's `kernels` loads the numerics: what kernel-builder builds, and has built.

    python -m bench.release.hub_kernel [--out build/hub-kernel] [--repo-id OWNER/r2m-kernels]

Triton's kernels are compiled where they run, so that a variant is the package as it is, with a name of its own by
its content: several versions can be loaded side by side, each with its own ``torch.ops``. Without the native library
a CPU is served by the torch backend.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

from bench.release.check import NAME
from bench.release.wheels import ROOT, tracked

BACKENDS = {"cpu": None, "cuda": ["8.0+PTX"], "rocm": ["gfx942"]}
EDITION, VERSION = 5, 0  # of the format; of the API, 0 while it may change
KERNEL = NAME.replace("_", "-")
TEMPLATES = Path(__file__).with_name("hub")
SUFFIXES = ("py", "json")
BUILD = """[general]
name = "{name}"
version = {version}
edition = {edition}
license = "Apache-2.0"
backends = {backends}

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = {suffixes}
"""
OPS = '''"""Where this build's operators are."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's name in this build's namespace."""
    return f"{id}::{{op_name}}"
'''
# For versions of `kernels` that look for the package inside the variant.
COMPATIBLE = '''"""The package beside this directory."""

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location("{id}", _file)
if "{id}" not in sys.modules:
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
globals().update({{name: value for name, value in vars(sys.modules["{id}"]).items() if name != "__name__"}})
'''


def package_files(root: Path = ROOT) -> list[str]:
    """Of the package, relative to it."""
    names = (name.removeprefix(f"{NAME}/") for name in tracked(root) if name.startswith(f"{NAME}/"))
    return [name for name in names if name.rpartition(".")[2] in SUFFIXES]


def write(out: Path, repo_id: str, root: Path = ROOT) -> Path:
    """The repository, anew."""
    shutil.rmtree(out, ignore_errors=True)
    files = {name: (root / NAME / name).read_bytes() for name in package_files(root)}
    content = hashlib.sha256()
    for name, data in files.items():
        content.update(f"{name}\0{len(data)}\0".encode() + data)
    texts = {
        "build.toml": BUILD.format(
            name=KERNEL,
            version=VERSION,
            edition=EDITION,
            repo_id=repo_id,
            backends=json.dumps([*BACKENDS]),
            suffixes=json.dumps(SUFFIXES),
        ),
        "CARD.md": (TEMPLATES / "CARD.md").read_text().format(repo_id=repo_id),
        "flake.nix": (TEMPLATES / "flake.nix").read_text(),
        "LICENSE": (root / "LICENSE").read_text(),
        "benchmarks/benchmark_operators.py": (TEMPLATES / "benchmark_operators.py").read_text(),
        "tests/__init__.py": "",
        f"tests/test_{NAME}.py": (TEMPLATES / f"test_{NAME}.py").read_text(),
    }
    written = {name: text.encode() for name, text in texts.items()}
    written |= {f"torch-ext/{NAME}/{name}": data for name, data in files.items()}
    for backend, architectures in BACKENDS.items():
        identifier = f"_{NAME}_{backend}_{content.hexdigest()[:7]}"
        variant = {
            **files,
            "_ops.py": OPS.format(id=identifier).encode(),
            f"{NAME}/__init__.py": COMPATIBLE.format(id=identifier).encode(),
        }
        metadata = metadata_of(identifier, backend, architectures, variant)
        variant["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
        written |= {f"build/torch-{backend}/{name}": data for name, data in variant.items()}
    for name, data in written.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    return out


def metadata_of(
    identifier: str, backend: str, architectures: list[str] | None, files: dict[str, bytes]
) -> dict[str, object]:
    """What `kernels` reads of a variant before it loads it."""
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sorted(files.items())}
    return {
        "name": KERNEL,
        "id": identifier,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend, **({"archs": architectures} if architectures else {})},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/hub-kernel"))
    parser.add_argument("--repo-id", default=f"OWNER/{KERNEL}")
    options = parser.parse_args()
    out = write(options.out, options.repo_id)
    print(f"{out}: a kernel repository; `kernels benchmark {out.resolve()}` runs its operators")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
