"""What was fixed before a fresh seed was scored: ``protocol.json``, and what its rule says of the numbers.

Fresh seeds are scored only while that file is committed as it lies there; results keep its SHA-256 and its commit.

The file has ``question``; ``groups``: regime → the groups that decide; ``candidates``: row → what it is, in the words
of ``methods.key`` when it was written, which ``methods.words_of`` still knows; ``baselines``: rows; ``bar``: what the
lower end of a candidate's paired interval against each baseline must reach in every group that decides; ``fallback``:
the row that stays the default where no candidate does; ``conditions``: name → list of [row, other row, regime, group,
"mean" or "low"], all of which must be above 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.machine import output
from bench.quality.methods import Method, key, words_of

PATH = Path(__file__).with_name("protocol.json")
Against = Any
"""(regime, row, other row, group) → paired difference, as ``judging.paired`` has it."""


def read() -> dict[str, Any]:
    """The protocol."""
    content: dict[str, Any] = json.loads(PATH.read_text())
    return content


def digest() -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(PATH.read_bytes()).hexdigest()


def committed() -> dict[str, str]:
    """SHA-256 and commit of the protocol.

    Raises:
        SystemExit: where git does not have the file as it is here.
    """
    git = ("git", "-C", str(PATH.parent))
    commit = output(*git, "log", "-1", "--format=%H", "--", PATH.name)
    if not commit or output(*git, "status", "--porcelain", "--", PATH.name) != "":
        raise SystemExit(f"fresh seeds are scored after the protocol is committed: {PATH} is not, or was changed since")
    return {"sha256": digest(), "commit": commit}


def rows(content: Mapping[str, Any]) -> list[str]:
    """Every row that it names, each once."""
    compared = [row for conditions in content["conditions"].values() for pair in conditions for row in pair[:2]]
    return list(dict.fromkeys([*content["baselines"], *content["candidates"], *compared]))


def check(content: Mapping[str, Any], methods: Mapping[str, Method]) -> None:
    """Every row is there, and candidates are what they were when the protocol was written.

    Raises:
        SystemExit: with the first that is not.
    """
    for row in rows(content):
        if row not in methods:
            raise SystemExit(f"the protocol names {row!r}, which bench/quality/methods.py does not have")
    for row, meant in content["candidates"].items():
        (candidate,) = methods[row].candidates.values()
        if meant not in words_of(candidate):
            raise SystemExit(f"{row!r} is {key(candidate)!r}; the protocol means {meant!r}")


def decide(content: Mapping[str, Any], against: Against) -> dict[str, Any]:
    """What the rule says: every candidate's bars, who holds all, the default, and the conditions.

    Of candidates that hold every bar the one with the largest mean difference to the first baseline is the default.
    """
    places = [(regime, group) for regime, groups in content["groups"].items() for group in groups]
    bars = {
        row: [
            [regime, group, other, against(regime, row, other, group)]
            for regime, group in places
            for other in content["baselines"]
        ]
        for row in content["candidates"]
    }

    def gain(row: str) -> float:
        return sum(against(regime, row, content["baselines"][0], group)["mean"] for regime, group in places)

    holding = [row for row, of in bars.items() if all(found["low"] >= content["bar"] for *_, found in of)]
    return {
        "bars": bars,
        "holding": holding,
        "default": max(holding, key=gain, default=content["fallback"]),
        "conditions": {name: list(_judged(of, against)) for name, of in content["conditions"].items()},
    }


def _judged(conditions: list[list[str]], against: Against) -> Iterator[list[Any]]:
    for row, other, regime, group, number in conditions:
        found = against(regime, row, other, group)
        yield [row, other, regime, group, number, found, found[number] > 0]
