"""Are the wheels what somebody gets who installs them? Each is tried in an empty environment.

    python -m bench.release.installed [--wheels dist] [--python 3.11] [--torch 2.10.0 newest] [--demo] [--arm ROOT]

For every Python and torch: an environment of its own, the wheel that pip chooses, `import`, a merge by function and by
command, an operator's derivative, with ``--demo`` `r2m demo --quick`. ``--arm`` names a directory that
`bench/release/arm.sh` has made, with Python and torch for aarch64: the kernels' own tests run there under qemu-user.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.release.check import NAME, version
from bench.release.wheels import ROOT, ReleaseError, run

TRIED = """
import json, sys, time
import torch
start = time.perf_counter()
import r2m_kernels
imported = time.perf_counter() - start
from r2m_kernels import analyze, merge
from r2m.commands.main import main
from safetensors.torch import load_file, save_file
base = {"w": torch.zeros(30, 40), "b": torch.zeros(30)}
expert = {name: tensor + 1 for name, tensor in base.items()}
merged = merge(base, {"fs": expert})
assert torch.allclose(merged["w"], torch.ones(30, 40)), merged
core = torch.ones(1, requires_grad=True)
r2m_kernels.ops.combine(base["w"], [expert["w"]], core).sum().backward()
assert core.grad.item() == 1200, core.grad
save_file(base, "base.safetensors")
save_file(expert, "fs.safetensors")
assert main(["merge", "--base", "base.safetensors", "--expert", "fs=fs.safetensors", "--out", "merged"]) == 0
assert torch.equal(load_file("merged/model.safetensors")["w"], merged["w"])
backend = analyze(base, [expert]).report()["backend"]
print("FOUND", json.dumps({
    "python": sys.version.split()[0], "torch": torch.__version__, "import_ms": round(1000 * imported, 1),
    "backend": backend["name"], "why": backend["reason"], "file": r2m_kernels.__file__,
}))
"""


def tried(python: str | Path, place: Path, site: str | Path = "") -> dict[str, Any]:
    """What an installation, in ``site`` where it is not Python's own, says of itself after a merge elsewhere."""
    place.mkdir()
    clean = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    printed = run([python, "-c", TRIED], place, clean)
    found: dict[str, Any] = json.loads(printed.partition("FOUND ")[2])
    if str(ROOT) in found["file"]:
        raise ReleaseError(f"the package was imported from {found['file']}, expected the installed one")
    return found


def try_environment(wheels: Path, python: str, torch: str, demo: bool) -> dict[str, Any]:
    """One Python and torch, from nothing."""
    interpreter = shutil.which(f"python{python}")
    if interpreter is None:
        raise ReleaseError(f"there is no python{python} here")
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        run([interpreter, "-m", "venv", place / "environment"], place)
        inside = place / "environment" / "bin"
        name = f"{NAME}{'[demo]' if demo else ''}=={version()}"
        wanted = "torch" if torch == "newest" else f"torch=={torch}"
        start = time.perf_counter()
        pip = [inside / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
        run([*pip, "--find-links", wheels.resolve(), wanted, name], place, {"PIP_CACHE_DIR": str(place / "cache")})
        installed = time.perf_counter() - start
        found = tried(inside / "python", place / "tried")
        if demo:
            start = time.perf_counter()
            shown = run([inside / "r2m", "demo", "--quick", "--out", place / "demo"], place, {"PYTHONPATH": ""})
            if "R2M" not in shown:
                raise ReleaseError(f"r2m demo --quick: expected a table with R2M, got {shown[-500:]}")
            found["demo_s"] = round(time.perf_counter() - start)
        return {**found, "install_s": round(installed)}


def try_arm(wheels: Path, root: Path) -> str:
    """The kernels' tests with those of the aarch64 wheel, under qemu-user; pytest's last line."""
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        raise ReleaseError("there is no qemu-aarch64 here; Debian has it in qemu-user")
    (wheel,) = wheels.glob("*aarch64.whl")
    with tempfile.TemporaryDirectory() as site:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
        run([*pip, "--platform", "manylinux_2_28_aarch64", "--only-binary", ":all:", wheel], ROOT)
        paths = os.pathsep.join([site, str(root / "site")])
        variables = [f"PYTHONPATH={paths}", "OMP_NUM_THREADS=1", "R2M_NATIVE=require"]
        python = [
            emulator,
            "-L",
            root,
            *(word for one in variables for word in ("-E", one)),
            root / "usr/bin/python3.11",
        ]
        pytest = ["-m", "pytest", "-q", "--noconftest", "-c", os.devnull, "--rootdir", ROOT, "-p", "no:cacheprovider"]
        imports = ["--import-mode=importlib", "-o", f"pythonpath={ROOT}/tests/kernels {ROOT}/tests/support"]
        tests = [ROOT / "tests/kernels/test_native.py", "-k", "neon or same_bits or torch_backends or auto_takes"]
        return run([*python, *pytest, *imports, *tests], Path(site)).splitlines()[-1]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=Path("dist"))
    parser.add_argument("--python", nargs="+", default=["3.11"])
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "newest"])
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--arm", type=Path)
    options = parser.parse_args()
    try:
        for python in options.python:
            for torch in options.torch:
                print(json.dumps(try_environment(options.wheels, python, torch, options.demo)), flush=True)
        if options.arm:
            print(f"aarch64: {try_arm(options.wheels, options.arm.resolve())}")
    except ReleaseError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
