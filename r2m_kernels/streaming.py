"""What an application needs to merge checkpoints of its own kind: sources, sinks, tensor plans, processes, backends."""

from __future__ import annotations

from ._backends import Backend, usable_device
from ._backends import choose as choose_backend
from ._stream import budget
from ._stream.budget import Inputs
from ._stream.compatibility import plan as plan_tensors
from ._stream.factors import Factors
from ._stream.plan import Plan, PlannedTensor
from ._stream.processes import Journal, KeptFactors, NoJournal, ProcessGroup, SingleProcess
from ._stream.schedule import Pass, Work, shares, whole_bytes, work_list
from ._stream.spill import FACTORS_PREFIX
from ._stream.tensors import (
    FLOATING,
    BlockSource,
    DirectSource,
    LowRankSource,
    PartialSink,
    PartialSource,
    TensorSink,
    TensorSource,
    TensorSpec,
    dtype_name,
)
from .merging import passes as plan_passes
from .single_truncation import depends_on_others
from .sources import sources_digest

__all__ = [
    "FACTORS_PREFIX",
    "FLOATING",
    "Backend",
    "BlockSource",
    "DirectSource",
    "Factors",
    "Inputs",
    "Journal",
    "KeptFactors",
    "LowRankSource",
    "NoJournal",
    "PartialSink",
    "PartialSource",
    "Pass",
    "Plan",
    "PlannedTensor",
    "ProcessGroup",
    "SingleProcess",
    "TensorSink",
    "TensorSource",
    "TensorSpec",
    "Work",
    "budget",
    "choose_backend",
    "depends_on_others",
    "dtype_name",
    "plan_passes",
    "plan_tensors",
    "shares",
    "sources_digest",
    "usable_device",
    "whole_bytes",
    "work_list",
]
