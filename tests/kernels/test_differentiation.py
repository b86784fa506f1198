"""Merges by numbers that are learned: the bits of a merge, derivatives against differences, or a sentence."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import same_bits
from torch import nn

from r2m_kernels import InvalidInput, MergeConfig, Numbers, analyze, merge

TRUNCATED = MergeConfig.r2m(whole_up_to=0, rank=0.5)
CONFIGS = {
    "truncated, by rows": TRUNCATED,
    "truncated": TRUNCATED.replace(row_power=0),
    "truncated, relative eta": TRUNCATED.replace(row_power=0, eta_mode="relative"),
    "whole, by rows": MergeConfig.r2m(rank=1.0),
    "whole": MergeConfig.r2m(rank=1.0, row_power=0, scale="layer"),
    "whole, by rows of a small power": MergeConfig.r2m_paper(row_power=0.5),
}


def checkpoints(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 4), "vector": (5,), "conv": (2, 3, 2)}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    experts = [
        {name: one + (0.1 * torch.randn(one.shape, generator=generator)).to(dtype) for name, one in base.items()}
        for _ in range(3)
    ]
    experts[1]["matrix"][2] = base["matrix"][2]  # a row that somebody did not change
    base["steps"] = torch.tensor(3)
    return base, [{**one, "steps": torch.tensor(5)} for one in experts]


def numbers_of(analysis):
    """Those with which an analysis merges, and that have derivatives in it, asking for gradients."""
    config, whole = analysis.config, not any(tensor.truncated for tensor in analysis.plan.tensors)
    scales = None if config.eta_mode == "relative" else analysis.residuals().scales
    found = (*torch.tensor([config.core_scale, config.eta], dtype=torch.float64), scales)
    numbers = Numbers(*found, analysis.real_subspace.mixing if whole else None)
    return numbers._make(None if one is None else one.double().clone().requires_grad_() for one in numbers)


def merged_by(analysis, numbers):
    """A function of the numbers that are there, to differentiate."""
    given = [one for one in numbers if one is not None]

    def function(*some):
        rest = iter(some)
        others = Numbers(*(None if one is None else next(rest) for one in numbers))
        merged = analysis.merge(differentiable=True, numbers=others)
        return tuple(one for one in merged.values() if one.is_floating_point())

    return function, given


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.slow)])
def test_against_differences(config, backend):
    analysis = analyze(*checkpoints(), config, backend=backend)
    function, given = merged_by(analysis, numbers_of(analysis))
    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *itertools.product(["torch", "native"], [torch.float32, torch.bfloat16]),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("config", [*CONFIGS.values(), MergeConfig.weight_average()])
def test_the_bits_of_the_merge(backend, dtype, config):
    analysis = analyze(*checkpoints(dtype), config, backend=backend)
    numbers = numbers_of(analysis) if config.eta else Numbers(torch.ones(1, requires_grad=True))
    merged = analysis.merge(differentiable=True, numbers=numbers)
    assert same_bits(merged, analysis.merge())
    assert all(one.requires_grad == one.is_floating_point() for one in merged.values())
    sum(one.double().square().sum() for one in merged.values()).backward()
    assert all(one.grad.isfinite().all() and one.grad.any() for one in numbers if one is not None)
    assert not any(one.requires_grad for one in analysis.merge(numbers=numbers).values())


def test_what_was_learned_is_an_option():
    base, experts = checkpoints()
    eta = torch.tensor(0.25, requires_grad=True)
    learned = merge(base, experts, TRUNCATED, differentiable=True, numbers=Numbers(eta=eta))
    assert same_bits(learned, merge(base, experts, TRUNCATED, eta=0.25))


def test_tied_tensors_stay_one_and_empty_ones_pass():
    base, experts = checkpoints()
    for one in (base, *experts):
        one["tied"], one["nothing"] = one["matrix"], torch.empty(0, 3)
    merged = merge(base, experts, differentiable=True, numbers=Numbers(core_scale=torch.ones((), requires_grad=True)))
    assert merged["tied"] is merged["matrix"]
    assert list(merged) == list(base)
    assert merged["nothing"].shape == (0, 3)


def test_values_beyond_the_dtype_are_told():
    base, experts = checkpoints(torch.float16)
    with pytest.raises(InvalidInput, match=r"^tensor '.*': merged values exceed the range of float16"):
        merge(base, experts, TRUNCATED, differentiable=True, numbers=Numbers(1e7 * ONE))


def step(numbers, loss, rate=3.0):
    """Down the gradient; an optimizer of torch's would do it, and its import takes seconds."""
    learned = [one for one in numbers if one is not None]
    moved = zip(learned, torch.autograd.grad(loss, learned), strict=True)
    return Numbers(*((one.detach() - rate * grad).requires_grad_() for one, grad in moved))


def test_eta_and_core_scale_are_learned_by_entropy():
    torch.manual_seed(0)
    detector = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 2))
    base = detector.state_dict()
    experts = [{name: one + 0.3 * torch.randn_like(one) for name, one in base.items()} for _ in range(2)]
    analysis, pictures = analyze(base, experts, rank=0.5), torch.rand(64, 3, 4, 4)
    numbers = Numbers(torch.tensor(1.0, requires_grad=True), torch.tensor(0.5, requires_grad=True))
    found = []
    for _ in range(6):
        merged = analysis.merge(differentiable=True, numbers=numbers)
        outputs = torch.func.functional_call(detector, merged, (pictures,))
        entropy = torch.distributions.Categorical(logits=outputs).entropy().mean()
        numbers = step(numbers, entropy)
        found.append(float(entropy.detach()))
    assert all(later < former for former, later in itertools.pairwise(found))
    assert found[-1] < 0.95 * found[0]


ONE = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("config", "numbers", "sentence"),
    [
        (TRUNCATED, None, "^differentiable: expected numbers to differentiate by, such as numbers=.*, got none$"),
        (MergeConfig.ties(), Numbers(ONE), "^elementwise: expected 'none' where numbers are given, .*, got 'ties'$"),
        (TRUNCATED.replace(scale="column"), Numbers(ONE), "^scale: expected 'none' where numbers .*, got 'column'$"),
        (MergeConfig.iso_c(), Numbers(ONE), "^core_spectrum: expected 'keep' where numbers .*, got 'flat'$"),
        (MergeConfig.weight_average(), Numbers(eta=ONE), "^eta: 0 leaves no residuals to learn anything of"),
        (TRUNCATED, Numbers(eta=0 * ONE), "^eta: at 0 residuals are left out, and it has no derivative"),
        (TRUNCATED, Numbers(eta=0.5), "^eta: expected a tensor, got float$"),
        (TRUNCATED, {"eta": ONE}, "^numbers: expected r2m_kernels.Numbers, got dict$"),
        (TRUNCATED, Numbers(eta=ONE / 0), "^eta: expected finite numbers, got NaN or Inf$"),
        (TRUNCATED, Numbers(scales=ONE), r"^scales: expected shape \(3,\), got \(\)$"),
        (
            TRUNCATED,
            Numbers(mixing=torch.eye(3)),
            "^mixing: truncation has no derivative, and tensor 'matrix' is cut to rank 2; expected rank=1.0",
        ),
        (CONFIGS["truncated, relative eta"], Numbers(scales=torch.ones(3)), "^scales: a relative eta depends on them"),
    ],
)
def test_what_has_no_derivative_says_so(config, numbers, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        merge(*checkpoints(), config, differentiable=True, numbers=numbers)


def test_gradients_of_inputs_are_refused_not_dropped():
    base, experts = checkpoints()
    experts[1]["vector"].requires_grad_()
    numbers = Numbers(ONE)
    with pytest.raises(InvalidInput, match=r"^expert 'expert1': tensor 'vector' requires gradients, and a merge"):
        merge(base, experts, differentiable=True, numbers=numbers)
    with pytest.raises(InvalidInput, match=r"^dtype: a merge by numbers has the base's dtypes; expected none, got"):
        merge(base, experts, numbers=numbers, dtype="bfloat16")
