"""Attacks on whoever opens a stranger's checkpoint, made by hypothesis: ``python fuzz_inputs.py KIND COUNT SEED``.

A program of its own, so that a crash is a result, too, and so that memory can be limited. Ends with 0 where each of
COUNT inputs was read, or refused by one sentence that nothing in the file can tear up. Works in the current directory.

* ``safetensors``: a whole file with bytes replaced, cut out or put in; headers that announce other lengths, types,
  shapes and offsets than there are, beyond 64 bits, twice, or that are no headers.
* ``index``: the same of a sharded checkpoint's index; shards that lead out of the directory, by path or by link;
  brackets nested 20,000 deep.
* ``torch``: archives patched or cut, entries compressed; pickles patched, nested 5,000 deep, that call a program, write
  a file, or make a terabyte out of a number.

Each may take SECONDS and, beyond what the process has, BYTES of memory, and none may leave MARK behind: the file that a
pickle creates when its code is run. Hostile files of one kind each, by name, are in ``test_torch_files.py`` and
``test_reader.py``; what lies beside a checkpoint is attacked in ``test_places.py`` and ``test_card.py``.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import signal
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from r2m.checkpoints.reader import open_checkpoint
from safetensors.torch import save

from r2m_kernels import InvalidInput

SECONDS, BYTES = 5, 2**30
MARK = Path("code-was-run")

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
SAFETENSORS = save(TENSORS)


def archive(state: Any = None, *, content: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save, or one with another data.pkl."""
    stream = io.BytesIO()
    torch.save(TENSORS if state is None else state, stream)
    if content is None and compression == zipfile.ZIP_STORED:
        return stream.getvalue()
    other = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(other, "w", compression) as new:
        for entry in old.infolist():
            replaced = content if content is not None and entry.filename.endswith("/data.pkl") else old.read(entry)
            new.writestr(entry.filename, replaced)
    return other.getvalue()


TORCH = archive()
with zipfile.ZipFile(io.BytesIO(TORCH)) as _opened:
    PICKLE = _opened.read("archive/data.pkl")


def patched(whole: bytes) -> st.SearchStrategy[bytes]:
    """The file with some bytes replaced, cut out, or put in."""

    def patch(edits: list[tuple[int, int, bytes]]) -> bytes:
        content = bytearray(whole)
        for at, cut, new in edits:
            content[at % (len(content) + 1) : at % (len(content) + 1) + cut] = new
        return bytes(content)

    edit = st.tuples(st.integers(0, len(whole)), st.sampled_from([0, 1, 1, 2, 8, 64]), st.binary(max_size=8))
    return st.lists(edit, min_size=1, max_size=4).map(patch)


names = st.one_of(st.sampled_from(["a", "b", "__metadata__", "", "a\nb\x1b[31m", "\u202e"]), st.text(max_size=6))
numbers = st.one_of(st.integers(-2, 20), st.sampled_from([2**31, 2**62, 2**63, 2**64, 1.5, None, True, "4"]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I8", "BOOL", "F4", "F8_E4M3", "X", 3, None]),
        "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
        "data_offsets": st.one_of(st.lists(numbers, max_size=3), numbers),
    }
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)


def with_header(header: Any, body: bytes, length: int | None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


safetensors_files = st.one_of(
    patched(SAFETENSORS),
    st.builds(
        with_header,
        st.one_of(st.dictionaries(names, entries, max_size=4), junk),
        st.binary(max_size=64),
        st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1)),
    ),
)

INDEX = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors", "n": "y.safetensors"}}).encode()
shards = st.one_of(
    st.sampled_from(["x.safetensors", "../x.safetensors", "/etc/passwd", "link.safetensors", ".", "", "a\0b", "x/y"]),
    st.text(max_size=8),
    st.integers(),
)
indexes = st.one_of(
    patched(INDEX),
    st.dictionaries(names, shards, max_size=5).map(lambda found: json.dumps({"weight_map": found}).encode()),
    junk.map(lambda found: json.dumps(found).encode()),
    st.integers(1, 20_000).map(lambda depth: b"[" * depth),
)


class Hostile:
    """Pickles as a call of something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


def growing(size: int) -> bytes:
    """A pickle of bytearray(size), in so few bytes."""
    return b"\x80\x02cbuiltins\nbytearray\n" + pickle.dumps((size,), 2)[2:-1] + b"R."


calls = st.sampled_from(
    [
        Hostile(__import__("os").system, f"touch {MARK}"),
        Hostile(eval, f"open({str(MARK)!r}, 'w')"),
        Hostile(MARK.touch),
        Hostile(print, "x"),
    ]
)
torch_files = st.one_of(
    patched(TORCH),
    patched(PICKLE).map(lambda content: archive(content=content)),
    calls.map(lambda call: archive({"a": torch.ones(1), "b": call})),
    calls.map(lambda call: archive(content=pickle.dumps({"b": call}, 4))),
    calls.map(lambda call: pickle.dumps({"b": call}, 2)),
    st.sampled_from([2**33, 2**40, 2**62]).map(lambda size: archive(content=growing(size))),
    st.just(archive(compression=zipfile.ZIP_DEFLATED)),
    junk.map(lambda found: archive(found)),
    st.integers(0, len(TORCH)).map(lambda size: TORCH[:size]),
    st.integers(1, 5_000).map(lambda depth: archive(content=b"\x80\x02" + b"(" * depth + b"t" * depth + b".")),
)


def clean(text: str) -> bool:
    return bool(text) and all(letter.isprintable() for letter in text)


def opened(path: Path) -> None:
    refusal = None
    signal.alarm(SECONDS)
    try:
        source = open_checkpoint(path, "base (x)")
        for name in source.specs:
            source.read(name)
    except InvalidInput as error:
        refusal = str(error)
    finally:
        signal.alarm(0)
    assert refusal is None or (clean(refusal) and refusal.startswith("base (x)")), repr(refusal)
    assert not MARK.exists(), "code was run"


def check_file(content: bytes) -> None:
    Path("checkpoint").write_bytes(content)
    opened(Path("checkpoint"))


def check_index(content: bytes) -> None:
    Path("model.safetensors.index.json").write_bytes(content)
    opened(Path())


KINDS: dict[str, tuple[st.SearchStrategy[bytes], Callable[[bytes], None]]] = {
    "safetensors": (safetensors_files, check_file),
    "index": (indexes, check_index),
    "torch": (torch_files, check_file),
}


def too_slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main(kind: str, count: int, first: int) -> None:
    warnings.simplefilter("ignore")
    Path("x.safetensors").write_bytes(save({"a": TENSORS["a.weight"]}))
    Path("y.safetensors").write_bytes(save({"n": TENSORS["n"]}))
    Path("link.safetensors").symlink_to("/etc/passwd")
    signal.signal(signal.SIGALRM, too_slow)
    check_file(TORCH)  # what torch imports only now is not an input's
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    strategy, check = KINDS[kind]
    done = 0

    def counted(content: bytes) -> None:
        nonlocal done
        done += 1
        check(content)

    quiet = settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    seed(first)(quiet(given(strategy)(counted)))()
    print(done)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
