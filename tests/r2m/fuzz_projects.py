"""Attacks on whoever works with a stranger's project: ``python fuzz_projects.py COUNT SEED``.

The JSON, YAML and CSV files of a merge's output, of an evaluation and beside checkpoints get values of other kinds,
other keys and fewer, and seals that fit what stands there then; and a command that reads them is run. Ends with 0 where
each was done or refused within SECONDS by lines that nothing in the file can tear up, and prints how many there were.
Works in the current directory.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from r2m.commands.main import main as r2m
from safetensors.torch import save_file

SECONDS, BYTES = 10, 2**31
MOST_LINES = 16
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 1e308, 2**31, 2**62, "", "\0", "a\0b", "x" * 300, "\x1b[31m\n", "\u202e", "../../x"),
    *("/etc/passwd", "https://x", "hf://a/b", "hf://", "nan", "real", [], {}, [[]], [None], ["a"], [1, 2], {"a": {}}),
]
KEYS = ["", "\x1b[31m", "x" * 100, "a\0b", "a|b`<b>"]
CARD = {"license": "mit", "datasets": ["a"], "base_model": "x"}
MERGE = ["merge", "--quiet", "--base", "base", "--expert", "a=a"]
ADD, REMOVE = ["add", "o", "--expert", "c=a", "--quiet"], ["remove", "o", "--expert", "b", "--quiet"]
RELINK, SWEEP = ["relink", "o", "base=base"], ["sweep", "o", "--to", "swept", "--eta", "0.5,1", "--quiet"]
BESIDE = [[*MERGE, "--expert", "o2", "--out", "new"], ["inspect", "o2", "a"]]
# What is attacked, and what reads it.
FILES: dict[str, list[list[str]]] = {
    "o/r2m_report.json": [["card", "o"], ADD, REMOVE, RELINK, SWEEP, [*MERGE, "--expert", "o", "--out", "new"]],
    "o/r2m_state.json": [ADD, REMOVE, RELINK, SWEEP],
    "o/r2m_config.yaml": [["card", "o"], ADD, REMOVE, RELINK, ["merge", "o/r2m_config.yaml", "--out", "new"]],
    "evaluation/evaluation.json": [["card", "o", "--evaluation", "evaluation"]],
    "o2/config.json": [*BESIDE, ["merge", "--quiet", "--base", "o2", "--expert", "a", "--out", "new"]],
    "o2/preprocessor_config.json": BESIDE,
    "o2/README.md": BESIDE,
    "scores.csv": [["evaluate", "--scores", "scores.csv", "--bootstrap", "5", "--quiet"]],
}


def prepare() -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        Path(name).mkdir()
        tensors = {"w": torch.randn(6, 8, generator=generator), "head.weight": torch.randn(2, 6, generator=generator)}
        save_file(tensors, f"{name}/model.safetensors")
        Path(name, "config.json").write_text(json.dumps({"model_type": "vit", "id2label": {"0": "real", "1": "fake"}}))
        means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        Path(name, "preprocessor_config.json").write_text(json.dumps({"size": {"height": 24, "width": 24}, **means}))
        Path(name, "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n")
    code, text = said([*MERGE, "--expert", "b=b", "--out", "good"], seconds=0)
    assert code == 0, text
    rows = (f"p{i},{i % 2},0.{i},v{i},d\n" for i in range(1, 9))
    Path("good.csv").write_text("path,label,probability,video,dataset\n" + "".join(rows))
    options = ["--bootstrap", "5", "--quiet", "--out", "measured"]
    code, text = said(["evaluate", "--scores", "good=good.csv", *options], seconds=0)
    assert code == 0, text
    text = Path("measured/evaluation.json").read_text()
    Path("measured/evaluation.json").write_text(text.replace('"../good.csv"', '"../o"'))


def fresh() -> None:
    for name in ("o", "o2", "evaluation", "swept", "new", "o.partial", "new.partial"):
        shutil.rmtree(name, ignore_errors=True)
    for source, target in (("good", "o"), ("b", "o2"), ("measured", "evaluation")):
        shutil.copytree(source, target)
    shutil.copy("good.csv", "scores.csv")


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*place, key))


def mutated(content: Any, chance: random.Random) -> Any:
    content = copy.deepcopy(content)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        *above, last = chance.choice([place for place in places(content) if place] or [(None,)])
        if last is None:
            return chance.choice(VALUES)
        inner = content
        for key in above:
            inner = inner[key]
        what = chance.random()
        if what < 0.15:
            del inner[last]
        elif what < 0.25 and isinstance(inner, dict):
            inner[chance.choice(KEYS)] = inner.pop(last)
        else:
            inner[last] = copy.deepcopy(chance.choice(VALUES))
    return content


def torn(content: bytes, chance: random.Random) -> bytes:
    edited = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(edited) + 1)
        edited[at : at + chance.choice([0, 1, 2, 8])] = chance.randbytes(chance.randint(0, 6))
    return bytes(edited)


def sealed(content: Any) -> Any:
    if not isinstance(content, dict) or "digest" not in content:
        return content
    rest = {key: value for key, value in content.items() if key != "digest"}
    return {**rest, "digest": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def attacked(path: Path, chance: random.Random) -> bytes:
    content, suffix = path.read_bytes(), path.suffix
    if suffix == ".csv" or chance.random() < 0.2:
        return torn(content, chance)
    if suffix == ".md":
        return f"---\n{yaml.safe_dump(mutated(CARD, chance))}---\n".encode()
    if suffix == ".yaml":
        return yaml.safe_dump(mutated(yaml.safe_load(content), chance)).encode()
    return json.dumps(sealed(mutated(json.loads(content), chance))).encode()


class TooSlow(BaseException):
    """Not an error that a command would tell in a sentence."""


def said(command: list[str], seconds: int = SECONDS) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        signal.alarm(seconds)
        code = r2m(command)
        signal.alarm(0)
    return code, text.getvalue()


def too_slow(*_: object) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def main(count: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_slow)
    prepare()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    chance = random.Random(seed)
    for number in range(count):
        fresh()
        name = list(FILES)[number % len(FILES)]
        command, path = chance.choice(FILES[name]), Path(name)
        path.write_bytes(attacked(path, chance))
        try:
            code, text = said(command)
        except BaseException:
            print(command, path.read_bytes()[:2000], file=sys.stderr)
            raise
        clean = all(letter.isprintable() for line in text.split("\n") for letter in line)
        assert code in (0, 1, 2), (command, text)
        assert clean, (command, text)
        assert len(text.splitlines()) <= MOST_LINES, (command, text)
    print(count)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
