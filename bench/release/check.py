"""Can this commit be released? Version, changelog, citation, tag and what `make wheel` made, held against each other.

    python -m bench.release.check [--wheels dist]

Prints what is wrong, a line each, and exits with 1; or what is left to be done.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import yaml

from bench.release.wheels import POLICY, ROOT, SUMS, ReleaseError, run

NAME = "r2m_kernels"
GENERATED = {"PKG-INFO", "setup.cfg"}  # what setuptools puts into a source archive


def version(root: Path = ROOT) -> str:
    """That of the sources."""
    found = re.search(r'"(.+)"', (root / NAME / "_version.py").read_text())
    return found[1] if found else ""


def of_texts(root: Path = ROOT) -> Iterator[str]:
    """What is wrong with version, changelog and citation."""
    wanted = version(root)
    if not re.fullmatch(r"\d+\.\d+\.\d+", wanted):
        yield f"version: expected MAJOR.MINOR.PATCH, got '{wanted}'"
    heading = next((line for line in (root / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")), "")
    dated = re.fullmatch(r"## (\S+) \((\d{4}-\d\d-\d\d)\)", heading)
    if not dated or dated[1] != wanted:
        yield f"CHANGELOG.md: expected its first section to be '## {wanted} (YYYY-MM-DD)', got '{heading}'"
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    if str(citation["version"]) != wanted:
        yield f"CITATION.cff: expected version {wanted}, got {citation['version']}"
    if dated and str(citation["date-released"]) != dated[2]:
        yield f"CITATION.cff: expected date-released {dated[2]} as in the changelog, got {citation['date-released']}"


def of_repository(root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the working tree and the tag."""
    changed = run(["git", "status", "--porcelain"], root).splitlines()
    if changed:
        yield f"working tree: {len(changed)} files are not committed, such as {changed[0][3:]}"
    tag = f"v{version(root)}"
    if tagged(root) and run(["git", "rev-list", "-n", "1", tag], root) != run(["git", "rev-parse", "HEAD"], root):
        yield f"tag {tag}: is on another commit; a version is released once"


def tagged(root: Path = ROOT) -> bool:
    """Whether there is a tag of this version."""
    return bool(run(["git", "tag", "--list", f"v{version(root)}"], root).strip())


def of_files(wheels: Path, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the source archive and the wheels."""
    release = f"{NAME}-{version(root)}"
    platforms = ("any", f"{POLICY}_x86_64", f"{POLICY}_aarch64")
    expected = [f"{release}.tar.gz", *(f"{release}-py3-none-{one}.whl" for one in platforms)]
    lines = (wheels / SUMS).read_text().splitlines() if (wheels / SUMS).exists() else []
    sums = dict(reversed(line.split("  ")) for line in lines)
    for name in expected:
        if not (wheels / name).exists():
            yield f"{wheels}: lacks {name}; `make wheel` builds it"
            return
        if sums.get(name) != hashlib.sha256((wheels / name).read_bytes()).hexdigest():
            yield f"{wheels}/{name}: is not the file that {SUMS} speaks of"
    if sums.keys() != set(expected):
        yield f"{wheels}/{SUMS}: expected {', '.join(expected)}, got {', '.join(sums)}"
    committed = set(run(["git", "ls-files"], root).splitlines())
    with tarfile.open(wheels / expected[0]) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            if not member.isfile() or name in GENERATED or ".egg-info" in name:
                continue
            content = archive.extractfile(member)
            if name not in committed or content is None or content.read() != (root / name).read_bytes():
                yield f"{wheels}/{expected[0]}: {name} is not this commit's; `make wheel` builds it anew"
                return
    contents = []
    for name in expected[1:]:
        with zipfile.ZipFile(wheels / name) as wheel:
            described = Parser().parsestr(wheel.read(f"{release}.dist-info/METADATA").decode())
            if described["Version"] != version(root):
                yield f"{wheels}/{name}: says version {described['Version']}"
            libraries = {one for one in wheel.namelist() if one.endswith(".so")}
            if bool(libraries) == name.endswith("any.whl"):
                yield f"{wheels}/{name}: has {sorted(libraries) or 'no library'}"
            of_package = {
                one for one in wheel.namelist() if not one.endswith("/") and ".dist-info/" not in one
            } - libraries
            contents.append({one: wheel.read(one) for one in of_package})
    if any(one != contents[0] for one in contents):
        yield f"{wheels}: the wheels have different sources"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=Path("dist"))
    options = parser.parse_args()
    try:
        wrong = [*of_texts(), *of_repository(), *of_files(options.wheels)]
        done = not wrong and tagged()
    except ReleaseError as error:
        wrong = [str(error)]
    for one in wrong:
        print(f"Error: {one}", file=sys.stderr)
    if wrong:
        return 1
    tag = f"v{version()}"
    print(f"{NAME} {version()} can be released." + (f" It is tagged {tag}." if done else " What is left:"))
    if not done:
        print(f"  git tag --annotate {tag} --message '{NAME} {version()}'")
    print(f"  and {options.wheels}/*.whl with the .tar.gz to an index; {SUMS} has their digests.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
