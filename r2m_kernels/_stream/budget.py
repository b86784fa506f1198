"""What a merge takes, from shapes alone: how a memory budget is split, and what each tensor costs (README §10).

A run is arranged by these numbers, and the application predicts a merge with them before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .._interface import Effort, Pace, sketch_rows, spans
from ..config import MergeConfig
from ..fields import JOINT_BASES
from .blocks import BLOCK_ELEMENTS, RUN_ELEMENTS, RUNS_PER_PANEL
from .factors import PRODUCT_ROWS
from .plan import PlannedTensor, by_rows
from .ring import RING_BYTES
from .tensors import BlockSource, PartialSource, TensorSource

COMPUTE_BYTES = 4  # of an element of intermediate results and factors; 8 where the base is float64
# Tensors begun and not yet finished, per thread: one at work and one that is read or written meanwhile.
AHEAD = 2
# What libraries take once they multiply and decompose: pages of their code, and workspaces of each thread.
LIBRARY_BYTES = 3 * 2**23
# And what they took where a matrix was needed whole, all methods measured: more is in huge pages on one machine.
LIBRARY_USUAL = 2**24
# The same where joint bases are made, which takes three decompositions beside products.
LIBRARY_JOINT = 2**25
WORKSPACE_BYTES = 2**22
# Of the factors of task vectors, as float64, while residuals are truncated: themselves, and a QR decomposition's.
FACTOR_COPIES = 4
# What a core does while it reads a byte of inputs from memory and subtracts it: 30 GFLOP/s against 4 GB/s.
FLOPS_PER_BYTE = 15
RING_SHARE = 8  # of a budget, what pinned memory may take
# Bytes of inputs in one group, where no budget says less. Of what comes from elsewhere the next group is there, too,
# and kernels wait for the first one; what is on the device already can be taken in few launches, each of which costs
# the host more time than a small group costs the GPU.
GROUP_BYTES = 2**28
DEVICE_GROUP_BYTES = 2**31


@dataclass(frozen=True)
class Inputs:
    """The checkpoints of a merge, as their headers tell."""

    base: TensorSource
    named: Mapping[str, TensorSource]  # the experts

    @cached_property
    def experts(self) -> list[TensorSource]:
        """In their order."""
        return list(self.named.values())

    @cached_property
    def sources(self) -> list[TensorSource]:
        """The base, then the experts."""
        return [self.base, *self.experts]

    def read_for(self, tensor: PlannedTensor) -> list[TensorSource]:
        """Who is read for a tensor."""
        sources = [self.base] if tensor.role == "copied" else self.sources
        return [source for source in sources if tensor.name in source.specs]

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Bytes read for a tensor: the base's and every expert's, each in its own dtype, or its factors'."""
        if tensor.factored:
            own = self.base.specs[tensor.name]
            return own.nbytes + tensor.change_elements * max(COMPUTE_BYTES, own.dtype.itemsize)
        return self.base.specs[tensor.name].nbytes if tensor.role == "copied" else self._nbytes[tensor.name]

    @cached_property
    def _nbytes(self) -> dict[str, int]:
        """Name → bytes of all who have it: every pass asks for each tensor's, and headers do not change."""
        found: dict[str, int] = {}
        for source in self.sources:
            for name, spec in source.specs.items():
                found[name] = found.get(name, 0) + spec.nbytes
        return found

    def working_bytes(self, tensor: PlannedTensor) -> int:
        """What a tensor takes while it is merged whole: its inputs, a wide result and its output."""
        wide = max(COMPUTE_BYTES, tensor.spec.dtype.itemsize)
        whole = self.nbytes(tensor) + tensor.spec.numel * (wide + tensor.spec.dtype.itemsize)
        return whole + self.algebra_bytes(tensor)

    def algebra_bytes(self, tensor: PlannedTensor) -> int:
        """What the factors of its task vectors take, where these are all that is needed of it."""
        return tensor.change_elements * torch.float64.itemsize * FACTOR_COPIES

    def in_parts(self, tensor: PlannedTensor) -> bool:
        """Whether a tensor can be read in parts."""
        return all(isinstance(source, PartialSource) for source in self.read_for(tensor))

    def in_blocks(self, tensor: PlannedTensor) -> bool:
        """Whether it can be read in any pieces at no higher cost."""
        named = (source for source in self.read_for(tensor) if isinstance(source, BlockSource))
        return self.in_parts(tensor) and all(source.in_blocks(tensor.name) for source in named)

    def factor_bytes(self, tensor: PlannedTensor, config: MergeConfig) -> int:
        """Bytes of what is kept of a tensor between steps: low-rank factors, or Gram matrices of its rows."""
        if by_rows(tensor, config):
            count = len(self.experts)
            return count * (count + 1) // 2 * tensor.matrix_shape[0] * torch.float64.itemsize
        if not tensor.truncated or tensor.whole:
            return 0
        width = max(COMPUTE_BYTES, tensor.spec.dtype.itemsize)
        return len(self.experts) * tensor.rank * sum(tensor.matrix_shape) * width


@dataclass(frozen=True)
class Memory:
    """How the memory of one process is split, in bytes; ``None``: without bound.

    Attributes:
        flight: inputs, intermediate results and outputs of what is at work.
        piece: what one tensor, or the part of it at work, may take of ``flight``.
        stored: what a truncation from storage, or a tensor that is needed whole, may take in place of what is in
            flight; ``None``: none needs more.
        factors: low-rank factors, and Gram matrices of rows, that stay in memory.
        spill: those that do not fit there.
        kept: tensors whose inputs stay in memory from the first pass to the last.
        group: inputs of tensors that are taken together.
        ring: pinned memory, through which a GPU's inputs and results go.
    """

    flight: int | None
    piece: int | None
    stored: int | None
    factors: int | None
    spill: int
    kept: frozenset[str]
    group: int
    ring: int = 0


def split(
    budget: int | None,
    tensors: Sequence[PlannedTensor],
    inputs: Inputs,
    config: MergeConfig,
    *,
    threads: int,
    whole: Mapping[str, int],
    device: int | None = None,
    brought: Callable[[PlannedTensor], bool] = lambda tensor: True,
) -> Memory:
    """The split of a budget.

    Half at most is for what is in flight, and more only for single tensors that need it. Low-rank factors
    come next, since those beyond their share are written and read again; what is left keeps inputs, which would only be
    read again. On a GPU what stays there is bounded by its own memory: half at most is for factors, inputs may take the
    rest but a quarter, which is for two groups, results and workspace. Pinned memory is the CPU's.

    Args:
        budget: bytes; ``None``: no bound.
        tensors: what this process works on.
        inputs: of all tensors.
        config: whether residuals are truncated at all.
        threads: at work at once.
        whole: what each tensor takes that is needed whole, by name.
        device: bytes of a GPU's memory; ``None``: a CPU computes.
        brought: whether a tensor's inputs have to be brought to where they are computed with.
    """
    bounds = ((device, 16), (budget, 8))
    group = min([DEVICE_GROUP_BYTES, *(size // share for size, share in bounds if size is not None)])
    needed = sum(inputs.factor_bytes(tensor, config) for tensor in tensors)
    stay = 0 if device is None else device * 3 // 4 - min(device // 2, needed if config.eta != 0 else 0)
    ring = 0
    if device is not None:  # results may leave it, if no inputs come
        ring = RING_BYTES if budget is None else min(RING_BYTES, budget // RING_SHARE)
    if budget is None:
        return Memory(None, None, None, None, 0, _kept(stay, tensors, inputs, brought), group, ring)
    budget -= ring
    # At most half of a small budget: what is left is to be worth having.
    budget -= min(budget // 2, library_bytes(threads))
    working = max(map(inputs.working_bytes, tensors), default=0)
    flight = min(budget // 2, AHEAD * threads * working)
    pace = Pace(len(inputs.experts), threads)
    staying = [tensor for tensor in tensors if stays(tensor, inputs, config, flight)]
    wanted = [truncation_bytes(tensor, inputs, config, pace) for tensor in staying]
    elsewhere = {tensor.name for tensor in staying}
    most = max((whole.get(one.name, 0) for one in tensors if one.name not in elsewhere), default=0)
    flight = min(budget // 2, AHEAD * threads * max(working, most))
    wanted += [most] if most > flight else []
    stored = None if device is not None or not wanted else min(budget, max(flight, *wanted))
    factors = min(budget - (stored or flight), needed)
    stay = budget - (stored or flight) - factors if device is None else stay
    spill = needed - factors if config.eta != 0 else 0
    piece = max(1, flight // (AHEAD * threads))
    return Memory(flight, piece, stored, factors, spill, _kept(stay, tensors, inputs, brought), group, ring)


def library_bytes(threads: int) -> int:
    """What libraries take beside all that is split, however small a budget is."""
    return LIBRARY_BYTES + threads * WORKSPACE_BYTES


def library_usual(config: MergeConfig) -> int:
    """What they took where a matrix was needed whole, which has the process for itself."""
    return (LIBRARY_JOINT if config.spectrum in JOINT_BASES else LIBRARY_USUAL) + WORKSPACE_BYTES


def _kept(
    room: int, tensors: Sequence[PlannedTensor], inputs: Inputs, brought: Callable[[PlannedTensor], bool]
) -> frozenset[str]:
    """The largest that fit, by name then. Statistics, extras and copies pass once or are small."""
    names = set()
    for tensor in sorted(tensors, key=lambda tensor: (-inputs.nbytes(tensor), tensor.name)):
        used = tensor.role in ("matrix", "vector") and not tensor.factored
        if used and inputs.nbytes(tensor) <= room and brought(tensor):
            names.add(tensor.name)
            room -= inputs.nbytes(tensor)
    return frozenset(names)


def stays(tensor: PlannedTensor, inputs: Inputs, config: MergeConfig, flight: int) -> bool:
    """Whether a matrix is truncated where it is stored, since it is too large.

    ``svd`` other than "randomized", spectra that are mapped further, and ranks whose blocks span the short side need it
    whole.
    """
    fast = config.svd == "randomized" and config.spectrum == "truncate" and config.eta != 0
    narrow = tensor.truncated and not spans(tensor.rank, config.oversampling, min(tensor.matrix_shape))
    narrow = narrow and not tensor.factored
    return fast and narrow and inputs.working_bytes(tensor) > flight and inputs.in_blocks(tensor)


def pace_of(tensor: PlannedTensor, inputs: Inputs, config: MergeConfig, memory: Memory, threads: int) -> Pace | None:
    """As much of a truncation from storage at once as there is room for, an expert and a panel at least.

    ``None`` where there is none: the tensor is small, or stays in memory, or is needed whole.
    """
    if memory.flight is None or memory.stored is None:
        return None
    if tensor.name in memory.kept or not stays(tensor, inputs, config, memory.flight):
        return None
    count = len(inputs.experts)
    # With a tolerance experts decide together when to stop.
    at_once = (count,) if config.tolerance is not None else (count, 1)
    paces = [Pace(experts, panels) for panels in range(threads, 0, -1) for experts in at_once]
    fitting = (pace for pace in paces if truncation_bytes(tensor, inputs, config, pace) <= memory.stored)
    return next(fitting, paces[-1])


def truncation_bytes(tensor: PlannedTensor, inputs: Inputs, config: MergeConfig, pace: Pace) -> int:
    """What a truncation from storage takes at most, by the fast method.

    Subspaces are blocks of b rows on the short side, of some experts; products with the long side are one expert's.
    """
    short, long = sorted(tensor.matrix_shape)
    size = max(COMPUTE_BYTES, tensor.spec.dtype.itemsize)
    width = min(short, sketch_rows(tensor.rank, config.oversampling))
    subspaces = pace.experts * width * short * size
    run = min(tensor.spec.numel, RUN_ELEMENTS)
    read = min(run, BLOCK_ELEMENTS) * inputs.nbytes(tensor) // tensor.spec.numel
    block = pace.experts * run * size
    sketched = (1 + pace.panels) * subspaces + pace.panels * (RUNS_PER_PANEL * block + read)
    effort, grams = effort_of(config), pace.experts * short**2 * size
    # Grams of each panel and their sum, beside the bases or a sketch.
    formed = subspaces + (1 + pace.panels) * grams + pace.panels * (read + block)
    if effort.by_gram(tensor.rank, tensor.matrix_shape):
        stepped = max(formed, grams + 2 * subspaces)
    else:
        # The bases, once more in the type of fast products, their sums, and those of each panel.
        stepped = int((2.5 + pace.panels) * subspaces) + pace.panels * (read + block)
    if effort.from_gram(tensor.rank, tensor.matrix_shape):
        # Beside Grams, of each that is turned its basis, a product and their copies.
        turned_at_once = pace.panels * 4 * width * short * size
        stepped = max(stepped, formed, 3 * grams // 2, grams + 2 * subspaces + turned_at_once)
    turned = 2 * subspaces + 2 * pace.panels * width * short * size  # a QR of one copies it
    rotated = subspaces + (width + tensor.rank) * long * size + pace.panels * (read + 2 * run * size)
    # Some rows of all factors as they are read, wanted and widened, and products of components on both sides.
    count = len(inputs.experts)
    rows = count * tensor.rank * min(long, PRODUCT_ROWS) * (2 * size + torch.float64.itemsize)
    compared = rows + count * (count - 1) * tensor.rank**2 * torch.float64.itemsize
    return max(sketched, stepped, turned, rotated, compared)


def effort_of(config: MergeConfig) -> Effort:
    """How hard a truncation tries."""
    # Of residuals that are weighted by row nobody asks for more than their lengths.
    return Effort(config.power_iterations, config.oversampling, config.tolerance, products=config.row_power == 0)


def truncation_flops(tensor: PlannedTensor, config: MergeConfig, experts: int) -> float:
    """Of a tensor's truncation; 0 where there is none."""
    if tensor.whole or not tensor.truncated or config.eta == 0 or tensor.factored:
        return 0.0
    factors = 2 * tensor.spec.numel * tensor.rank
    return (effort_of(config).work_on_cpu(tensor.rank, tensor.matrix_shape) + factors) * experts


def costs(
    tensors: Sequence[PlannedTensor], passes: Mapping[str, int], inputs: Inputs, config: MergeConfig
) -> dict[str, float]:
    """The work on each tensor, in bytes of inputs used once: its inputs a pass, and the products of its truncation.

    Args:
        passes: how often a tensor's inputs are used.
    """
    return {
        tensor.name: passes[tensor.name] * inputs.nbytes(tensor)
        + truncation_flops(tensor, config, len(inputs.experts)) / FLOPS_PER_BYTE
        for tensor in tensors
    }
