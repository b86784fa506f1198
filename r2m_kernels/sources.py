"""Which code makes a merge's bits, as one number: two versions' bits never get into one output."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache  # what is loaded stays, whatever becomes of the files meanwhile
def sources_digest(backend: str, *applications: Path) -> str:
    """A digest of all Python and JSON files of this package and of ``applications``, and of the native library.

    All files, since a list of those that make bits would once forget one. Installed packages never change, and who
    works on the sources loses a journal at most. The library itself is digested and not ``csrc``, which a wheel has
    not: another compiler makes other bits of the same sources. Files count by their place in the package: it is the
    same digest wherever that is installed.

    Args:
        backend: the name of the one that computes; only ``"native"`` uses the library.
        applications: directories of packages that prepare what is merged.

    Returns:
        16 hexadecimal digits of a SHA-256.

    Raises:
        BackendUnavailable: the native backend has no library here.
        OSError: a file cannot be read.
    """
    files = {
        path.relative_to(package.parent).as_posix(): path
        for package in (Path(__file__).parent, *applications)
        for pattern in ("*.py", "*.json")
        for path in package.rglob(pattern)
    }
    if backend == "native":
        from ._native import library

        files["native library"] = library.load().path
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]
