"""Shared by all tests: hypothesis profiles and a fixed number of torch threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# No deadline: the machines that run this are shared, and a time is not what these tests are about.
settings.register_profile("r2m", deadline=None, max_examples=25, print_blob=True)
settings.load_profile("r2m")


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Tests run side by side, one thread each; those about threads set their own number, which ends with them."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
