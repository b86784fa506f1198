"""What a merge scored on benchmarks of the Hub, as ``.eval_results/*.yaml`` has it: its page and leaderboards read it.

The format is https://huggingface.co/docs/hub/eval-results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r2m import plain_yaml
from r2m_kernels.errors import BadOption, quoted

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FORM = "DATASET=OWNER/NAME:TASK[:METRIC]"
_METRIC = "auc"


@dataclass(frozen=True)
class Benchmark:
    """Where a dataset's number goes.

    Attributes:
        dataset: its name in the evaluation.
        id: of the benchmark, a dataset of the Hub.
        task: of the benchmark, as its ``eval.yaml`` calls it.
        metric: which number, by its key in the evaluation.
    """

    dataset: str
    id: str
    task: str
    metric: str

    @classmethod
    def read(cls, text: str) -> Benchmark:
        """From ``DATASET=OWNER/NAME:TASK[:METRIC]``.

        Raises:
            BadOption: it is written otherwise.
        """
        name, _, place = text.rpartition("=")
        owner, *more = place.split(":")
        if not name or not _ID.fullmatch(owner) or len(more) not in (1, 2) or not all(more):
            raise BadOption(f"--benchmark {text}: expected {_FORM}, such as DFDC=owner/dfdc:test:video_auc")
        return cls(name, owner, more[0], more[1] if len(more) > 1 else _METRIC)


def results(
    measured: Mapping[str, Mapping[str, Any]], benchmarks: Sequence[Benchmark], date: str | None, source: str | None
) -> bytes:
    """The text of the file.

    Args:
        measured: dataset → numbers, of an evaluation.
        benchmarks: what of them goes where.
        date: of the evaluation, as ISO 8601 has it; None: the Hub takes the commit's.
        source: an address where it can be looked up.

    Raises:
        BadOption: the evaluation has no such number.
    """
    entries = []
    for one in benchmarks:
        numbers = measured.get(one.dataset)
        if numbers is None:
            listed = ", ".join(map(quoted, measured))
            raise BadOption(
                f"--benchmark {one.dataset}: the evaluation has no dataset of that name; expected one of {listed}"
            )
        value = numbers.get(one.metric)
        if not isinstance(value, float):
            raise BadOption(f"--benchmark {one.dataset}: the evaluation has no number {quoted(one.metric)} of it")
        entry: dict[str, Any] = {"dataset": {"id": one.id, "task_id": one.task}, "value": value}
        entry |= {"date": date} if date else {}
        entry |= {"source": {"url": source, "name": "r2m evaluate"}} if source else {}
        entries.append({**entry, "notes": f"{one.metric}, {numbers['frames']} frames of {numbers['videos']} videos"})
    return plain_yaml.dump(entries).encode()
