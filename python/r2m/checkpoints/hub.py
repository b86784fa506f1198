"""Checkpoints on the Hugging Face Hub: ``hf://owner/name[@revision][/file]`` to a path in the local cache.

``huggingface_hub`` does it and is optional. Of a repository no more is fetched than ``r2m`` would read in a directory.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from r2m.checkpoints import layout
from r2m.checkpoints.adapter_config import CONFIG
from r2m.checkpoints.formats import INDEXES
from r2m.extras import need
from r2m.places import read_small
from r2m.workplace import settle
from r2m_kernels.errors import BadCheckpoint, BadOption, quoted

SCHEME = "hf://"
_REFERENCE = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@\s]+(/pr/\d+)?))?(/(?P<file>[^@\s]+))?", re.ASCII
)
# Whose errors are the network's: the library has used one after the other.
_NETWORK = ("requests", "httpx", "httpx2")
# Beside the weights.
SMALL_FILES = ("config.json", "preprocessor_config.json", "README.md", CONFIG)


@dataclass(frozen=True)
class Fetched:
    """What is in the cache now.

    Attributes:
        path: the file, or the directory with the files.
        pinned: the same reference with the commit it stands for today.
    """

    path: Path
    pinned: str


def is_reference(path: str | Path) -> bool:
    """Whether a path is meant for the Hub."""
    return str(path).startswith(SCHEME)


def local(path: str | Path) -> Path:
    """Where a checkpoint lies on this machine; errors are :func:`fetch`'s and :func:`r2m.workplace.settle`'s."""
    if is_reference(path):
        return fetch(str(path)).path
    settle(Path(path))
    return Path(path)


def work_offline() -> None:
    """From now on, only what is in the cache; before the library is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


@functools.cache
def fetch(reference: str) -> Fetched:
    """Bring a checkpoint into the cache, or find it there.

    Raises:
        InvalidInput: no such repository, revision or file; several files and none named; not in the cache while
            offline; the library is missing.
        OSError: the network or the disk.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise BadOption(f"{quoted(reference)}: expected hf://owner/name, hf://owner/name@revision or …/file")
    need(reference, "hub", "huggingface_hub")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before its import
    from huggingface_hub import errors

    repository, revision, file = match["repository"], match["revision"], match["file"]
    try:
        path = _fetched(reference, repository, revision, file)
    except errors.GatedRepoError:
        raise BadCheckpoint(
            f"{reference}: its owner has to grant access, and you have to log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadCheckpoint(f"{reference}: no such repository, or a private one (hf auth login)") from None
    except errors.RevisionNotFoundError:
        raise BadCheckpoint(f"{reference}: no revision {quoted(revision or 'main')}") from None
    except errors.LocalEntryNotFoundError:
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            raise BadCheckpoint(f"{reference}: not in the cache, and --offline forbids to fetch it") from None
        raise _unreachable(reference) from None
    except errors.EntryNotFoundError:
        raise BadCheckpoint(f"{reference}: no file {quoted(file or '')} in the repository") from None
    except errors.HFValidationError as error:
        raise BadCheckpoint(f"{reference}: {error}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _NETWORK:
            raise _unreachable(reference) from error
        raise
    snapshot = path if file is None else path.parents[file.count("/")]
    pinned = f"{SCHEME}{repository}@{snapshot.name}" + (f"/{file}" if file else "")
    return Fetched(path, pinned)


def _unreachable(reference: str) -> OSError:
    return OSError(errno.ENETUNREACH, "the Hub cannot be reached", reference)


def _cached(reference: str, repository: str, revision: str) -> Path:
    """The newest snapshot of a revision in the cache. It may be part of one: who reads it finds out."""
    from huggingface_hub import constants

    directory = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    pointer = directory / "refs" / revision
    commit = read_small(pointer, reference).decode(errors="replace").strip() if pointer.is_file() else revision
    snapshot = directory / "snapshots" / commit
    if not snapshot.is_dir():
        raise BadCheckpoint(f"{reference}: not in the cache, and --offline forbids to fetch it")
    return snapshot


def _fetched(reference: str, repository: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    if file is not None:
        return Path(hf_hub_download(repository, file, revision=revision))
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return _cached(reference, repository, revision or "main")
    api = HfApi()
    info = api.model_info(repository, revision=revision)
    names = sorted(one.rfilename for one in info.siblings or () if "/" not in one.rfilename)
    weights = layout.chosen(names, reference, adapters=True)
    files = [weights, *(name for name in SMALL_FILES if name in names)]
    if weights in INDEXES:
        index = hf_hub_download(repository, weights, revision=info.sha)
        files += set(layout.decode_index(reference, read_small(Path(index), reference, layout.MOST_INDEX)).values())
    return Path(snapshot_download(repository, revision=info.sha, allow_patterns=files))
