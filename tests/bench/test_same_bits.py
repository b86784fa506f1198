"""The guard of the bits: it sees the smallest change, sets aside what is no bit, and holds for the pinned commit."""

from __future__ import annotations

import sys

import pytest

from bench import same_bits


@pytest.mark.parametrize(
    ("before", "now", "where"),
    [
        ({"a": [1.0, {"b": 2.0}]}, {"a": [1.0, {"b": 2.0}]}, ""),
        ({"a": [1.0, {"b": 0.1 + 0.2}]}, {"a": [1.0, {"b": 0.3}]}, "a[1] b: 0.30000000000000004 became 0.3"),
        ({"a": 1}, {"a": 1.0}, "a: 1 became 1.0"),
        ({"a": {"x": 1}}, {"a": {}}, "a x: gone"),
        ({}, {"a": None}, "a: new"),
        ({"a": [1, 2]}, {"a": [1]}, "a: [1, 2] became [1]"),
        ({"card": "one\ntwo"}, {"card": "one\nthree"}, "card: '…' became 'three'"),
        ({"steps": [{"seconds": 1.0}], "sources": "x"}, {"steps": [{"seconds": 2.0}], "sources": "y"}, ""),
    ],
)
def test_the_first_difference_is_named(before, now, where):
    assert same_bits.difference(before, now) == where


def test_what_differs_is_wrong_unless_it_is_listed_and_failures_always_are(monkeypatch):
    before, now = {"one": {"a": 1}, "two": {"a": 1}, "three": {"error": "x"}}, {"one": {"a": 2}, "two": {"a": 2}}
    monkeypatch.setattr(same_bits, "EXPECTED", {"t*": "meant"})
    wrong, expected = same_bits.compare(before, {**now, "three": {"error": "x"}})
    assert wrong == ["one: a: 1 became 2", "three: x"]
    assert expected == ["two: a: 1 became 2 (expected: meant)"]


def test_without_that_commit_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["same_bits", "0" * 40])
    assert same_bits.main() == 0
    assert capsys.readouterr().out == f"skipped: no commit {'0' * 40} here\n"


def test_without_git_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["same_bits"])
    assert same_bits.main() == 0
    assert capsys.readouterr().out == f"skipped: no commit {same_bits.PINNED} here\n"


@pytest.mark.slow
def test_the_same_bits_as_the_pinned_commit(monkeypatch, capsys):
    if same_bits.commit_of(same_bits.PINNED) is None:
        pytest.skip(f"no history with {same_bits.PINNED}")
    monkeypatch.setattr(sys, "argv", ["same_bits"])
    code = same_bits.main()
    assert code == 0, capsys.readouterr().out
