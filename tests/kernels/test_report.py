"""The report says what happened, in numbers that can be checked, and warns in plain words."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import ALIKE, SHAPES, TRUNCATED, checkpoints

from r2m_kernels import MergeConfig, analyze, merge, reference

MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]


def reported(experts_scales=(1.0, 1.0, 1.0), config=TRUNCATED, **options):
    base, experts = checkpoints(len(experts_scales), scales=list(experts_scales), **options)
    named = {f"e{i}": expert for i, expert in enumerate(experts)}
    analysis = analyze(base, named, config)
    return base, named, analysis, analysis.report()


def task_matrix(base, experts, names):
    return torch.stack(
        [torch.cat([(e[n].double() - base[n].double()).reshape(-1) for n in names]) for e in experts.values()]
    )


@pytest.mark.parametrize(
    "config", [MergeConfig.weight_average(), MergeConfig.r2m(rank=1.0, row_power=3.0)], ids=["average", "rows"]
)
def test_numbers_of_a_tensor_in_parts_are_those_of_the_whole(config):
    base, experts = checkpoints(2, shapes={"tall": (4099, 640)})  # several panels
    whole, parts = (analyze(base, experts, config, memory_budget=budget).report() for budget in (None, 2**20))
    # Products are the same to the bit; the base's norm is promised to 1e-5.
    found, expected = (one["task_vectors"].pop("relative_to_base") for one in (parts, whole))
    assert found == pytest.approx(expected, rel=1e-5)
    assert parts["task_vectors"] == whole["task_vectors"]


def test_numbers_are_those_of_the_task_vectors():
    base, experts, _, report = reported((0.5, 1.0, 2.0))
    a = task_matrix(base, experts, MATRICES)
    gram = a @ a.T
    assert torch.allclose(torch.tensor(report["task_vectors"]["gram"], dtype=torch.float64), gram, rtol=1e-6)
    assert list(report["task_vectors"]["norms"].values()) == pytest.approx(a.norm(dim=1).tolist(), rel=1e-6)
    cosine = float(gram[0, 2] / (a[0].norm() * a[2].norm()))
    assert report["task_vectors"]["cosines"][0][2] == pytest.approx(cosine, rel=1e-5)
    c = torch.tensor(list(report["core"]["coefficients"].values()), dtype=torch.float64)
    assert report["core"]["norm"] == pytest.approx(float((c @ a).norm()), rel=1e-5)
    assert report["core"]["norm_ratio_to_mean"] == pytest.approx(float((c @ a).norm() / a.mean(0).norm()), rel=1e-5)
    values = torch.linalg.eigvalsh(gram).flip(0)
    assert report["core"]["gap"] == pytest.approx(float(1 - values[1] / values[0]), rel=1e-5)
    assert report["residual"]["norm_ratio_to_core"] == pytest.approx(0.6, rel=1e-6)


def test_kept_energy_is_the_share_that_truncation_kept():
    base, experts, analysis, report = reported()
    rows = {row["name"]: row for row in report["tensors"]}
    mixing = analysis.real_subspace.mixing
    residual = (mixing.T @ task_matrix(base, experts, ["encoder.weight"])).reshape(3, 67, 131)
    values = torch.linalg.svdvals(residual).square()
    assert rows["encoder.weight"]["rank"] == 7
    kept = values[:, :7].sum(1) / values.sum(1)
    assert list(rows["encoder.weight"]["kept_energy"].values()) == pytest.approx(kept.tolist(), rel=1e-3)
    assert rows["encoder.weight"]["uncertain"] == []
    assert rows["class_token"]["kept_energy"] == {"e0": 1.0, "e1": 1.0, "e2": 1.0}
    assert [rows[name]["role"] for name in ("encoder.bias", "norm.running_var", "steps")] == [
        "vector",
        "statistic",
        "copied",
    ]


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        pytest.param(options, backend, marks=pytest.mark.slow if backend == "triton" and options["rank"] < 1 else ())
        for options in ({"rank": 1.0}, {"rank": 0.3}, {"rank": 0.3, "scale": "layer"})
        for backend in ("torch", "native", "triton")
    ],
    ids=str,
)
def test_the_norm_of_residuals_weighted_by_row_is_measured_as_they_are_added(options, backend):
    base, experts = checkpoints(3, scales=[1.0, 1.5, 0.7])
    config = MergeConfig.r2m(eta=0.7, svd="exact", head="merge", **options)
    analysis = analyze(base, experts, config, backend=backend)
    report = analysis.report()
    assert report["residual"]["norm"] is report["core"]["share_of_update"] is None  # not yet
    analysis.merge()
    report = analysis.report()
    # As if nothing were scaled: core and residual term are compared.
    merged, core = (reference.merge(base, experts, rank=options["rank"], eta=eta) for eta in (0.7, 0.0))
    term, length = (
        math.sqrt(sum(float((one[name] - other[name].double()).square().sum()) for name in MATRICES))
        for one, other in ((merged, core), (core, base))
    )
    assert report["residual"]["norm"] == pytest.approx(term, rel=2e-5)
    assert report["residual"]["norm_ratio_to_core"] == pytest.approx(term / length, rel=2e-5)
    assert report["core"]["share_of_update"] == pytest.approx(length**2 / (length**2 + term**2), rel=4e-5)
    other = analysis.report(config.replace(eta=0.6))  # of what was not written nothing is known
    assert other["residual"]["norm"] is None


def test_a_smaller_rank_has_its_own_energies():
    _, _, analysis, report = reported()
    smaller = analysis.report(analysis.config.replace(rank=0.02))
    for row, at_smaller in zip(report["tensors"], smaller["tensors"], strict=True):
        if row["role"] == "matrix" and row["rank"] > 1:
            assert at_smaller["rank"] < row["rank"]
            assert at_smaller["kept_energy"]["e0"] < row["kept_energy"]["e0"]


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("svd", ["randomized", "textbook", "exact"])
def test_the_distance_to_the_optimum_is_estimated_and_says_on_what(backend, svd):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(400, 500)}
    experts = {f"e{i}": {"w": torch.randn(400, 500, generator=generator)} for i in range(2)}
    analysis = analyze(base, experts, TRUNCATED, svd=svd, backend=backend, eta_mode="constant")
    row = analysis.report()["tensors"][0]
    mixing = analysis.real_subspace.mixing
    residual = (mixing.T @ task_matrix(base, experts, ["w"])).reshape(2, 400, 500)
    smallest = torch.linalg.svdvals(residual)[:, 40:].square().sum(1)
    for i, (expert, distance) in enumerate(row["distance_to_optimum"].items()):
        lost = float(residual[i].square().sum()) * (1 - row["kept_energy"][expert])
        truth = math.sqrt(lost / float(smallest[i])) - 1
        assert truth / 3 - 1e-5 <= distance <= 3 * truth + 1e-5
    assert row["distance_basis"].startswith("an exact truncation" if svd == "exact" else "growth of the kept energy")
    # The leading components of another rank are not what the estimate was made for.
    assert analysis.report(analysis.config.replace(rank=0.05))["tensors"][0]["distance_to_optimum"] is None


def test_cancellation_is_flagged_not_hidden():
    # Experts alike to five digits: the residual's energy is a difference of nearly equal numbers.
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(200, 300)}
    common = torch.randn(200, 300, generator=generator)
    experts = {f"e{i}": {"w": common + 1e-5 * torch.randn(200, 300, generator=generator)} for i in range(3)}
    row = analyze(base, experts, TRUNCATED).report()["tensors"][0]
    assert row["uncertain"] == ["e0", "e1", "e2"]


def test_report_is_strict_json_and_says_who_computed_it():
    _, _, _, report = reported(seed=4)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["backend"]["name"] == "native"
    assert "cpu" in report["backend"]["reason"]
    assert set(report["versions"]) == {"r2m_kernels", "torch", "numpy", "python"}
    assert report["config"]["seed"] == 0
    assert [step["step"] for step in report["steps"]] == ["task Gram", "truncation"]
    assert report["steps"][0]["bytes_read"] == 4 * sum(4 * math.prod(shape) for shape in SHAPES.values())
    assert report["warnings"] == []


def test_writing_adds_its_step():
    _, _, analysis, _ = reported()
    analysis.merge()
    assert [step["step"] for step in analysis.report()["steps"]] == ["task Gram", "truncation", "combination"]


def test_without_a_residual_term_nothing_is_claimed_about_it():
    _, _, _, report = reported(config=MergeConfig.weight_average())
    assert report["residual"]["norms"] is None
    assert report["residual"]["eta_used"] == 0
    assert [step["step"] for step in report["steps"]] == ["task Gram"]
    assert report["core"]["norm_ratio_to_mean"] == pytest.approx(1.0)
    assert report["core"]["gap"] is None


def warnings_of(*arguments, **options):
    return "\n".join(reported(*arguments, **options)[3]["warnings"])


def test_one_dominating_specialist_is_named():
    assert "expert 'e2' dominates the core with 9" in warnings_of((1.0, 1.0, 8.0), shared=0.3)


def test_weights_that_swallow_an_expert_are_told():
    text = warnings_of((1.0, 1.0, 1.0), config=TRUNCATED.replace(weights=(1, 1e-6, 0.5)), shared=0.3)
    assert "expert 'e1' has 1.0e-06 of the weight of 'e0': nothing of it is left" in text
    assert "'e2' has" not in text
    assert "of the weight of" not in warnings_of((1.0, 1.0, 1.0), config=TRUNCATED.replace(weights=(100, 1, 1)))


@pytest.mark.parametrize("options", [{}, {"rank": 1.0}, {"rank": 0.1, "row_power": 1.0}], ids=str)
@pytest.mark.parametrize(("weight", "longer"), [(1e3, 30.0), (1e4, 90.0), (1e6, 1.0), (1e6, 900.0), (1e20, 1.0)])
def test_the_heaviest_has_the_most_say_even_where_its_residual_is_rounding(options, weight, longer):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(40, 30, generator=generator)}
    moved = torch.randn(40, 30, generator=generator)
    heavy, light = moved * (torch.arange(30) < 15), longer * moved * (torch.arange(30) >= 15)  # orthogonal
    experts = [{"w": base["w"] + change} for change in (heavy, light)]
    merged = merge(base, experts, MergeConfig.r2m(weights=(weight, 1), **options))
    change = merged["w"].double() - base["w"].double()
    of_heavy, of_light = (float((change * own.double()).sum() / own.double().square().sum()) for own in (heavy, light))
    assert of_heavy == pytest.approx(1, abs=0.02)
    assert abs(of_light) <= 3 / weight + 1e-7
    expected = reference.merge(
        {"w": base["w"].double()}, [{"w": one["w"].double()} for one in experts], weights=(weight, 1), **options
    )
    assert float((expected["w"] - merged["w"]).norm()) <= 2e-5 * float(change.norm())


def test_a_weak_core_and_a_small_gap_are_said():
    assert "the gap after the last eigenvalue kept is small" in warnings_of((1.0, 1.0, 1.0), shared=0.0)
    text = warnings_of((1.0, 1.0, 1.0), config=TRUNCATED.replace(center=True))
    assert "of the mean task vector's length: the specialists share little" in text


def test_an_expert_that_equals_the_base_is_named():
    base, experts = checkpoints(2)
    warnings = analyze(base, {"fs": experts[0], "same": dict(base)}).report()["warnings"]
    assert "expert 'same' equals the base in every matrix tensor: it adds nothing but its weight" in warnings


def test_a_merge_that_is_its_core_says_so():
    base, experts = checkpoints(1)
    report = analyze(base, {"a": experts[0], "b": experts[0]}, TRUNCATED).report()
    assert "no expert has a residual beyond rounding: the merge is its core" in report["warnings"]
    assert report["residual"]["eta_used"] == 0


def test_a_blown_up_residual_is_named():
    config = TRUNCATED.replace(residual="own")
    text = warnings_of((1.0, 1.0, 0.001), config=config, shared=0.3, shapes={"w": (70, 90)})
    assert "the residual of expert 'e2' is scaled up" in text


def test_an_expert_of_another_base_or_with_too_long_an_update_is_named():
    base, experts = checkpoints(2)
    _, (stranger,) = checkpoints(1, seed=7)  # drawn around a base of its own
    warnings = "\n".join(analyze(base, {"fs": experts[0], "fr": experts[1], "lost": stranger}).report()["warnings"])
    assert "the task vector of 'lost' is " in warnings
    assert "times as long as the median one: over-trained, or fine-tuned from another base?" in warnings
    assert "expert 'lost' dominates the core" in warnings
    text = "\n".join(reported((1.0, 1.0, 1.0), shared=0.0)[3]["warnings"])
    assert "nearly nothing in common: was one of them fine-tuned from another base?" in text
    _, _, _, fine = reported((1.0, 1.4, 1.9))
    assert fine["warnings"] == []


def test_an_expert_that_is_there_twice_is_named():
    base, experts = checkpoints(3)
    again = {name: tensor.clone() for name, tensor in experts[0].items()}
    report = analyze(base, {"fs": experts[0], "fr": experts[1], "copy": again}).report()
    (told,) = [warning for warning in report["warnings"] if "the same as" in warning]
    assert told.startswith("expert 'copy' is the same as 'fs' in every matrix tensor")
    near = {name: torch.lerp(base[name], tensor, 1.01) for name, tensor in again.items() if tensor.is_floating_point()}
    near = {**again, **near}
    report = analyze(base, {"fs": experts[0], "fr": experts[1], "near": near}).report()
    assert not [warning for warning in report["warnings"] if "the same as" in warning]


def test_a_base_of_zeros_is_told():
    base, (expert,) = checkpoints(1)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    warnings = analyze(zeros, {"fs": expert}).report()["warnings"]
    assert "the task vector of 'fs' is the whole of it, as all of the base is zero: another base?" in warnings


def related(count=3, far=0.01, shared=0.4):
    """A base and experts ``far`` of its length away."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(60, 50, generator=generator, dtype=torch.float64)}
    common = torch.randn(60, 50, generator=generator, dtype=torch.float64)
    experts = {}
    for j in range(count):
        moved = shared * common + torch.randn(60, 50, generator=generator, dtype=torch.float64)
        experts[f"e{j}"] = {"w": base["w"] + far * (1 + j / 3) * moved * base["w"].norm() / moved.norm()}
    return base, experts


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_how_long_task_vectors_are_beside_the_base(backend):
    base, experts = related()
    report = analyze(base, experts, backend=backend).report()
    found = report["task_vectors"]["relative_to_base"]
    assert list(found.values()) == pytest.approx([0.01, 0.01 * 4 / 3, 0.01 * 5 / 3], rel=1e-5)
    assert not any("of the base's length" in text for text in report["warnings"])
    for far, expected in ((1.0, ["100.00%", "133.33%", "166.67%"]), (5e-4, ["0.05%", "0.07%", "0.08%"])):
        text = analyze(*related(far=far), backend=backend).report()["warnings"]
        lines = [line for line in text if "of the base's length" in line]
        assert [line.split(" has ")[1].split(" ")[0] for line in lines] == expected


def test_what_truncation_cut_and_what_the_core_has_of_the_update():
    base, experts = related()
    analysis = analyze(base, experts, **ALIKE, svd="exact")
    report, mixing = analysis.report(), analysis.real_subspace.mixing
    taus = torch.stack([expert["w"] - base["w"] for expert in experts.values()])
    residuals = torch.einsum("ji,jmn->imn", mixing, taus)
    squares = torch.linalg.svdvals(residuals).square()
    cut = squares[:, 5:].sum(1) / squares.sum(1)
    assert list(report["residual"]["cut"].values()) == pytest.approx(cut.tolist(), rel=1e-6)
    update = torch.as_tensor(analysis.merge()["w"]) - base["w"]
    core = report["core"]["scale_used"] * torch.einsum("j,jmn->mn", analysis.real_subspace.core, taus)
    along = (float((update * core).sum()) / float(core.norm() * update.norm())) ** 2
    assert report["core"]["share_of_update"] == pytest.approx(along, abs=0.05)
    assert report["core"]["left"] is None
    # By rows nobody knows the residual term's length before it is written.
    assert analyze(base, experts).report()["core"]["share_of_update"] is None
    assert analyze(base, experts, eta=0.0).report()["core"]["share_of_update"] == 1.0


def test_a_core_that_cancels_is_told():
    base, experts = related()
    text = analyze(base, experts, rank=1.0, row_power=3.0).report()
    assert any("the core cancels: whole residuals take it away again" in line for line in text["warnings"])
    assert text["core"]["left"] == pytest.approx(text["core"]["scale_used"] - 1)
    assert not any("cancels" in line for line in analyze(base, experts).report()["warnings"])


def test_a_merge_that_is_the_average_or_the_base_is_told():
    base, experts = related()
    options = {"rank": 1.0, "row_power": 0.0, "core_mode": "mean", "norm_match": False}
    average = analyze(base, experts, MergeConfig.r2m(**options)).report()["warnings"]
    assert any("in matrices the merge is weight_average" in line for line in average)
    assert not any("weight_average" in line for line in analyze(base, experts).report()["warnings"])
    mean = torch.stack([expert["w"] - base["w"] for expert in experts.values()]).mean(0)
    by_rows = MergeConfig.r2m_centred(row_power=3.0, eta=0.05, eta_mode="constant")
    for config in (MergeConfig.r2m_centred(), by_rows):
        analysis = analyze(base, experts, config)
        (line,) = [line for line in analysis.report()["warnings"] if "the merge is the base to" in line]
        at_most = float(line.split("at most ")[1].partition("%")[0]) / 100
        assert float((analysis.merge()["w"] - base["w"]).norm() / mean.norm()) <= at_most + 1e-3 < 0.5


def test_residuals_that_cancel_are_not_blown_up():
    base, experts = related(2)
    lengths = [(expert["w"] - base["w"]).norm() for expert in experts.values()]
    experts["e1"]["w"] = base["w"] + (experts["e1"]["w"] - base["w"]) * 1.002 * lengths[0] / lengths[1]
    analysis = analyze(base, experts, TRUNCATED)
    report, strength = analysis.report(), analysis.residuals().strength
    assert strength.cancelled
    assert any("the residuals cancel" in line for line in report["warnings"])
    # No longer than 16 times eta · ‖core‖ over the residuals' mean length.
    norms = list(report["residual"]["norms"].values())
    assert strength.eta <= 16 * 0.6 * strength.core_norm / (sum(norms) / 2) * 1.001
    assert not analyze(*related(), TRUNCATED).residuals().strength.cancelled
