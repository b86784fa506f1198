"""Every method on random checkpoints with random options, on every backend, against the float64 reference.

A case is made from its number alone, so that ``-k "[17]"`` runs it again; a failure says what was drawn.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from cases import StateDict, distance, floating
from torch import Tensor

from r2m_kernels import MergeConfig, merge, reference
from r2m_kernels.config import METHODS, make_config
from r2m_kernels.heads import head_names
from r2m_kernels.reference import checkpoints as parts
from r2m_kernels.reference import others

EXACT = 2e-5  # of the update: the contract's bar where truncation is exact, which is float32's rounding
NEAR = 3e-2  # and where it is randomized
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
R2M = ("r2m", "r2m_paper", "r2m_centred", "r2m_truncated")
# Singular vectors of nothing, which are whatever the solver says, go into their results.
NEED_FULL_RANK = ("tsv_m", "score", "iso_c")


@dataclass
class Case:
    """What is merged.

    Attributes:
        base, experts: the checkpoints.
        drawn: in words, for who reads a failure.
        low_rank: there are matrices beyond what is truncated exactly, whose changes have few directions.
        full_rank: no change of a matrix lacks a direction.
        cancels: changes that weigh the same may add up to rounding, which has a sign of either.
    """

    base: StateDict = field(default_factory=dict)
    experts: list[StateDict] = field(default_factory=list)
    drawn: str = ""
    low_rank: bool = False
    full_rank: bool = True
    cancels: bool = False


def shapes_of(draw: Random, small: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network; a small one has a matrix, and one thing more."""

    def size(most: int = 23) -> int:
        return draw.randint(1, most)

    kinds: list[Callable[[], tuple[int, ...]]] = [
        lambda: (size(), size()),
        lambda: (size(), 1),
        lambda: (1, size(70)),
        lambda: (size(9), size(5), 3, 3),
        lambda: (size(), size(), 1, 1),
        lambda: (size(9), size(5), 3),
        lambda: (size(70),),
        lambda: (),
        lambda: draw.choice([(0,), (0, 4), (3, 0)]),
    ]
    shapes = {"block0.weight": (size(), size())}
    for index in range(1 if small else draw.randint(0, 4)):
        shapes[f"block{index + 1}.weight"] = draw.choice(kinds)()
    if draw.random() < (0.2 if small else 0.4):
        channels = (size(),)
        shapes |= {"norm.bias": channels, "norm.running_mean": channels, "norm.running_var": channels}
    if draw.random() < 0.4:
        shapes |= {"head.weight": (2, 16 + size()), "head.bias": (2,)}
    if draw.random() < (0.2 if small else 0.25):
        shapes["large.weight"] = (draw.randint(66, 90), draw.randint(66, 100))
    return shapes


def drawn_case(number: int, small: bool = False) -> Case:
    draw = Random(f"checkpoints {number}")
    generator = torch.Generator().manual_seed(number)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes, count = shapes_of(draw, small), draw.randint(1, 3 if small else 6)
    dtypes = [draw.choice(DTYPES)] * (count + 1)
    if draw.random() < 0.2:
        dtypes = [draw.choice(DTYPES) for _ in dtypes]
    # Few directions are no few once they are rounded to 16 bits.
    if any(dtype.itemsize < 4 for dtype in dtypes):
        shapes.pop("large.weight", None)
    scales = [draw.choice([1.0, draw.uniform(0.3, 3.0)]) for _ in range(count)]
    shared, far = draw.choice([0.0, 1.0, 3.0]), draw.choice([0.01, 0.1])
    special = draw.choice(["none", "none", "none", "equal", "unchanged", "opposite", "zero row"])

    def change(name: str, shape: Sequence[int]) -> Tensor:
        if name == "large.weight":
            return noise(shape[0], 1) @ noise(1, shape[1]) / 4
        return noise(*shape)

    case = Case({}, [{} for _ in range(count)])
    for name, shape in shapes.items():
        theta = 0.05 * noise(*shape)
        if name.endswith("running_var"):
            theta = theta.abs() + 0.5
        case.base[name] = theta.to(dtypes[0])
        common = shared * change(name, shape)
        for expert, scale, dtype in zip(case.experts, scales, dtypes[1:], strict=True):
            moved = far * 0.5 * scale * (common + change(name, shape))
            if special == "zero row" and shape and shape[0]:
                moved[-1] = 0.0
            expert[name] = (case.base[name].double() + moved).to(dtype)
    first, last = case.experts[0], case.experts[-1]
    for name, tensor in case.base.items():
        if special == "equal":
            last[name] = first[name].clone()
        elif special == "unchanged":
            last[name] = tensor.clone()
        elif special == "opposite" and count == 2:
            last[name] = (2 * tensor.double() - first[name].double()).to(dtypes[-1])
    for steps, state in enumerate([case.base, *case.experts]):
        state["steps"] = torch.tensor(steps)
    case.low_rank = "large.weight" in shapes
    case.full_rank = special == "none" and not case.low_rank
    case.cancels = special == "opposite" or any(dtype.itemsize < 4 for dtype in dtypes)
    types = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    case.drawn = f"{shapes}, {types if len(set(types)) > 1 else types[0]}, {count} experts, {special}"
    return case


def drawn_options(draw: Random, case: Case) -> dict[str, Any]:
    """Of R²M and its kin; few are not the default."""
    names = [name.partition(".")[0] for name in floating(case.base)]

    def some() -> list[str]:
        return [f"{draw.choice(names)}.*"]

    ranks: list[float | int] = [0.15, 8, 1.0] if case.low_rank else [0.1, 0.3, 0.5, 1.0, 1, 2, 5]
    drawn = {
        "rank": draw.choice(ranks),
        "ranks": [[f"{draw.choice(names)}.*", draw.choice(ranks)]],
        "truncate": some(),
        "rank_rounding": "down",
        "real_rank": draw.choice([None, 0, 1, 2, 3]),
        "center": True,
        "residual": draw.choice(["core", "own"]),
        "core_scale": draw.uniform(-0.5, 2.0),
        "core_mode": draw.choice(["mean", "sum", "restored"]),
        "eta": draw.choice([0.0, draw.uniform(0.1, 2.0)]),
        "eta_mode": draw.choice(["relative", "constant", "core_norm", "sum"]),
        "norm_match": draw.random() < 0.5,
        "row_power": draw.choice([0.0, 0.0, 0.5, 1.0, 8.0]),
        "scale": draw.choice(["layer", "column"]),
        "layer_weight": "frobenius",
        "head": draw.choice(["mean", "merge"]),
        "exclude": some(),
        "keep": some(),
        "average": some(),
    }
    options = {name: value for name, value in drawn.items() if draw.random() < 0.25}
    if case.low_rank and options.get("rank_rounding") == "down":
        del options["rank_rounding"]
    # Few of these sides are longer than what the default leaves whole.
    options["whole_up_to"] = draw.choice([0, 0, 5, 16])
    if options.get("eta_mode") == "relative":
        options["row_power"] = 0.0
    elif options.get("row_power"):  # relative is a method's default
        options.setdefault("eta_mode", "constant")
    if "block0.*" in options.get("keep", ()):  # something is to be merged
        del options["keep"]
    return options


def drawn_method(number: int, method: str, case: Case) -> tuple[MergeConfig, Callable[..., dict[str, Tensor]]]:
    """A method's configuration and its definition, a function of base and experts."""
    draw = Random(f"{method} {number}")
    weighted = draw.random() < 0.4 or (method == "ties" and case.cancels)
    weights = tuple(draw.uniform(0.2, 3.0) for _ in case.experts) if weighted else None
    scale, share = draw.uniform(0.2, 1.5), draw.uniform(0.05, 1.0)
    if method in R2M:
        config = METHODS[method].make(**drawn_options(draw, case))
        definition: Callable[..., dict[str, Tensor]] = partial(r2m, config=config)
    elif method in ("weight_average", "mono_soup"):
        config, definition = make_config(method, {}), getattr(others, method)
    elif method in ("ties", "dare"):
        density = draw.choice([share, 1.0])
        config = make_config(method, {"density": density, "scale": scale}).replace(seed=number)
        definition = partial(getattr(others, method), density=density, scale=scale)
        if method == "dare":
            definition = partial(definition, seed=number)
    elif method == "star":
        config, definition = MergeConfig.star(share), partial(others.star, share=share)
    elif method == "swudi":
        options = {"descent_steps": draw.choice([1, 2, 7, 30]), "scale": scale}
        config, definition = make_config(method, options), partial(others.swudi, **options)
    elif method == "cart":
        rank = draw.choice([0.15, 1.0] if case.low_rank else [0.1, share])
        config, definition = MergeConfig.cart(rank, scale), partial(others.cart, rank=rank, scale=scale)
    else:
        config, definition = make_config(method, {"scale": scale}), partial(getattr(others, method), scale=scale)
    svd = draw.choice(["exact", "randomized", "textbook"]) if case.low_rank else "exact"
    return config.replace(weights=weights, svd=svd), partial(definition, weights=weights)


def r2m(
    base: StateDict, experts: Sequence[StateDict], weights: Sequence[float] | None, config: MergeConfig
) -> dict[str, Tensor]:
    """The reference with a configuration's options, and what ``scale`` makes of it."""
    known = inspect.signature(reference.merge).parameters.keys()
    given = {key: getattr(config, key) for key in known if hasattr(config, key)}
    head = head_names({name: tensor.shape for name, tensor in base.items()}) if config.head == "mean" else ()
    merged = reference.merge(base, experts, **{**given, "head": head, "weights": weights})
    if config.scale == "none":
        return merged
    matrices = parts.kinds(base, config.exclude, config.keep, [*config.average, *head]).matrices

    def alone(state: Mapping[str, Tensor]) -> StateDict:
        return {name: state[name] for name in matrices}

    changed = (alone(base), [alone(expert) for expert in experts], alone(merged))
    if config.scale == "layer":
        return merged | others.layers_scaled(*changed, weights)
    w, tau = parts.mean_weights(weights, len(experts)), parts.task_vectors(base, experts, matrices, [])
    balanced = [one / (one.norm() or 1.0) if config.layer_weight == "frobenius" else one for one in tau.values()]
    rows = parts.side_by_side(balanced, len(experts))
    core, _ = reference.real_subspace(rows, w, config.real_rank, config.center)
    return merged | others.columns_scaled(*changed, core)


def check(number: int, backends: Sequence[str], small: bool = False, methods: Sequence[str] = tuple(METHODS)) -> None:
    """All these methods on a case."""
    case = drawn_case(number, small)
    states = [floating(state) for state in (case.base, *case.experts)]
    wide = any(tensor.dtype == torch.float64 for state in states for tensor in state.values())
    size = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in states[0].values()))
    size += sum(distance(states[0], expert) for expert in states[1:])
    rounding = 8 * (2.0**-53 if wide else 2.0**-24) * size
    for method in methods:
        if method in NEED_FULL_RANK and not case.full_rank:
            continue
        config, definition = drawn_method(number, method, case)
        expected = floating(definition(case.base, case.experts))
        stored = {name: tensor.to(case.base[name].dtype) for name, tensor in expected.items()}
        bar = EXACT if config.svd == "exact" else NEAR
        # The bar of the update, the rounding of what is stored, and eight of what it is summed from.
        bound = bar * distance(case.base, expected) + 1.05 * distance(stored, expected) + rounding
        for backend in backends:
            told = f"case {number}, {backend}, {method}: {config}\n{case.drawn}"
            try:
                merged = merge(case.base, case.experts, config, backend=backend)
            except Exception as error:
                raise AssertionError(f"{error!r} in {told}") from error
            assert list(merged) == list(case.base), told
            assert torch.equal(merged["steps"], case.base["steps"]), told
            for name, tensor in floating(case.base).items():
                assert (merged[name].dtype, merged[name].shape) == (tensor.dtype, tensor.shape), f"{name} in {told}"
            error = distance(merged, expected)
            assert error <= bound, f"{error:.2g} > {bound:.2g} of {distance(case.base, expected):.2g} in {told}"


SLOW = pytest.mark.slow
# More of the same.
CASES = [number if number < 50 else pytest.param(number, marks=SLOW) for number in range(500)]
IN_INTERPRETER = [number if number < 5 else pytest.param(number, marks=SLOW) for number in range(50)]


@pytest.mark.filterwarnings("ignore:the method r2m_truncated goes:FutureWarning")
@pytest.mark.parametrize("number", CASES)
def test_every_method_on_a_cpu(number):
    check(number, ("torch", "native"))


@pytest.mark.filterwarnings("ignore:the method r2m_truncated goes:FutureWarning")
@pytest.mark.parametrize("number", IN_INTERPRETER)
def test_every_method_in_tritons_interpreter(number):
    check(number, ("triton",), small=True)
