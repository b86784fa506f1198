"""Derivatives: of combine against differences in float64, and who has none says so."""

from __future__ import annotations

import pytest
import torch
from test_torch_library import arguments

from r2m_kernels import _operators, ops

WITHOUT = [entry.name for entry in _operators.OPERATORS if entry.derivative is None]


def asking(given):
    """The same arguments, of which gradients are wanted."""
    if isinstance(given, torch.Tensor):
        return given.detach().clone().requires_grad_()
    return [asking(one) for one in given] if isinstance(given, (list, tuple)) else given


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.slow)])
def test_combine_against_differences(backend):
    base, experts, *numbers = asking(arguments("combine", (4, 3), torch.float64))

    def merged(base, first, second, *numbers):
        return ops.combine(base, [first, second], *numbers, backend=backend)

    assert torch.autograd.gradcheck(merged, (base, *experts, *numbers))
    assert torch.autograd.gradgradcheck(merged, (base, *experts, *numbers))
    assert torch.autograd.gradcheck(lambda *some: merged(*some, *[None] * 3), (base, *experts, numbers[0]))


def test_gradients_have_the_dtypes_of_what_they_are_of_and_come_compiled():
    given = asking(arguments("combine", (6, 5), torch.bfloat16))
    tensors = [given[0], *given[1], *given[2:]]
    found = torch.autograd.grad(ops.combine(*given).float().square().sum(), tensors)
    assert [one.dtype for one in found] == [one.dtype for one in tensors]
    assert [one.shape for one in found] == [one.shape for one in tensors]
    compiled = torch.compile(ops.combine, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(*given).float().square().sum(), tensors)
    assert all(map(torch.equal, found, again))


def test_only_what_is_asked_for():
    base, experts, core, *_ = arguments("combine", (6, 5))
    core.requires_grad_()
    ops.combine(base, experts, core, backend="torch").sum().backward()
    exact = torch.stack([(one.double() - base.double()).sum() for one in experts])
    assert torch.allclose(core.grad, exact, rtol=1e-5)
    assert base.grad is None


@pytest.mark.parametrize("name", WITHOUT)
def test_who_has_no_derivative_says_so(name):
    given, call = arguments(name), _operators.CALLS[name]
    if name.endswith(".out"):
        sentence = f"^{name[:-4]} with out= has no derivative: detach its inputs, or call it under torch.no_grad"
        with pytest.raises(NotImplementedError, match=sentence):
            call(given[0].requires_grad_(), *given[1:])
        with torch.no_grad():
            call(*given)
        return
    first = given[0][0] if name == "task_gram" else given[0]
    first.requires_grad_()
    found = call(*given)
    assert found.requires_grad
    with pytest.raises(NotImplementedError, match=f"^{name} has no derivative: detach its inputs, or call it under"):
        found.sum().backward()
