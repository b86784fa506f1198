"""The digest of the code: every file counts, and where a package lies does not."""

from __future__ import annotations

import shutil

import pytest

from r2m_kernels import _version
from r2m_kernels._native import library
from r2m_kernels.sources import sources_digest

digest = sources_digest.__wrapped__  # the digest itself, without what is remembered of it


@pytest.fixture
def package(tmp_path):
    """A small one."""
    (tmp_path / "tool" / "part").mkdir(parents=True)
    (tmp_path / "tool" / "__init__.py").write_text("")
    (tmp_path / "tool" / "part" / "sizes.json").write_text("{}")
    return tmp_path / "tool"


def test_every_file_counts(package):
    seen = [digest("torch"), digest("torch", package)]
    (package / "part" / "sizes.json").write_text("{ }")
    seen.append(digest("torch", package))
    (package / "part" / "new.py").write_text("")
    seen.append(digest("torch", package))
    (package / "part" / "new.py").rename(package / "part" / "renamed.py")
    seen.append(digest("torch", package))
    assert len(set(seen)) == len(seen)
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in seen)


def test_caches_and_the_place_do_not_count(package, tmp_path):
    before = digest("torch", package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"x")
    elsewhere = tmp_path / "elsewhere" / "tool"
    shutil.copytree(package, elsewhere)
    assert digest("torch", package) == digest("torch", elsewhere) == before


def test_the_native_library_counts_where_it_computes(monkeypatch, tmp_path):
    copy = tmp_path / "library.so"
    copy.write_bytes(library.load().path.read_bytes())
    before = digest("native")
    monkeypatch.setenv("R2M_NATIVE_LIBRARY", str(copy))
    assert digest("native") == before
    with copy.open("ab") as file:
        file.write(b"\0")
    assert digest("native") != before
    assert digest("torch") != before


def test_a_process_keeps_the_digest_of_what_it_has_loaded(package):
    before = sources_digest("torch", package)
    (package / "__init__.py").write_text("changed = True")
    assert sources_digest("torch", package) == before != digest("torch", package)


def test_this_packages_own_files_are_in_it(monkeypatch, tmp_path):
    copied = tmp_path / "r2m_kernels"
    shutil.copytree(_version.__file__.rpartition("/")[0], copied, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    before = digest("torch")
    monkeypatch.setattr("r2m_kernels.sources.__file__", str(copied / "sources.py"))
    assert digest("torch") == before
    with (copied / "_triton" / "launch.json").open("a") as file:
        file.write("\n")
    assert digest("torch") != before
