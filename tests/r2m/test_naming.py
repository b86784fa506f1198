"""Names of experts: given, or the shortest end of the path that tells them apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from r2m.naming import name_experts

from r2m_kernels import InvalidInput


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fs.safetensors"], {"fs.safetensors": "fs.safetensors"}),
        (["x/fs.st", "y/fr.st"], {"fs.st": "x/fs.st", "fr.st": "y/fr.st"}),
        (["/m", "x/m"], {"/m": "/m", "x/m": "x/m"}),
        (
            ["w/train_on_fs/clip.safetensors", "w/train_on_fr/clip.safetensors"],
            {
                "train_on_fs/clip.safetensors": "w/train_on_fs/clip.safetensors",
                "train_on_fr/clip.safetensors": "w/train_on_fr/clip.safetensors",
            },
        ),
        (["a/x/m", "b/x/m", "n"], {"a/x/m": "a/x/m", "b/x/m": "b/x/m", "n": "n"}),
        (["m", "m", "./m"], {"m": "m", "m#2": "m", "m#3": "./m"}),
        (["one=m", "m"], {"one": "m", "m": "m"}),
        (["m", "m=other"], {"m#2": "m", "m": "other"}),
        (["fs=checkpoints/"], {"fs": "checkpoints/"}),
        (["a=b=c"], {"a": "b=c"}),
    ],
)
def test_names(arguments: list[str], expected: dict[str, str]) -> None:
    assert name_experts(arguments) == expected
    assert list(name_experts(arguments)) == list(expected)


def test_an_existing_path_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rank=16.safetensors").touch()
    assert name_experts(["rank=16.safetensors", "x=rank=16.safetensors"]) == {
        "rank=16.safetensors": "rank=16.safetensors",
        "x": "rank=16.safetensors",
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["=m"], "expert '=m': expected [NAME=]PATH, got an empty NAME"),
        (["m="], "expert 'm=': expected [NAME=]PATH, got an empty PATH"),
        ([""], "expert '': expected [NAME=]PATH, got an empty NAME"),
        (["x=m", "y=m", "x=n"], "expert name 'x' is given 2 times; names must differ"),
    ],
)
def test_bad_names(arguments: list[str], sentence: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        name_experts(arguments)
    assert str(caught.value) == sentence


paths = st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=4).map("/".join)


@given(st.lists(st.tuples(st.none() | st.integers(0, 99).map("n{}".format), paths), min_size=1, max_size=6))
@example([(None, "a"), (None, "b/a"), (None, "b/a")])
def test_every_expert_keeps_its_path_under_its_own_name(given_experts: list[tuple[str | None, str]]) -> None:
    explicit = [name for name, _ in given_experts if name]
    arguments = [f"{name}={path}" if name else path for name, path in given_experts]
    if len(set(explicit)) < len(explicit):
        with pytest.raises(InvalidInput):
            name_experts(arguments)
        return
    named = name_experts(arguments)
    assert list(named.values()) == [path for _, path in given_experts]
    whole = {path: os.path.abspath(path) for _, path in given_experts}
    for (given_name, path), name in zip(given_experts, named, strict=True):
        assert given_name in (None, name)
        if given_name is None and "#" not in name:
            ends = {other for other in whole.values() if other == name or other.endswith("/" + name)}
            assert ends == {whole[path]}
