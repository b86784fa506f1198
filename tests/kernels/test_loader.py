"""What brings tensors to a GPU, with a pretended one: whose streams are waited for, and when."""

from __future__ import annotations

import pytest
import torch
from cases import checkpoints

from bench.pretended_gpu import CUDA, DeviceTensor, host, pretended_gpu
from r2m_kernels import MergeConfig, analyze, merge
from r2m_kernels._stream.state_dicts import StateDictSource

SHAPES = {"a": (6, 8), "b": (6, 8), "bias": (5,)}
OTHER = torch.device("cuda:1")


class Lent(StateDictSource):
    """A state dict that says it lies on another GPU, and tells when it is read."""

    def __init__(self, label, tensors, events):
        super().__init__(label, tensors)
        self.devices, self._events = dict.fromkeys(tensors, OTHER), events

    def read(self, name):
        self._events.append("read")
        return super().read(name)


class Stream:
    """Tells when it is waited for."""

    def __init__(self, device, events):
        self._device, self._events = device, events

    def synchronize(self):
        self._events.append(f"waited for {self._device}")

    def record_event(self):
        return None

    def wait_event(self, event):
        pass


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_streams_of_gpus_that_lend_inputs_are_waited_for_before_any_step_reads(device, monkeypatch):
    base, experts = checkpoints(2, shapes=SHAPES)
    expected, events = merge(base, experts, MergeConfig.weight_average(), backend="torch"), []
    lent = [Lent("base", base, []), *(Lent(f"expert {i}", expert, events) for i, expert in enumerate(experts))]
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, events))
        backend = "triton" if device == "cuda:0" else "torch"
        analysis = analyze(lent[0], lent[1:], MergeConfig.weight_average(), device=device, backend=backend)
        first = list(events)
        events.clear()
        merged = analysis.merge()
    assert first[1] == "read"
    for found in (first, events):
        assert found[0] == "waited for cuda:1"
        assert found.count("waited for cuda:1") == 1
        # Whoever goes on may do so on another stream.
        assert (found[-1] == "waited for cuda:0") == (device == "cuda:0")
    bound = 2.0**-22
    assert all(
        (host(merged[name]) - tensor).abs().max() <= bound * tensor.abs().max() for name, tensor in expected.items()
    )


def test_inputs_where_they_are_computed_with_wait_for_nobody(monkeypatch):
    base, experts = checkpoints(2, shapes=SHAPES)
    events = []
    states = [{name: DeviceTensor(tensor) for name, tensor in state.items()} for state in (base, *experts)]
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, events))
        merge(states[0], states[1:], MergeConfig.weight_average(), backend="triton")
    assert set(events) == {f"waited for {CUDA}"}
