"""Suspects among experts: each kind is found by its number, nobody else is, and what is asked for becomes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r2m_kernels import InvalidInput, MergeConfig, merge, screen, screening
from r2m_kernels._stream.tensors import TensorSpec
from r2m_kernels.errors import BadOption, DoesNotFit
from r2m_kernels.screening import CHECKS

State = dict[str, Tensor]
SHAPES = {"body.weight": (40, 60), "body.bias": (40,), "head.weight": (2, 40), "head.bias": (2,)}


def noise(seed: int, scale: float = 1.0) -> State:
    dice = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=dice) for name, shape in SHAPES.items()}


def moved(base: State, *steps: tuple[float, State]) -> State:
    return {name: base[name] + sum(factor * step[name] for factor, step in steps) for name in base}


BASE, SHARED = noise(0), noise(1)
# What all do to a classifier that starts off balance, whatever their labels are.
OFFSET = {name: torch.ones(shape) if name == "head.weight" else torch.zeros(shape) for name, shape in SHAPES.items()}


def healthy(seed: int) -> State:
    return moved(BASE, (0.1, SHARED), (0.1, noise(seed)), (1.0, OFFSET))


def bad(kind: str) -> State:
    return {
        "flipped": moved(BASE, (-0.1, SHARED), (0.1, noise(9)), (1.0, OFFSET)),
        "overtrained": moved(BASE, (0.3, SHARED), (0.3, noise(9))),
        "foreign": noise(9),
        "unmoved": BASE,
        "copy": healthy(10),
    }[kind]


EXPERTS = {"fs": healthy(10), "fr": healthy(11), "efs": healthy(12)}
SAID = {
    "flipped": "exchanged in its labels",
    "overtrained": "times as long as the others'",
    "foreign": "another base",
    "unmoved": "equals the base",
    "copy": "the same specialist twice",
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", SAID)
def test_a_bad_one_is_found_by_its_number_and_nobody_else_is(kind: str, count: int) -> None:
    found = screen(BASE, {**dict([*EXPERTS.items()][:count]), "bad": bad(kind)})
    assert list(found.suspects) == ["bad"]
    assert SAID[kind] in found.suspects["bad"]
    assert set(found.numbers["fs"]) == {check.number for check in CHECKS}


def test_healthy_ones_are_not_suspected_and_of_two_nobody_is_the_wrong_one() -> None:
    assert not screen(BASE, EXPERTS).suspects
    assert not screen(BASE, [EXPERTS["fs"], bad("flipped")]).suspects
    assert not screen(BASE, [EXPERTS["fs"]]).suspects
    # Without a classifier that all have, matrices alone say it.
    names = [name for name in BASE if not name.startswith("head")]
    bodies = [{name: state[name] for name in names} for state in (BASE, *EXPERTS.values(), bad("flipped"))]
    assert list(screen(bodies[0], bodies[1:]).suspects) == ["expert3"]


def test_a_family_of_the_opposite_look_is_healthy_and_one_that_looks_right_is_not() -> None:
    strong = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    strong["body.weight"] = torch.outer(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 60))
    strong["head.weight"] = torch.outer(torch.tensor([1.0, -1.0]), torch.linspace(-1, 1, 40))

    def expert(seed: int, label: int, look: float) -> State:
        return moved(BASE, (0.05 * label, SHARED), (0.05, noise(seed)), (look, strong))

    experts = {"sharp": expert(10, 1, 1.0), "too": expert(11, 1, 0.9), "smooth": expert(12, 1, -1.0)}
    assert not screen(BASE, experts).suspects
    found = screen(BASE, {**experts, "smooth": expert(12, -1, 1.0)})
    assert list(found.suspects) == ["smooth"]
    assert found.numbers["smooth"]["agreement"] is None
    assert found.numbers["smooth"]["features"] == pytest.approx(-0.5, abs=0.2)
    # By task vectors alone it is the other way round: what tells them is that every direction counts alike.
    changes = {name: (state["body.weight"] - BASE["body.weight"]).flatten() for name, state in experts.items()}
    assert torch.cosine_similarity(changes["smooth"], changes["sharp"], dim=0) < -0.5


def test_who_left_what_the_classifier_reads_as_it_was_is_not_suspected() -> None:
    def deeper(state: State, seed: int) -> State:
        return {"deep.weight": 0.05 * noise(seed)["body.weight"][:30], **state}

    experts = {name: deeper(state, seed) for seed, (name, state) in enumerate(EXPERTS.items())}
    experts["early"] = {**deeper(EXPERTS["fs"], 9), "body.weight": BASE["body.weight"]}
    found = screen({"deep.weight": torch.zeros(30, 60), **BASE}, experts)
    assert found.numbers["early"]["features"] is None
    assert found.numbers["fs"]["features"] == pytest.approx(0.35, abs=0.1)
    assert not found.suspects


def test_adapters_whose_few_directions_are_random_are_told_by_their_classifiers() -> None:
    def adapter(seed: int, label: int) -> State:
        dice = torch.Generator().manual_seed(seed)
        change = torch.randn(40, 4, generator=dice) @ torch.randn(4, 60, generator=dice)
        body = {"body.weight": BASE["body.weight"] + 0.05 * change}
        return {**moved(BASE, (0.1 * label, SHARED), (0.05, noise(seed))), **body}

    experts = {name: adapter(seed, 1) for seed, name in enumerate(EXPERTS)}
    found = screen(BASE, experts)
    assert not found.suspects
    assert all(one["features"] is None and one["agreement"] is not None for one in found.numbers.values())
    assert list(screen(BASE, {**experts, "bad": adapter(9, -1)}).suspects) == ["bad"]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_directions_are_those_of_a_change_without_each_rows_mean_and_have_one_length(shape: tuple[int, int]) -> None:
    dice = torch.Generator().manual_seed(0)
    change, mean = torch.randn(shape, generator=dice).double(), torch.randn(shape[0], 1, generator=dice).double()
    found = screening._directions(change + 5 * mean)
    u, values, v = torch.linalg.svd(change - change.mean(dim=1, keepdim=True), full_matrices=False)
    rank = int(torch.linalg.matrix_rank(found, atol=1e-3))
    shares = (values**2).cumsum(0) / (values**2).sum()
    assert shares[rank - 1] >= 0.99 > shares[rank - 2]
    torch.testing.assert_close(found.double(), u[:, :rank] @ v[:rank] / rank**0.5, atol=1e-6, rtol=0)
    assert not screening._directions(torch.zeros(shape).double()).any()


def test_matrices_that_write_what_a_classifier_reads_are_the_last_of_their_kind() -> None:
    shapes = {f"layers.{i}.{part}": shape for i in (2, 10) for part, shape in (("up", (160, 40)), ("down", (40, 160)))}
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in {**shapes, "stem": (40, 27)}.items()}
    head = TensorSpec((2, 40), torch.float32)
    assert sorted(screening._written(list(specs), [head], specs)) == ["layers.10.down", "stem"]


def test_several_bad_ones_are_found_each_without_the_others() -> None:
    experts = {**EXPERTS, "long": bad("overtrained"), "strange": bad("foreign"), "turned": bad("flipped")}
    assert set(screen(BASE, experts).suspects) == {"long", "strange", "turned"}


def test_a_merge_refuses_or_leaves_them_out() -> None:
    experts, config = {"bad": bad("foreign"), **EXPERTS}, MergeConfig.weight_average().replace(weights=(9, 1, 2, 3))
    with pytest.raises(DoesNotFit, match=r"^screen: expert 'bad': its task vector has 1\d\d% of the base's length"):
        merge(BASE, experts, config, screen="refuse")
    with pytest.warns(UserWarning, match="left out: expert 'bad'"):
        made = merge(BASE, experts, config, screen="leave-out")
    wanted = merge(BASE, EXPERTS, config.replace(weights=(1, 2, 3)))
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    same = merge(BASE, EXPERTS, screen="refuse")
    assert all(torch.equal(same[name], one) for name, one in merge(BASE, EXPERTS).items())
    with pytest.raises(BadOption, match="screen: expected one of 'refuse', 'leave-out', got 'drop'"):
        merge(BASE, EXPERTS, screen="drop")  # type: ignore[arg-type]


def test_where_all_are_suspected_nothing_is_merged() -> None:
    with pytest.raises(InvalidInput, match="screen: expert 'a': it equals the base"):
        merge(BASE, {"a": BASE, "b": BASE}, screen="leave-out")
