"""macOS and Windows, as far as taking away what they lack shows it: the torch backend, the command, whole merges."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import forked
import pytest

from r2m_kernels import descriptors

if TYPE_CHECKING:
    from conftest import Checkpoints, Command

SYSTEMS = ["macos", "windows"]
SCRIPT = """
import sys
import other_systems
other_systems.become(sys.argv[1])
from r2m.commands.main import main
for words in " ".join(sys.argv[2:]).split(" , "):
    if main(words.split()) != 0:
        sys.exit(f"failed: {words}")
"""


def run(system: str, *commands: str) -> tuple[str, str]:
    """What commands print, one after another in one process of another system without compiled kernels."""
    environment = {**os.environ, "R2M_NATIVE": "off"}
    environment.pop("TRITON_INTERPRET")
    with forked.start([system, " , ".join(commands)], SCRIPT, environment) as child:
        out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return out, err


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_merge_has_the_same_bytes_without_what_linux_alone_has(
    system: str, checkpoints: Checkpoints, command: Command
) -> None:
    inputs = " ".join(checkpoints.arguments)
    expected = command("merge", *checkpoints.arguments, "--backend", "torch", "--out", "expected")
    assert expected.code == 0, expected.err
    out, err = run(
        system,
        "--help",
        f"inspect {' '.join(checkpoints.paths.values())}",
        f"merge {inputs} --out merged",
        f"merge {inputs} --out merged --overwrite",
        f"merge {inputs} --out second",
        f"merge {inputs} --out small --memory-budget 1KiB --max-shard-size 2KB",
        "remove merged --expert fs",
    )
    assert out.count("merge") > 2
    assert ("no locks here" in err) == (system == "windows")
    kept = Path("second/model.safetensors").read_bytes()
    assert kept == Path("expected/model.safetensors").read_bytes()
    assert len(list(Path("small").glob("model-*.safetensors"))) > 1
    backend = json.loads(Path("merged/r2m_report.json").read_text())["backend"]
    assert backend["name"] == "torch"
    assert not list(Path().glob("*.partial")) + list(Path().glob(".r2m-*"))


@pytest.mark.parametrize("missing", [(), ("preadv", "pwrite", "posix_fallocate")])
def test_places_in_a_file_are_read_and_written_by_several_threads(
    missing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.delattr(os, name)
    descriptor = os.open(tmp_path / "file", descriptors.flags("O_RDWR", "O_CREAT", "O_NO_SUCH_FLAG"), 0o600)
    found: dict[int, bytes] = {}

    def work(index: int) -> None:
        for _ in range(100):
            descriptors.write_at(descriptor, bytes([index]) * 100, 100 * index)
            view = bytearray(100)
            assert descriptors.read_at(descriptor, memoryview(view), 100 * index) == 100
            found[index] = bytes(view)

    try:
        descriptors.reserve(descriptor, 1000)
        assert os.fstat(descriptor).st_size == 1000
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {index: bytes([index]) * 100 for index in range(4)}
        assert descriptors.read_at(descriptor, memoryview(bytearray(9)), 1000) == 0
    finally:
        os.close(descriptor)
