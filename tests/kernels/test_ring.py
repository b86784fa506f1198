"""The ring of pinned memory: what goes through it, in which order, how often a slot is used, and what is read."""

from __future__ import annotations

import contextlib
import functools
import threading

import pytest
import torch
from cases import checkpoints, same_bits

from bench import pretended_gpu as pretended
from bench.pretended_gpu import DeviceTensor, host, pretended_gpu
from r2m_kernels import MergeConfig, analyze, merge
from r2m_kernels._stream import budget
from r2m_kernels._stream.budget import Inputs
from r2m_kernels._stream.compatibility import plan
from r2m_kernels._stream.ring import RING_BYTES, Piece, Ring
from r2m_kernels._stream.state_dicts import StateDictSource
from r2m_kernels.streaming import TensorSpec

DEVICE = torch.device("cuda:0")
AVERAGE = MergeConfig.weight_average()
SHAPES = {"a": (600, 8), "b": (600, 8), "c": (300, 8), "bias": (5,), "none": (0, 3)}


class Stream:
    """Does what it is asked for in that order, and only when somebody waits: as late as a GPU might be."""

    current = threading.local()

    def __init__(self, *_):
        self.asked, self.done, self.lock = [], 0, threading.RLock()

    def record_event(self):
        return Event(self, len(self.asked))

    def wait_event(self, event):
        self.asked.append(event.synchronize)

    def reach(self, position):
        with self.lock:
            while self.done < position:
                self.done += 1
                self.asked[self.done - 1]()


class Event:
    def __init__(self, stream, position):
        self._stream, self._position = stream, position

    def synchronize(self):
        self._stream.reach(self._position)


class Late(torch.Tensor):
    """Of a device: copied by the stream that is current."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            target, source = (one.as_subclass(torch.Tensor) for one in args)
            Stream.current.stream.asked.append(lambda: target.copy_(source))
            return args[0]
        return super().__torch_function__(function, types, args, kwargs or {})


@contextlib.contextmanager
def within(stream):
    Stream.current.stream = stream
    yield


@pytest.fixture
def caller(monkeypatch):
    """The stream of who calls; streams are late, and memory is not pinned."""
    stream, empty = Stream(), torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return stream


def late(numbers):
    return numbers.clone().as_subclass(Late)


def test_no_slot_is_filled_before_its_copy_is_done(caller):
    ring, numbers = Ring(DEVICE, 4 * 4096), torch.arange(40 * 700.0).view(40, 700)
    runs = [late(torch.zeros(700)) for _ in numbers]
    for _ in range(2):
        numbers = numbers + 1
        ring.bring([Piece(run, lambda out, row=row: out.copy_(row)) for run, row in zip(runs, numbers, strict=True)])
    assert (ring.slot_bytes, ring.slots, ring._made) == (4096, 4, 4)
    caller.reach(len(caller.asked))  # whoever comes behind
    assert torch.equal(torch.stack([run.as_subclass(torch.Tensor) for run in runs]), numbers)


def test_small_pieces_share_a_slot(caller):
    ring = Ring(DEVICE, 4 * 4096)
    sizes = [1, 3, 1024, 1000, 5, 2]
    runs = [late(torch.zeros(size)) for size in sizes]
    batches = [[len(piece.run) for piece in batch] for batch in ring._batches([Piece(run, print) for run in runs])]
    assert batches == [[1, 3], [1024], [1000, 5], [2]]
    assert Ring(DEVICE, 2**40).slot_bytes == 2**24
    assert Ring(DEVICE, 1).slot_bytes == 2**12


def test_results_are_given_back_once_they_are_there_and_of_two_groups_at_most(caller):
    ring, found = Ring(DEVICE, 4 * 4096), {}
    for group in range(4):
        runs = [late(torch.zeros(700)) for _ in range(6)]
        for place, run in enumerate(runs):  # not computed yet
            made, number = run.as_subclass(torch.Tensor), 6 * group + place
            caller.asked.append(functools.partial(made.fill_, number))
        taken = [lambda memory, key=(group, place): found.update({key: memory.clone()}) for place in range(6)]
        ring.give_back(list(map(Piece, runs, taken)))
        assert len({of for of, _ in found} | {group - 1, group}) >= group  # those before are there
    ring.finish()
    assert {key: memory.tolist() for key, memory in found.items()} == {
        (group, place): [6 * group + place] * 700 for group in range(4) for place in range(6)
    }


@pytest.mark.parametrize("way", ["bring", "give_back"])
def test_what_goes_wrong_in_a_thread_is_raised_and_the_ring_goes_on(caller, way):
    ring, taken = Ring(DEVICE, 4 * 4096), []

    def full(memory):
        raise OSError(28, "No space left on device", "out")

    hosts = [taken.append, full, *[taken.append] * 10]
    pieces = [Piece(late(torch.zeros(700)), action) for action in hosts]

    def carried():
        getattr(ring, way)(pieces)
        ring.finish()

    with pytest.raises(OSError, match="No space left"):
        carried()
    assert len(taken) == 11
    ring.bring(pieces[2:])
    assert len(taken) == 21


def test_no_copy_is_on_its_way_to_memory_that_is_given_back(caller):
    ring, runs = Ring(DEVICE, 4 * 4096), [late(torch.zeros(700)) for _ in range(6)]

    def fails(memory):
        raise OSError(5, "Input/output error", "in")

    hosts = [fails, *[lambda memory: memory.fill_(1)] * 5]
    with pytest.raises(OSError, match="Input/output"):
        ring.bring(list(map(Piece, runs, hosts)))
    caller.reach(len(caller.asked))  # whoever has the memory next
    assert [float(run.as_subclass(torch.Tensor).sum()) for run in runs] == [0, *[700] * 5]


class Stored:
    """A checkpoint elsewhere, that reads into memory; it tells what it read."""

    def __init__(self, label, tensors, log, direct=True):
        self.aliases = {}
        self.label, self._tensors, self.log, self._direct = label, tensors, log, direct
        self.specs = specs_of(tensors)

    def read(self, name):
        self.log.append((name, "whole"))
        return self._tensors[name].clone()

    def read_elements(self, name, start, stop):
        raise AssertionError("read into memory that it made")

    def read_block(self, name, start, length, step, count):
        raise AssertionError("read in blocks")

    def in_blocks(self, name):
        return self._direct

    def read_into(self, name, start, out):
        self.log.append((name, start))
        out.copy_(self._tensors[name].reshape(-1)[start : start + out.numel()])


def specs_of(tensors):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@functools.cache
def states():
    base, experts = checkpoints(2, shapes=SHAPES)
    base["odd"] = torch.randn(8, 6).T
    for expert in experts:
        expert["odd"] = torch.randn(6, 8)
    return base, experts


@functools.cache
def resident():
    """The merge where all of it lies on the GPU."""
    base, experts = states()
    there = [{name: DeviceTensor(tensor.contiguous()) for name, tensor in one.items()} for one in (base, *experts)]
    with pretended_gpu():
        merged = merge(there[0], there[1:], AVERAGE, backend="triton")
    return {name: host(tensor) for name, tensor in merged.items()}


@pytest.mark.parametrize("budget", [None, "100KiB"])
def test_inputs_and_results_of_the_host_have_the_bits_of_those_on_the_gpu(budget):
    base, experts = states()
    with pretended_gpu() as counts:
        merged = merge(base, experts, AVERAGE, device="cuda:0", backend="triton", memory_budget=budget)
    assert counts.kinds["pinned"] == 0  # tensor by tensor
    assert not any(isinstance(tensor, DeviceTensor) for tensor in merged.values())
    assert same_bits(resident(), merged)


@pytest.mark.parametrize("direct", [True, False])
def test_files_are_read_into_the_ring_and_once_where_they_fit(direct):
    base, experts = states()
    log = []
    stored = [Stored(f"file {i}", one, log, direct) for i, one in enumerate((base, *experts))]
    with pretended_gpu():
        analysis = analyze(stored[0], stored[1:], AVERAGE, device="cuda:0", backend="triton", memory_budget="2MiB")
        merged = analysis.merge()
    assert same_bits(resident(), merged)
    floating = [name for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel()]
    for name in floating:
        reads = [place for of, place in log if of == name]
        assert sorted(map(str, reads)) == ["0" if direct else "whole"] * 3
    size = sum(one[name].nbytes for name in floating for one in (base, *experts))
    gram, combination = analysis.steps
    assert (gram.bytes_read, combination.bytes_read) == (size, base["steps"].nbytes)


def test_what_fits_on_the_gpu_is_kept_and_the_next_pass_begins_where_the_last_one_ended(monkeypatch):
    base, experts = states()
    log = []
    stored = [Stored("base", base, log), *(Stored("expert", one, []) for one in experts)]
    monkeypatch.setattr(pretended, "MEMORY", 2**17)
    with pretended_gpu():
        analysis = analyze(stored[0], stored[1:], AVERAGE, device="cuda:0", backend="triton")
        first = list(dict.fromkeys(name for name, _ in log))
        log.clear()
        merged = analysis.merge()
    assert same_bits(resident(), merged)
    second = list(dict.fromkeys(name for name, _ in log))
    kept = analysis._run.memory.kept
    assert kept == {"a", "odd", "bias"}
    assert (first[:3], second[-2:]) == (["a", "b", "c"], ["c", "b"])


def test_pinned_memory_is_taken_from_the_budget_and_inputs_stay_while_they_fit_beside_factors():
    base, experts = states()
    sources = [StateDictSource(str(index), one) for index, one in enumerate((base, *experts))]
    inputs = Inputs(sources[0], {source.label: source for source in sources[1:]})

    def split(limit, config, device):
        tensors = plan(inputs.base, inputs.named, config).tensors
        return budget.split(limit, tensors, inputs, config, threads=1, whole={}, device=device)

    size, whole = 2**24, MergeConfig.r2m(rank=0.5, whole_up_to=0)
    assert split(None, AVERAGE, size).ring == RING_BYTES
    assert split(None, AVERAGE, None).ring == 0
    counted = split(2**22, AVERAGE, size)
    assert counted.ring == 2**22 // budget.RING_SHARE
    assert counted.flight + counted.factors + counted.ring <= 2**22
    needed = sum(inputs.factor_bytes(one, whole) for one in plan(inputs.base, inputs.named, whole).tensors)
    kept = [split(None, config, 4 * needed).kept for config in (AVERAGE, whole)]
    room = [4 * needed * 3 // 4, 4 * needed * 3 // 4 - needed]
    taken = [sum(sum(one[name].nbytes for one in (base, *experts)) for name in names) for names in kept]
    assert all(bytes_ <= most for bytes_, most in zip(taken, room, strict=True))
    assert taken[0] > taken[1] > 0
