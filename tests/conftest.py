"""Shared by all tests: hypothesis profile, torch threads, and a summary of the backends that ran."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

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


DURATIONS = Path(__file__).with_name("durations.json")


def pytest_addoption(parser):
    """``--heavy``: how often; ``--write-durations``: for the order of later runs."""
    parser.addoption("--write-durations", action="store_true", help="write tests/durations.json anew")
    parser.addoption(
        "--heavy",
        choices=NUMBERS,
        default="change",
        help="how often kills and mutated inputs are repeated: as a change lands, or for closing notes",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    """What is heavy is slow, before ``-m`` chooses; what takes long comes first, so that no worker ends with it alone.

    Files stay together, for the sake of what their tests share; inside a file the order is pytest-randomly's, but for
    the long ones.
    """
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.slow)
    yield
    known = json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}
    seconds = Counter(dict.fromkeys({item.path for item in items}, 0.0))
    for file, function in {(item.path, _function(item.nodeid)) for item in items}:
        seconds[file] += known.get(function, 0.0)
    items.sort(key=lambda item: (-seconds[item.path], str(item.path), -known.get(_function(item.nodeid), 0.0)))


def _function(nodeid):
    """A test without its parameters."""
    return nodeid.partition("[")[0]


def pytest_sessionfinish(session):
    """With ``--write-durations``: seconds of all tests that ran, those of a second and more."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not session.config.getoption("--write-durations") or reporter is None:
        return
    seconds = Counter()
    for report in (report for kind in ("passed", "failed", "") for report in reporter.stats.get(kind, ())):
        if hasattr(report, "duration"):
            seconds[_function(report.nodeid)] += report.duration
    known = json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}
    rounded = {name: round(value, 1) for name, value in {**known, **seconds}.items() if value >= 1}
    DURATIONS.write_text(json.dumps(dict(sorted(rounded.items())), indent=0) + "\n")


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
    lose_no_time(monkeypatch.setattr)
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
