"""Small files are written whole or not at all and read within bounds; links, pipes and kills change nothing of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from r2m.extras import need, requirement
from r2m.places import (
    PARTIAL,
    FileSystemWarning,
    beside,
    created,
    new_directory,
    new_file,
    read_beside,
    read_mapping,
    read_small,
)

from r2m_kernels.errors import BadCheckpoint, BadFile, BadOption


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_replaces_a_former_one_and_leaves_nothing_else() -> None:
    for content in (b"one", b"two"):
        new_file(Path("card"), content)
        assert Path("card").read_bytes() == content
    mask = os.umask(0)
    os.umask(mask)
    assert Path("card").stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.listdir() == ["card"]


def test_a_link_is_replaced_and_never_written_through() -> None:
    Path("theirs").write_text("years of work")
    Path("card").symlink_to("theirs")
    new_file(Path("card"), b"ours")
    assert Path("theirs").read_text() == "years of work"
    assert not Path("card").is_symlink()
    Path("link").symlink_to("theirs")
    with pytest.raises(OSError, match="symbolic links") as caught, created(Path("link")):
        pass
    assert caught.value.filename == "link"
    assert Path("theirs").read_text() == "years of work"


def test_what_is_there_stays_where_it_is_not_to_be_replaced() -> None:
    new_file(Path("recipe"), b"new", replace=False)
    Path("dangling").symlink_to("nowhere")
    for name in ("recipe", "dangling"):
        with pytest.raises(FileExistsError) as caught:
            new_file(Path(name), b"newer", replace=False)
        assert caught.value.filename == name
    assert Path("recipe").read_bytes() == b"new"
    assert sorted(os.listdir()) == ["dangling", "recipe"]


def test_an_error_names_the_file_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("card").write_text("former")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space") as caught:
            new_file(Path("card"), b"new")
    assert caught.value.filename == "card"
    assert Path("card").read_text() == "former"
    with pytest.raises(FileNotFoundError) as missing:
        new_file(Path("nowhere/card"), b"new")
    assert missing.value.filename == "nowhere/card"
    assert os.listdir() == ["card"]


def test_a_directory_is_there_as_a_whole_or_not_at_all() -> None:
    with pytest.raises(FileNotFoundError), new_directory(Path("a/page")) as partial:
        Path("nowhere").rename(partial / "index")
    assert os.listdir("a") == []
    with pytest.raises(OSError, match="No space") as caught, new_directory(Path("a/page")) as partial:
        raise OSError(28, "No space left on device", str(partial / "index"))
    assert caught.value.filename == "a/page/index"
    Path("a/page").mkdir()  # empty: in nobody's way
    with new_directory(Path("a/page")) as partial:
        (partial / "index").write_text("whole")
    assert os.listdir("a") == ["page"]
    with pytest.raises(OSError, match="not empty"), new_directory(Path("a/page")):
        pass
    assert Path("a/page/index").read_text() == "whole"


def test_a_kill_leaves_the_former_file_and_a_name_that_is_known_as_ours() -> None:
    Path("card").write_text("former")
    script = """
import os, signal
from pathlib import Path
from r2m.places import beside, write_file
with beside(Path("card")) as directory:
    write_file(directory / "file", b"new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert Path("card").read_text() == "former"
    (left,) = set(os.listdir()) - {"card"}
    assert PARTIAL.fullmatch(left)
    assert Path(left).stat().st_mode & 0o077 == 0  # nobody else puts a link there


def test_what_is_beside_goes_with_everything_in_it() -> None:
    with beside(Path("model.pth")) as directory:
        (directory / "more").mkdir()
        (directory / "more/tensors").touch()
    assert os.listdir() == []


def test_reading_has_bounds() -> None:
    Path("config.json").write_bytes(b"x" * 11)
    assert read_small(Path("config.json"), "what", 11) == b"x" * 11
    with pytest.raises(BadFile, match=r"^what: has 11 bytes, expected at most 10 bytes$"):
        read_small(Path("config.json"), "what", 10)
    with pytest.raises(BadCheckpoint, match="has 11 bytes"):
        read_small(Path("config.json"), "what", 10, error=BadCheckpoint)
    with open("huge", "wb") as file:
        file.truncate(2**40)  # sparse: it is not read to find out
    with pytest.raises(BadFile, match="has 1099511627776 bytes"):
        read_small(Path("huge"), "what")
    Path("link").symlink_to("config.json")  # as the Hub's cache has them
    assert len(read_small(Path("link"), "what")) == 11


@pytest.mark.timeout(10)
def test_a_pipe_or_device_is_not_waited_for() -> None:
    os.mkfifo("pipe")
    for path in (Path("pipe"), Path("/dev/zero"), Path()):
        with pytest.raises(BadFile, match=r"^what: not a regular file$"):
            read_small(path, "what")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "what: not valid JSON ("),
        (b"\xff{}", "what: not valid JSON ("),
        (b"[" * 100_000, "what: not valid JSON ("),
        (b"[]", "what: expected a JSON object, got list"),
        (b"null", "what: expected a JSON object, got NoneType"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "what: not valid JSON (nested more than 64 deep)"),
        (b'{"a": 1e999}', "what: not valid JSON (the number 1e999 is out of range)"),
        (b'{"a": -Infinity}', "what: not valid JSON (the number -Infinity is out of range)"),
        (b'{"a": 9223372036854775808}', "what: not valid JSON (the number 9223372036854775808 is out of range)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "what: not valid JSON (the number 99999999999999999999 is out of range)"),
        (b'{"a": {"b": 1, "b": 2}}', "what: holds 'b' twice"),
    ],
)
def test_a_mapping_is_read_or_refused_in_one_sentence(content: bytes, sentence: str) -> None:
    Path("f").write_bytes(content)
    with pytest.raises(BadFile) as caught:
        read_mapping(Path("f"), "what")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    Path("f").write_text('{"a": 1}')
    assert read_mapping(Path("f"), "what") == {"a": 1}


def test_a_link_that_leads_out_is_read_only_where_somebody_named_it() -> None:
    Path("secret").write_text('{"key": "secret"}')
    Path("model").mkdir()
    for name, target in (
        ("config.json", "../secret"),
        ("absolute", Path("secret").absolute()),
        ("again", "config.json"),
    ):
        path = Path("model", name)
        path.symlink_to(target)
        with pytest.raises(BadFile, match=r"^what: is a link that leads out of its directory$"):
            read_small(path, "what")
        assert b"secret" in read_small(path, "what", named=True)
        with pytest.warns(FileSystemWarning, match=r"is a link that leads out of its directory; nothing is taken"):
            assert read_beside(path) == {}
    cache = Path("models--a--b")
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/abc").mkdir(parents=True)
    (cache / "blobs/1").write_text('{"a": 1}')
    (cache / "snapshots/abc/config.json").symlink_to("../../blobs/1")
    assert read_beside(cache / "snapshots/abc/config.json") == {"a": 1}
    assert read_beside(Path("model/none")) == {}


def test_a_missing_package_is_named_with_how_to_get_it() -> None:
    need("report", "report", "json", "csv")
    with pytest.raises(BadOption, match=r"^report: needs the package no_such: pip install 'no_such'$"):
        need("report", "report", "json", "no_such")
    assert requirement("report", "scikit-learn").startswith("scikit-learn>=")
    assert requirement("report", "scikit") == requirement("nothing", "scikit") == "scikit"
    with pytest.raises(BadOption, match=r"^detector: needs the package no_such, which is not installed$"):
        need("detector", None, "no_such")
