"""Shared by all tests: hypothesis profile, torch threads, and a summary of the backends that ran."""

from __future__ import annotations

import os

# Triton kernels run on CPU tensors here. Read when they are imported, so it comes before anything of ours.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from heavy import NUMBERS
from hypothesis import settings
from interpreter import lose_no_time, round_to_bf16_as_hardware_does

from r2m_kernels import _backends

# No deadline: the machines that run this are shared, and a time is not what these tests are about.
settings.register_profile("r2m", deadline=None, max_examples=25, print_blob=True)
settings.load_profile("r2m")


def pytest_addoption(parser):
    """``--heavy``: how often."""
    parser.addoption(
        "--heavy",
        choices=NUMBERS,
        default="change",
        help="how often kills and mutated inputs are repeated: as a change lands, or for closing notes",
    )


def pytest_collection_modifyitems(items):
    """What is heavy is slow."""
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def numbers(request):
    """How often a heavy test repeats what it does."""
    return NUMBERS[request.config.getoption("--heavy")]


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Tests run side by side, one thread each; those about threads set their own number, which ends with them."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def kernels_round_as_on_a_gpu(monkeypatch):
    """Interpreted kernels round to bfloat16 as hardware does, and lose no time."""
    lose_no_time(monkeypatch)
    round_to_bf16_as_hardware_does(monkeypatch)


@pytest.fixture(autouse=True)
def record_backends(request, monkeypatch):
    """Notes which backends a test made compute, for the summary."""
    choose = _backends.choose

    def recorded(name, device):
        backend = choose(name, device)
        entry = ("backend", f"{backend.name} on {device.type}")
        pretended = device.type == "cuda" and not torch.cuda.is_available()
        if not pretended and entry not in request.node.user_properties:
            request.node.user_properties.append(entry)
        return backend

    monkeypatch.setattr(_backends, "choose", recorded)


def pytest_terminal_summary(terminalreporter):
    """Say which backends ran: a backend that silently stopped being tested must show."""
    ran = {}
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == "backend":
                ran[value] = ran.get(value, 0) + 1
    if ran:
        listed = ", ".join(f"{name} ({count} tests)" for name, count in sorted(ran.items()))
        terminalreporter.write_line(f"backends that ran: {listed}; triton in its interpreter")
