"""How a merge is run, wherever the recipe is from. Each option is declared once, for the command and the writer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from r2m_kernels import checks
from r2m_kernels.fields import FILES, Screened
from r2m_kernels.options import Option, documented, option, read_options

RUN = "Running"
_NO_FLAG = ""
# Fields of the configuration that a sweep may vary: an analysis is merged at any of them for the cost of the last step.
SWEPT = ("rank", "eta", "core_scale", "row_power")


@dataclass(frozen=True)
class Options:
    """How a merge is run. Immutable; sizes are checked on construction.

    Raises:
        BadOption: a size that is none.
    """

    overwrite: bool = option(False, FILES, "Replace DIR if a former merge wrote it, or it is empty.")
    max_shard_size: int | str = option(
        "5GB",
        FILES,
        "Start another file where one would hold more than this.",
        "It alone decides the layout of the output.",
        check=checks.byte_size,
        metavar="SIZE",
    )
    device: str | None = option(None, RUN, "Where to compute: cpu, cuda, cuda:1.", metavar="DEVICE", unset="cpu")
    backend: str = option("auto", RUN, "Who computes: auto, native (CPUs), triton (GPUs) or torch.")
    memory_budget: int | str | None = option(
        None,
        RUN,
        "Working memory of each process, such as 4GiB.",
        "It touches no bit of the output.",
        check=checks.byte_size,
        metavar="SIZE",
        unset="60 % of what is free",
    )
    resume: bool = option(False, RUN, "Go on from where the same merge was cut off.")
    screen: str | None = option(
        None,
        RUN,
        "Look for experts that are no specialists as the others are, and refuse the merge, or leave-out those.",
        "Told by lengths and directions of task vectors; all inputs are read once more for it (docs/screening.md).",
        choices=get_args(Screened),
        unset="nobody looks",
    )
    keep_factors: bool = option(
        False,
        RUN,
        "Keep truncations of each expert in DIR.factors and take those there: add truncates the new one alone.",
        "Of methods without a core, whose truncations depend on no other expert (docs/projects.md).",
    )
    reuse: bool = option(
        False, _NO_FLAG, "Take what a former merge into DIR found, where this one would find the same to the bit."
    )

    def __post_init__(self) -> None:
        for name in ("max_shard_size", "memory_budget"):  # texts become bytes; the dataclass is frozen
            object.__setattr__(self, name, OPTIONS[name].checked(getattr(self, name)))

    @property
    def shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        return int(self.max_shard_size)

    @property
    def budget_bytes(self) -> int | None:
        """``memory_budget`` in bytes, if there is any."""
        return None if self.memory_budget is None else int(self.memory_budget)


OPTIONS: dict[str, Option] = read_options(Options)
Options.__doc__ = documented(Options, OPTIONS)
