"""How test suites lay out their images, as one table: options, documentation and error messages read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One of them.

    Attributes:
        suites: who has it.
        shape: what it looks like: names of a suite's own in capitals.
        datasets: what becomes a dataset.
        listed: whether it is a file.
    """

    suites: str
    shape: str
    datasets: str
    listed: bool = False


LAYOUTS = (
    Layout("a folder of one's own", "`real/…`, `fake/…`", "the folder"),
    Layout("reals beside many generators", "`real/…`, `fake/GENERATOR/…`", "each generator, beside all of the reals"),
    Layout(
        "ForenSynths, UniversalFakeDetect",
        "`GENERATOR/CATEGORY/{0_real,1_fake}/…`, of some `GENERATOR/{0_real,1_fake}/…`",
        "each generator, its categories together",
    ),
    Layout("GenImage", "`GENERATOR/…/{train,val}/{nature,ai}/…`", "each generator, of its `val`"),
    Layout("AIGIBench", "`test/GENERATOR/{0_real,1_fake}/…`", "each generator"),
    Layout(
        "Community Forensics",
        "`GENERATOR/fake/…`, `SOURCE/real/…`",
        "each generator; where it has no reals, beside those of all sources",
    ),
    Layout("ForensicHub", "JSON: `[{path, label}, …]`", "the list, or each `model` or `dataset` in it", True),
    Layout("OpenFake", "CSV: `file_name`, `label`, `model`, …", "each model, beside all of the reals", True),
    Layout(
        "DeepfakeBench, DF40",
        "JSON: `{dataset: {label: {split: {video: {label, frames}}}}}`",
        "each `dataset` in it",
        True,
    ),
)


def shapes(listed: bool) -> str:
    """Those of files, or of directories, for a message."""
    return "; ".join(f"{one.shape.replace('`', '')} ({one.suites})" for one in LAYOUTS if one.listed == listed)
