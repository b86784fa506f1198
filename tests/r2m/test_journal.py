"""The record of finished work: what is on the disk, in which order, and what of a torn file counts."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from r2m.journal import FileJournal

values = st.recursive(
    st.one_of(st.none(), st.floats(), st.integers(-(2**53), 2**53), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)


def written(directory: Path, records: list[tuple[str, str, object]], index: int = 0) -> None:
    journal = FileJournal(directory, index)
    for step, name, value in records:
        journal.record(step, name, value)
    journal.close()


def equal(one: object, other: object) -> bool:
    return repr(one) == repr(other)  # NaN is itself here


@settings(max_examples=100, deadline=None)
@given(records=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.text(max_size=5), values), max_size=6))
def test_what_is_recorded_is_known_to_the_next(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, str, object]]
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    written(directory, records)
    journal = FileJournal(directory)
    for step in ("a", "b"):
        assert equal(journal.known(step), {name: value for at, name, value in records if at == step})
    journal.close()


def test_numbers_are_exact(tmp_path: Path) -> None:
    numbers = [0.1, 1e-320, math.pi, -0.0, math.inf, 2.0**1023]
    written(tmp_path, [("s", "n", numbers)])
    journal = FileJournal(tmp_path)
    assert [number.hex() for number in journal.known("s")["n"]] == [number.hex() for number in numbers]
    journal.close()


def test_a_file_cut_off_anywhere_has_its_whole_lines(tmp_path: Path) -> None:
    records = [("s", f"tensor {i}", [float(i)] * i) for i in range(5)]
    written(tmp_path, records)
    path = tmp_path / "journal-0"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = [sum(map(len, lines[:count])) for count in range(6)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        count = sum(end <= size for end in ends) - 1
        journal = FileJournal(tmp_path)
        assert list(journal.known("s")) == [name for _, name, _ in records[:count]]
        journal.record("s", "next", 1)
        journal.close()
        assert path.read_bytes()[: ends[count]] == whole[: ends[count]]
        again = FileJournal(tmp_path)
        assert list(again.known("s")) == [*(name for _, name, _ in records[:count]), "next"]
        again.close()


def test_a_line_with_a_wrong_sum_ends_it(tmp_path: Path) -> None:
    written(tmp_path, [("s", "one", 1.0), ("s", "two", 2.0), ("s", "three", 3.0)])
    path = tmp_path / "journal-0"
    path.write_bytes(path.read_bytes().replace(b"2.0", b"2.5"))
    journal = FileJournal(tmp_path)
    assert journal.known("s") == {"one": 1.0}
    journal.close()


def test_all_processes_journals_are_read_and_one_s_own_is_written(tmp_path: Path) -> None:
    for index in range(3):
        written(tmp_path, [("s", f"of {index}", index)], index)
    journal = FileJournal(tmp_path, index=7)
    assert journal.known("s") == {"of 0": 0, "of 1": 1, "of 2": 2}
    journal.record("s", "of 7", 7)
    journal.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal-0", "journal-1", "journal-2", "journal-7"]


def test_records_are_written_after_what_they_speak_of(tmp_path: Path) -> None:
    events: list[str] = []

    def bring_to_disk() -> None:
        size = (tmp_path / "journal-0").stat().st_size
        events.append(f"data on disk, journal has {size} bytes")
        journal.record("s", "meanwhile", 2)  # of data that this call does not cover

    journal = FileJournal(tmp_path, before=bring_to_disk, seconds=math.inf)
    journal.record("s", "first", 1)
    assert events == []
    journal.flush()
    assert events == ["data on disk, journal has 0 bytes"]
    other = FileJournal(tmp_path, index=1)
    assert other.known("s") == {"first": 1}
    other.close()
    journal.flush()
    assert len(events) == 2


def test_a_disk_that_takes_no_data_gets_no_records(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "data")

    journal = FileJournal(tmp_path, before=full, seconds=0.0)
    journal.record("s", "first", 1)  # written beside other work: told at a later record

    def go_on() -> None:
        for count in range(1000):
            journal.record("s", f"another {count}", 1)
            time.sleep(0.01)

    with pytest.raises(OSError, match="No space"):
        go_on()
    journal.close()
    assert (tmp_path / "journal-0").read_bytes() == b""
