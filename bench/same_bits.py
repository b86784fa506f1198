"""Whether another commit and this tree make the same bits: ``python -m bench.same_bits [COMMIT]``.

Both run the cases of :mod:`bench.outcomes` on this machine, in processes of their own: merged tensors, reports and
every file that a command writes. Set aside: versions, digests of sources, seconds. One line for each case that differs,
and exit code 1. Who changes bits on purpose lists the cases in EXPECTED with the reason, or moves the pin.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
CASES = Path(__file__).with_name("outcomes.py")
PINNED = "7c8fc0b"
# What is run, and what its environment has.
PARTS: dict[str, dict[str, str]] = {"python": {}, "command": {}, "triton": {"TRITON_INTERPRET": "1"}}
# Globs of cases that may differ from the pinned commit, and why.
EXPECTED: dict[str, str] = {}
# What differs between two runs of one tree, and digests of files that hold it.
ASIDE = {"seconds", "mtime_ns", "ctime_ns", "versions", "sources", "written", "digest", "schema_version"}
LIBRARY = "r2m_kernels/_native/libr2m_native.so"


def commit_of(name: str) -> str | None:
    """The whole hash of a commit; ``None`` where there is no such commit, or no history."""
    done = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", check=False)
    return done.stdout.decode().strip() or None if done.returncode == 0 else None


def unpack(commit: str, directory: Path) -> Path:
    """The tree of a commit with its native library: this tree's, where both are built from the same."""
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit).stdout)) as archive:
        archive.extractall(directory, filter="data")
    built_from_the_same = _git("diff", "--quiet", commit, "--", "csrc", "setup.py", check=False).returncode == 0
    if built_from_the_same and (ROOT / LIBRARY).is_file():
        shutil.copy(ROOT / LIBRARY, directory / LIBRARY)
    else:
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(build, cwd=directory, env={**os.environ, "R2M_NATIVE": "require"}, check=True)
    return directory


def outcomes(tree: Path, part: str) -> dict[str, Any]:
    """What a tree makes of the cases of a part."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("R2M_", "TRITON_"))}
    paths = os.pathsep.join([str(tree), str(tree / "python")])
    environment = {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **PARTS[part]}
    with tempfile.TemporaryDirectory(prefix="same_bits-") as directory:
        # The last part of its path is in model cards.
        site, result = Path(directory, "site"), Path(directory, "result.json")
        site.mkdir()
        command = [sys.executable, "-P", str(CASES), part, str(result)]
        done = subprocess.run(command, cwd=site, env=environment, text=True, stderr=subprocess.PIPE, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{part} in {tree}: {done.stderr.strip()}")
        content = json.loads(result.read_text())
    if Path(content["package"]) != tree:
        raise SystemExit(f"{part}: ran {content['package']} instead of {tree}")
    return {f"{part}: {name}": value for name, value in content["outcomes"].items()}


def outcomes_of(commit: str, part: str) -> dict[str, Any]:
    """The same of a commit, kept for the next time on this machine."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))]
    machine = (platform.node(), platform.python_version(), torch.__version__, sorted(set(cpu)))
    key = hashlib.sha256(repr((commit, CASES.read_bytes(), machine)).encode()).hexdigest()[:16]
    kept = ROOT / "build" / "same_bits" / f"{commit[:7]}-{part}-{key}.json"
    if not kept.is_file():
        with tempfile.TemporaryDirectory(prefix="same_bits-tree-") as directory:
            found = outcomes(unpack(commit, Path(directory).resolve()), part)
        kept.parent.mkdir(parents=True, exist_ok=True)
        whole = kept.with_suffix(f".{os.getpid()}")
        whole.write_text(json.dumps(found))
        whole.rename(kept)
    return dict(json.loads(kept.read_text()))


def difference(before: Any, now: Any, where: str = "") -> str:
    """The first place in which two outcomes differ, with both values; empty where none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            if key in ASIDE:
                continue
            if key not in before or key not in now:
                return f"{where} {key}: {'gone' if key in before else 'new'}".strip()
            found = difference(before[key], now[key], f"{where} {key}".strip())
            if found:
                return found
        return ""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return next((found for i, pair in pairs if (found := difference(*pair, f"{where}[{i}]"))), "")
    if json.dumps(before) == json.dumps(now):
        return ""
    if isinstance(before, str) and isinstance(now, str) and "\n" in before:
        lines = [line for line in now.splitlines() if line not in before.splitlines()]
        before, now = "…", lines[0] if lines else "…"
    return f"{where}: {before!r} became {now!r}"


def compare(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines of cases that differ, and of those that may; one that fails is never right."""
    wrong, expected = [], []
    for name in dict.fromkeys((*before, *now)):
        found = difference(before.get(name), now.get(name))
        reason = next((why for glob, why in EXPECTED.items() if fnmatch.fnmatchcase(name, glob)), None)
        failed = (now.get(name) or {}).get("error")
        if found and reason and not failed:
            expected.append(f"{name}: {found} (expected: {reason})")
        elif found or failed:
            wrong.append(f"{name}: {found or failed}")
    return wrong, expected


def main() -> int:
    """Run both sides and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", nargs="?", default=PINNED, help=f"to compare with; default: {PINNED}")
    parser.add_argument("--part", choices=PARTS, action="append", help="of the cases; repeat for more; default: all")
    options = parser.parse_args()
    name, parts = options.commit, options.part or list(PARTS)
    commit = commit_of(name)
    if commit is None:
        print(f"skipped: no commit {name} here")
        return 0
    before = {case: one for part in parts for case, one in outcomes_of(commit, part).items()}
    now = {case: one for part in parts for case, one in outcomes(ROOT, part).items()}
    wrong, expected = compare(before, now)
    for line in (*expected, *wrong):
        print(line)
    if wrong:
        print(f"{len(wrong)} of {len(now)} cases differ from {name}")
        return 1
    allowed = f", but for {len(expected)} that may differ" if expected else ""
    print(f"the same bits as {name} in all {len(now)} cases{allowed}")
    return 0


def _git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=check)
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 127, b"", b"")


if __name__ == "__main__":
    sys.exit(main())
