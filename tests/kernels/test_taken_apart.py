"""A merge as a model and adapters: together they are the merge, and of a mean with one it is that expert."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from r2m_kernels import InvalidInput, MergeConfig, analyze
from r2m_kernels.adapters import Adapters, Columns, ranks_within

SHAPES = {"wide.weight": (80, 70), "wide.bias": (80,), "conv.weight": (24, 8, 3, 3), "small.weight": (12, 20)}
NAMES = ("fs", "fr", "efs")


def state(scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def low_rank(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    m, n = shape[0], torch.Size(shape[1:]).numel()
    return (torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator)).view(shape)


@pytest.fixture(scope="module")
def checkpoints() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    base = state(1.0, generator)
    noise = {name: state(0.1, generator) for name in NAMES}
    return base, {name: {key: base[key] + one[key] for key in base} for name, one in noise.items()}


def added(model: dict[str, Tensor], adapters: Adapters, name: str, *experts: str) -> Tensor:
    changes = adapters.changes(name)
    products = [changes[expert].left.double() @ changes[expert].right.double() for expert in experts]
    return model[name].double() + torch.stack(products).sum(0).view(model[name].shape)


CONFIGS = {
    "default": MergeConfig.r2m(rank=0.1),
    "rows": MergeConfig.r2m(rank=0.2, row_power=3.0, weights=(1.0, 2.0, 1.0)),
    "relative": MergeConfig.r2m(rank=5, row_power=0.0, eta_mode="relative", scale="layer"),
    "small ones whole": MergeConfig.r2m(rank=0.2, whole_up_to=16),
    "cart": MergeConfig.cart(rank=0.1, scale=0.5),
    "tsv_m": MergeConfig.tsv_m(),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_model_and_all_changes_are_the_merge(
    config: MergeConfig, checkpoints: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]
) -> None:
    base, experts = checkpoints
    analysis = analyze(base, experts, config)
    merged, adapters = analysis.merge(), analysis.adapters()
    model = adapters.model()
    whole = {"small.weight"} if config.whole_up_to else set()
    assert list(adapters.ranks) == [name for name in SHAPES if name != "wide.bias" and name not in whole]
    for name, expected in merged.items():
        found = added(model, adapters, name, *NAMES) if name in adapters.ranks else model[name].double()
        # 4 ulp of float32, and a millionth of the update.
        bound = 4 * 2**-23 * expected.abs() + 1e-6 * (expected - base[name]).abs().max()
        assert bool(((found - expected).abs() <= bound).all()), name
        assert not (name in adapters.ranks and torch.equal(model[name], expected))


def test_the_mean_with_one_change_is_that_expert() -> None:
    generator = torch.Generator().manual_seed(1)
    base = state(1.0, generator)
    experts = {
        name: {key: tensor + 0.02 * low_rank(tensor.shape, generator) for key, tensor in base.items()} for name in NAMES
    }
    adapters = analyze(base, experts, MergeConfig.cart(rank=6).replace(svd="exact")).adapters()
    model = adapters.model()
    assert set(adapters.ranks.values()) == {6}
    for name in adapters.ranks:
        for expert in NAMES:
            # Four roundings of float32: of the expert, of the mean, of each factor.
            bound = 4 * 2**-23 * (model[name].abs() + base[name].abs()) + 1e-6
            assert bool(((added(model, adapters, name, expert) - experts[expert][name]).abs() <= bound).all())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MergeConfig.weight_average(), "adapters: there are no truncated residuals with eta=0, rank=1.0 and 3 experts"),
        (MergeConfig.r2m(rank=1.0), "adapters: there are no truncated residuals with eta=1, rank=1.0"),
        (MergeConfig.r2m(rank=0.1, scale="column"), "scale: 'column' lengthens the sum of all experts' changes"),
    ],
)
def test_what_has_no_adapters(
    config: MergeConfig, sentence: str, checkpoints: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        analyze(*checkpoints, config).adapters()


def test_one_expert_has_nothing_beyond_the_mean(
    checkpoints: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]],
) -> None:
    base, experts = checkpoints
    with pytest.raises(InvalidInput, match=r"no truncated residuals with eta=1, rank=0\.1 and 1 expert; expected"):
        analyze(base, {"fs": experts["fs"]}, MergeConfig.cart()).adapters()


@pytest.mark.parametrize("seed", range(20))
def test_ranks_within_a_size_keep_what_can_be_kept(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    alike = seed % 2 == 0  # columns of one size each: what is kept is the optimum
    numbers = [5] * 4 if alike else torch.randint(2, 9, (4,), generator=generator).tolist()
    energies = [torch.rand(4, generator=generator).double().sort(descending=True).values for _ in numbers]
    each = [Columns(str(place), *one) for place, one in enumerate(zip(numbers, energies, strict=True))]
    # Else two of them have one rank, as both projections of PyTorch's attention.
    together = [[one] for one in each] if alike else [each[:2], each[2:3], each[3:]]
    costs = [sum(one.numbers for one in group) for group in together]
    worth = [torch.stack([one.energies for one in group]).sum(0).cumsum(0).tolist() for group in together]
    size = int(torch.randint(sum(costs), 5 * sum(costs), (1,), generator=generator))

    def kept(ranks: tuple[int, ...]) -> float:
        return sum(sums[rank - 1] for sums, rank in zip(worth, ranks, strict=True))

    def taken(ranks: tuple[int, ...]) -> int:
        return sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))

    found = ranks_within(size, together)
    assert alike or found["0"] == found["1"]
    ranks = tuple(found[group[0].name] for group in together)
    assert taken(ranks) <= size
    # What is left holds no column more, so that none of a size smaller by one keeps more.
    less, least = 0 if alike else max(costs), (1,) * len(costs)
    every = itertools.product(range(1, 5), repeat=len(costs))
    assert kept(ranks) >= max(kept(one) for one in every if one == least or taken(one) <= size - less) - 1e-12
    assert set(ranks_within(0, together).values()) == {1}


def test_changes_of_fewer_columns_are_the_best(
    checkpoints: tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]],
) -> None:
    adapters = analyze(*checkpoints, MergeConfig.cart(rank=20)).adapters()
    for expert, change in adapters.changes("wide.weight", 3).items():
        assert (change.left.shape, change.right.shape) == ((80, 3), (3, 70))
        left, right = (part.double() for part in adapters.changes("wide.weight")[expert])
        lost = float((change.left.double() @ change.right.double() - left @ right).norm())
        # Factors of float32: the optimum, and four roundings of all.
        assert lost <= float(torch.linalg.svdvals(left @ right)[3:].norm() + 4 * 2**-24 * (left @ right).norm())
    whole, cut = adapters.changes("wide.weight"), adapters.changes("wide.weight", 20)
    assert all(torch.equal(whole[name].left, cut[name].left) for name in NAMES)
    products = [one.left.double() @ one.right.double() for one in whole.values()]
    expected = torch.stack([torch.linalg.svdvals(one)[:7].square() for one in products]).sum(0)
    name, numbers, energies = adapters.columns("wide.weight", 7)
    assert (name, numbers) == ("wide.weight", 150)
    assert torch.allclose(energies, expected, rtol=1e-12)
