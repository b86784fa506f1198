"""Of the kernel's repository: what `kernel-builder` runs for a change."""

import pytest
import torch

import r2m_kernels


@pytest.mark.kernels_ci
def test_a_merge_of_equal_experts_is_the_expert():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = {"w": torch.zeros(64, 96, device=device)}
    expert = {"w": torch.ones(64, 96, device=device)}
    merged = r2m_kernels.merge(base, {"a": expert, "b": expert})
    assert torch.allclose(merged["w"], expert["w"])


@pytest.mark.kernels_ci
def test_gram():
    base, experts = torch.zeros(8, 16), [torch.ones(8, 16), -torch.ones(8, 16)]
    assert r2m_kernels.ops.task_gram([base], [[expert] for expert in experts]).tolist() == [[[128, -128], [-128, 128]]]
