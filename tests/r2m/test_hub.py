"""``hf://`` checkpoints, from a server that speaks as the Hugging Face Hub does: downloads by the real library."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from forked import Child
from r2m.checkpoints import hub
from safetensors.torch import load_file, save_file

from r2m_kernels import InvalidInput

if TYPE_CHECKING:
    from conftest import Checkpoints

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Start = Callable[..., Child]


class Hub(BaseHTTPRequestHandler):
    """Repositories are directories below ``root``: OWNER/NAME/FILES."""

    root: Path
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(f"{self.command} {path}")
        words = path.split("/")
        if words[:2] == ["api", "models"]:
            self.describe("/".join(words[2:4]), words[-1] if "revision" in words else "main", words, body)
        elif words[2:3] == ["resolve"]:
            self.give("/".join(words[:2]), words[3], "/".join(words[4:]), body)
        else:
            self.refuse("RepoNotFound", body)

    def describe(self, repository: str, revision: str, words: list[str], body: bool) -> None:
        directory = self.root / repository
        if not directory.is_dir():
            return self.refuse("RepoNotFound", body)
        if "tree" in words:
            files = [p for p in sorted(directory.rglob("*")) if p.is_file()]
            entries = [
                {"type": "file", "path": str(p.relative_to(directory)), "size": p.stat().st_size, "oid": "0" * 40}
                for p in files
            ]
            return self.send(json.dumps(entries).encode(), body)
        if revision not in ("main", COMMIT):
            return self.refuse("RevisionNotFound", body)
        names = [str(p.relative_to(directory)) for p in sorted(directory.rglob("*")) if p.is_file()]
        info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        return self.send(json.dumps(info).encode(), body)

    def give(self, repository: str, revision: str, name: str, body: bool) -> None:
        path = self.root / repository / name
        if not path.is_file():
            return self.refuse("EntryNotFound" if path.parent.is_dir() else "RepoNotFound", body)
        return self.send(path.read_bytes(), body)

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, code: str, body: bool) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The environment in which ``hf://`` leads here, and what was asked for."""
    root = tmp_path / "hub"
    root.mkdir()
    handler = type("Here", (Hub,), {"root": root, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{running.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        yield environment, handler.asked
        running.shutdown()
        thread.join()


def publish(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """A base with shards, one expert as .pth in a folder, one as a file; and what nobody asks for."""
    base, expert = tmp_path / "hub" / "lab" / "clip", tmp_path / "hub" / "lab" / "experts"
    for directory in (base, expert / "fs"):
        directory.mkdir(parents=True)
    names = list(checkpoints.base)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: checkpoints.base[name] for name in held}, base / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text('{"model_type": "clip"}')
    (base / "tf_model.h5").write_bytes(b"x" * 1000)
    torch.save(checkpoints.experts["fs"], expert / "fs" / "clip.pth")
    save_file(checkpoints.experts["fr"], expert / "model.safetensors")
    adapter = tmp_path / "hub" / "lab" / "lora"
    adapter.mkdir()
    factors = {"A": torch.ones(2, 17), "B": torch.ones(24, 2)}
    names = {f"base_model.model.block.lora_{side}.weight": factor for side, factor in factors.items()}
    save_file(names, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1}')
    (adapter / "training_args.bin").write_bytes(b"x" * 1000)


REFERENCES = (
    "--base",
    "hf://lab/clip",
    "--expert",
    "fs=hf://lab/experts/fs/clip.pth",
    "--expert",
    "fr=hf://lab/experts@main",
    "--expert",
    "lora=hf://lab/lora",
)


def ended(process: Child) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_merge_from_the_hub(
    checkpoints: Checkpoints, server: tuple[dict[str, str], list[str]], start: Start, tmp_path: Path
) -> None:
    environment, asked = server
    publish(tmp_path, checkpoints)
    code, _, err = ended(start("merge", *REFERENCES, "--out", "merged", environment=environment))
    assert code == 0, err
    local = ("--base", "base.safetensors", "--expert", "fs=fs.safetensors", "--expert", "fr=fr.safetensors")
    assert ended(start("merge", *local, "--expert", "lora=hub/lab/lora", "--out", "local"))[0] == 0
    merged, expected = load_file("merged/model.safetensors"), load_file("local/model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert json.loads(Path("merged/config.json").read_text()) == {"model_type": "clip"}
    assert not any("tf_model" in one or "training_args" in one for one in asked)
    # The recipe holds the commit, and repeats the merge without the network.
    recipe = yaml.safe_load(Path("merged/r2m_config.yaml").read_text())
    assert recipe["base_model"] == f"hf://lab/clip@{COMMIT}"
    assert recipe["models"][0]["model"] == f"hf://lab/experts@{COMMIT}/fs/clip.pth"
    assert recipe["models"][2]["model"] == f"hf://lab/lora@{COMMIT}"
    asked.clear()
    again = ended(start("merge", "merged/r2m_config.yaml", "--out", "again", "--offline", environment=environment))
    assert again[0] == 0, again[2]
    assert asked == []
    assert Path("again/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("hf://lab/missing", "hf://lab/missing: no such repository, or a private one (hf auth login)"),
        ("hf://lab/clip@v9", "hf://lab/clip@v9: no revision 'v9'"),
        ("hf://lab/experts/fs/other.pth", "hf://lab/experts/fs/other.pth: no file 'fs/other.pth' in the repository"),
        ("hf://lab/two", "hf://lab/two: holds 2 *.safetensors files (a.safetensors, b.safetensors) and no"),
        ("hf://lab", "'hf://lab': expected hf://owner/name, hf://owner/name@revision or …/file"),
    ],
)
def test_what_is_not_there_is_told(
    reference: str,
    sentence: str,
    checkpoints: Checkpoints,
    server: tuple[dict[str, str], list[str]],
    start: Start,
    tmp_path: Path,
) -> None:
    publish(tmp_path, checkpoints)
    two = tmp_path / "hub" / "lab" / "two"
    two.mkdir()
    for name in ("a", "b"):
        save_file(checkpoints.base, two / f"{name}.safetensors")
    code, _, err = ended(start("inspect", reference, environment=server[0]))
    assert code == 2
    assert err.startswith(f"Error: {sentence}"), err


def test_offline_and_not_in_the_cache(server: tuple[dict[str, str], list[str]], start: Start) -> None:
    environment, asked = server
    code, _, err = ended(start("inspect", "hf://lab/clip", "--offline", environment=environment))
    assert (code, err) == (2, "Error: hf://lab/clip: not in the cache, and --offline forbids to fetch it\n")
    assert asked == []


def test_no_network(start: Start, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    code, _, err = ended(start("inspect", "hf://lab/clip", environment=environment))
    assert code == 1
    assert err == "Error: hf://lab/clip: the hub cannot be reached\n"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'huggingface_hub>="):
        hub.fetch.__wrapped__("hf://lab/clip")
