"""What the quality benchmark compares, held to what its formulas imply: extremes, identities, optimality."""

from __future__ import annotations

import math
import pickle
from functools import partial

import pytest
import torch
from cases import checkpoints, distance

from bench.quality import ideas, methods, protocol, trials
from bench.quality.competitors import cleaned, dc_merge, larv, monosoup, resmerge
from bench.quality.decorrelated import compressed_ensemble, core_at_full_length, decorrelated, mean_of, tsv_m_by_core
from bench.quality.parts import Parts, together
from r2m_kernels import MergeConfig, merge

SHAPES = {"wide": (8, 21), "tall.weight": (12, 2, 3, 3), "bias": (8,), "norm.running_var": (8,), "head.weight": (2, 12)}
AVERAGE = MergeConfig.weight_average()
EXACT = 1e-9  # in float64, relative to the update: eigenvalues of what is squared


@pytest.fixture(scope="module")
def trained():
    """Base and three experts of different lengths, in float64."""
    base, experts = checkpoints(3, dtype=torch.float64, shapes=SHAPES, seed=3, scales=[1.0, 1.4, 0.8])
    return tuple([{name: state[name] for name in SHAPES} for state in states] for states in ([base], experts))


def apart(trained, one, other):
    (base,), _ = trained
    return distance(one, other) / distance(base, other)


def test_classifier_and_statistics_are_means_and_a_kernel_is_a_matrix(trained):
    (base,), experts = trained
    parts = Parts.of(base, experts)
    assert {name: tuple(tau.shape) for name, tau in parts.tau.items()} == {
        "wide": (3, 8, 21),
        "tall.weight": (3, 12, 18),
    }
    assert set(parts.vectors) == {"bias"}
    made = dc_merge(base, experts, scale=2.0)
    average = merge(base, experts, AVERAGE)
    for name in ("head.weight", "norm.running_var"):
        assert torch.allclose(made[name], average[name], rtol=0, atol=1e-14)
    assert torch.allclose(made["bias"] - base["bias"], 2 * (average["bias"] - base["bias"]))
    assert [(name, tensor.dtype, tensor.shape) for name, tensor in made.items()] == [
        (name, tensor.dtype, tensor.shape) for name, tensor in base.items()
    ]


def test_the_core_is_the_packages(trained):
    (base,), experts = trained
    parts = Parts.of(base, experts)
    config = methods.A.replace(eta=0.0)
    changes = {name: parts.gain**0.5 * torch.tensordot(parts.core, tau, 1) for name, tau in parts.tau.items()}
    assert apart(trained, parts.merged(changes, parts.gain**0.5), merge(base, experts, config)) < EXACT
    longer = core_at_full_length(base, experts, config=config)
    assert apart(trained, longer, merge(base, experts, config.replace(core_mode="mean", core_scale=parts.gain))) < EXACT


def test_monosoup_weighs_high_and_low_parts(trained):
    (base,), _ = trained
    turn, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    values = torch.tensor([4.0, 2.0, 1.0, 0.5] + [0.0] * 4, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(21, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    expert = {**base, "wide": base["wide"] + turn * values @ basis.T}
    found = turn.T @ (cleaned(base, expert)["wide"] - base["wide"]) @ basis
    # e^entropy of 8/15, 4/15, 2/15, 1/15 is 3.05: all four. With 90 % of the energy two are high.
    assert torch.allclose(found, torch.diag(values), atol=1e-10)
    found = turn.T @ (cleaned(base, expert, energy=0.9)["wide"] - base["wide"]) @ basis
    low = 1 / 16 + (15 / 16) * math.sqrt(1.25 / 21.25)
    expected = values * torch.tensor([1 - low, 1 - low, low, low] + [0.0] * 4, dtype=torch.float64)
    assert torch.allclose(found, torch.diag(expected), atol=1e-10)
    untouched = [name for name in base if torch.equal(cleaned(base, expert)[name], expert[name])]
    assert untouched == [name for name in base if name != "wide"]


def test_monosoup_is_the_packages_without_a_threshold(trained):
    (base,), experts = trained
    theirs = MergeConfig.mono_soup().replace(head="mean")
    ours = monosoup(base, experts, then=AVERAGE.replace(head="mean"))
    # The package has singular vectors from a Gram matrix, which has a singular value to √ε = 1.5e-8 of the largest.
    assert apart(trained, ours, merge(base, experts, theirs)) < 1e-7


def test_monosoup_of_what_did_not_change_is_it(trained):
    (base,), _ = trained
    assert distance(monosoup(base, [base, base]), base) == 0


def test_larv_scales_by_thirds_before_the_merge(trained):
    (base,), experts = trained
    config = methods.A.replace(svd="exact")
    assert apart(trained, larv(base, experts, then=config, tiers=0.0), merge(base, experts, config)) < EXACT
    # With two layers the scores' thirds are the smaller and the larger one.
    alone = larv(base, experts[:1], then=AVERAGE, tiers=0.25)
    factors = [float((alone[name] - base[name]).norm() / (experts[0][name] - base[name]).norm()) for name in SHAPES]
    assert sorted(factors[:2]) == pytest.approx([0.75, 1.25])
    assert factors[2:] == pytest.approx([1.0] * 3)
    # Of two layers alike in everything the later one is longer.
    twice, again = ({"first": state["wide"], "second": state["wide"]} for state in (base, experts[0]))
    smooth = larv(twice, [again], then=AVERAGE)
    first, second = (float((smooth[n] - twice[n]).norm() / (again[n] - twice[n]).norm()) for n in twice)
    assert 0.5 <= first < second <= 1.5


def test_resmerge_of_equal_experts_is_their_residual_and_a_share_of_their_first_component(trained):
    (base,), experts = trained
    made = resmerge(base, [experts[0]] * 3, budget=0.3)["wide"] - base["wide"]
    u, values, vh = torch.linalg.svd(experts[0]["wide"] - base["wide"], full_matrices=False)
    kept = values.clone()
    kept[0] = 0.3 * values[1:].norm()
    assert torch.allclose(made, u * kept @ vh, atol=1e-10)


def test_resmerge_lengthens_what_coheres(trained):
    (base,), _ = trained
    first, along, across = torch.zeros(3, 8, 21, dtype=torch.float64)
    first[0, 0], along[1, 1], across[2, 2] = 9.0, 1.0, 1.0

    def residual(cosine):
        """Of two experts with one first component and residuals of length 1 and 2 at that cosine."""
        other = 2 * (cosine * along + (1 - cosine**2) ** 0.5 * across)
        experts = [{**base, "wide": base["wide"] + first + rest} for rest in (along, other)]
        return resmerge(base, experts, budget=0.0)["wide"] - base["wide"], other

    # Their mean direction has a cosine of .894 to each: β = 1 − .3 · ((1 + .6) / 2 + (1 + .894) / 2) / 2 = .738.
    made, other = residual(0.6)
    direction = (along + other / 2) / (along + other / 2).norm()
    assert torch.allclose(made, direction * 1.5 * 0.8944272**0.7379179, atol=1e-6)
    # Cosines of .447 are below 1/√2: the plain mean.
    made, other = residual(-0.6)
    assert torch.allclose(made, (along + other) / 2, atol=1e-12)


def test_dc_merge_keeps_own_blocks(trained):
    (base,), experts = trained
    one = dc_merge(base, experts[:1], smooth=False)["wide"]  # alone it keeps everything
    assert torch.allclose(one, experts[0]["wide"], atol=1e-12)
    flat = torch.linalg.svdvals(dc_merge(base, experts[:1])["wide"] - base["wide"])
    assert torch.allclose(
        flat,
        torch.full((8,), float(torch.linalg.svdvals(experts[0]["wide"] - base["wide"]).mean()), dtype=torch.float64),
    )
    u, _, vh = torch.linalg.svd(Parts.of(base, experts).tau["wide"], full_matrices=False)
    left, right = together(u[..., :2]), together(vh.mT[..., :2])
    for elect in (False, True):
        made = left.T @ (dc_merge(base, experts, elect=elect)["wide"] - base["wide"]) @ right
        own = torch.block_diag(*[torch.ones(2, 2)] * 3) > 0
        assert made[~own].abs().max() < 1e-12 < made[own].abs().min()


def test_what_is_outside_is_orthogonal_to_every_task_vector(trained):
    (base,), experts = trained
    parts = Parts.of(base, experts)
    for by_tensor in (False, True):
        plain, more = (
            decorrelated(base, experts, core=0.0, residual="none", outside=outside, by_tensor=by_tensor)
            for outside in (0.0, 1.0)
        )
        inner = torch.stack(
            [(tau * (more[name] - plain[name]).reshape(tau.shape[1:])).sum((1, 2)) for name, tau in parts.tau.items()]
        )
        inner = inner if by_tensor else inner.sum(0)
        assert inner.abs().max() < EXACT * parts.gram.trace()
        assert distance(plain, more) > 0.1 * distance(base, merge(base, experts, AVERAGE))


def test_the_decorrelated_rule_is_its_formula(trained):
    (base,), experts = trained
    tsv, average = merge(base, experts, MergeConfig.tsv_m().replace(svd="exact")), merge(base, experts, AVERAGE)
    parts = Parts.of(base, experts)
    flat = torch.cat([tau.flatten(1) for tau in parts.tau.values()], 1)
    d, mean = (torch.cat([(state[name] - base[name]).flatten() for name in parts.tau]) for state in (tsv, average))
    _, _, vh = torch.linalg.svd(flat, full_matrices=False)
    core = vh[0] * (vh[0] @ mean)
    stretch = flat.norm(dim=1).mean() / mean.norm()
    outside = d - vh.T @ (vh @ d)
    expected = 1.2 * stretch * core + (mean - core) + 1.5 * outside
    made = decorrelated(base, experts)
    found = torch.cat([(made[name] - base[name]).flatten() for name in parts.tau])
    assert float((found - expected).norm() / expected.norm()) < 1e-7
    matched = decorrelated(base, experts, residual="matched")
    ours = merge(base, experts, methods.A.replace(core_scale=0.0))
    for name in parts.tau:
        twice = (made[name] - matched[name]).flatten() + 2 * (ours[name] - base[name]).flatten()
        assert torch.allclose(
            twice,
            (mean - core).split([t[0].numel() for t in parts.tau.values()])[list(parts.tau).index(name)],
            atol=1e-7,
        )


def test_weights_of_decorrelated_experts(trained):
    (base,), experts = trained
    even = tsv_m_by_core(base, experts, scale=0.9, power=0.0)
    tsv = merge(base, experts, MergeConfig.tsv_m(0.9).replace(svd="exact"))
    names = [name for name in SHAPES if "head" not in name]  # which the package's method merges like the rest
    assert (
        apart(
            trained,
            {n: even[n] for n in names} | {"head.weight": base["head.weight"]},
            {n: tsv[n] for n in names} | {"head.weight": base["head.weight"]},
        )
        < 1e-7
    )
    assert apart(trained, even, tsv_m_by_core(base, experts, scale=0.9, power=1.0)) > 0.01


def test_a_compressed_ensemble_at_full_rank_is_the_specialists(trained):
    (base,), experts = trained
    for made, expert in zip(compressed_ensemble(base, experts, rank=1.0), experts, strict=True):
        assert distance(made, expert) < EXACT * distance(base, expert)
    shared = compressed_ensemble(base, experts, rank=0.0, own_vectors=False)
    average = merge(base, experts, AVERAGE)
    assert all(torch.allclose(made["bias"], average["bias"], atol=1e-14) for made in shared)
    assert all(torch.linalg.matrix_rank(made["wide"] - average["wide"], rtol=1e-9) == 1 for made in shared)


def test_what_the_protocol_called_small_whole_is_an_option():
    chosen = methods.CHOSEN
    (meant,) = (words for words in methods.words_of(chosen) if words != methods.key(chosen))
    assert meant == protocol.read()["candidates"]["R2M by rows, rank .4, small matrices whole"]
    # By names, as that rule did it, and by the option.
    shapes = {"first": (8, 16), "second": (20, 16), "third": (24, 18)}
    base, experts = checkpoints(3, dtype=torch.float64, shapes=shapes, seed=3)
    by_name = chosen.replace(whole_up_to=0, ranks=(("first", 1.0), ("second", 1.0)))
    made = merge(base, experts, chosen)
    assert distance(made, merge(base, experts, by_name)) == 0
    assert distance(made, merge(base, experts, chosen.replace(whole_up_to=0))) > 0


def test_the_mean_of_merges(trained):
    (base,), experts = trained
    half = mean_of(base, experts, configs=(AVERAGE, AVERAGE.replace(core_scale=2.0)))
    assert apart(trained, half, merge(base, experts, AVERAGE.replace(core_scale=1.5))) < EXACT


def test_candidates_cross_processes_and_are_told_apart():
    every = [one for method in methods.all_methods() for one in method.candidates.values()]
    for candidate in every:
        assert methods.key(pickle.loads(pickle.dumps(candidate))) == methods.key(candidate)
    for method in methods.all_methods():
        keys = list(map(methods.key, method.candidates.values()))
        assert len(set(keys)) == len(keys)
    names = [method.name for method in methods.all_methods()]
    assert len(set(names)) == len(names)
    assert methods.key(partial(resmerge, scale=1.2)) == "resmerge(scale=1.2)"
    assert methods.key(methods.A.replace(rank=0.2)) == "MergeConfig(rank=0.2)"


def test_every_candidate_makes_detectors_that_load(trained):
    (base,), experts = trained
    for method in methods.all_methods():
        for candidate in method.candidates.values():
            for state in methods.merged(candidate, base, experts):
                assert [(n, t.shape, t.dtype) for n, t in state.items()] == [
                    (n, t.shape, t.dtype) for n, t in base.items()
                ]
                assert all(bool(tensor.isfinite().all()) for tensor in state.values()), (
                    method.name,
                    methods.key(candidate),
                )


def test_what_no_expert_changed_stays(trained):
    (base,), experts = trained
    frozen = [{**expert, "wide": base["wide"]} for expert in experts]
    for method in methods.all_methods():
        candidate = next(iter(method.candidates.values()))
        for state in [] if isinstance(candidate, MergeConfig) else methods.merged(candidate, base, frozen):
            assert torch.allclose(state["wide"], base["wide"], atol=1e-14), method.name


def test_ideas_start_from_the_first_candidate(trained):
    (base,), experts = trained
    expected = merge(base, experts, methods.A.replace(svd="exact"))
    assert apart(trained, ideas.default(base, experts), expected) < EXACT
    rows = ideas.core_towards(base, experts, steps=None, rank=0.4, row_power=3.0)
    config = methods.A.replace(svd="exact", rank=0.4, row_power=3.0)
    assert apart(trained, rows, merge(base, experts, config)) < 1e-7  # power steps that end


def test_every_idea_makes_detectors(trained):
    (base,), experts = trained
    for name, idea in trials.IDEAS.items():
        for state in methods.merged(idea, base, experts):
            assert all(bool(tensor.isfinite().all()) for tensor in state.values()), name
            assert [tensor.shape for tensor in state.values()] == [tensor.shape for tensor in base.values()]


def test_the_page_of_ideas_is_what_was_found():
    assert trials.main(["--check"]) == 0


def test_the_page_names_ideas_that_are_ahead_everywhere():
    def rows(unseen, idea, other):
        return {
            "by rows, rank .4, small matrices whole": {"x": {"validation": 0.7, unseen: 0.6}},
            "small matrices whole": {"x": {"validation": 0.7 + idea, unseen: 0.61}, "y": {"validation": 0, unseen: 0}},
            "k": {"x": {"validation": 0.9, unseen: 0.9}},  # is no idea
            "merged in pairs": {"x": {"validation": 0.71, unseen: 0.6 + other}},
        }

    said = trials.answer({"cnn": rows("unseen", 0.01, 0.02), "mobilenet": rows("code", 0.01, -0.02)})
    assert said.endswith("they were tried on: small matrices whole.")
    said = trials.answer({"cnn": rows("unseen", -0.01, 0.02), "mobilenet": rows("code", 0.01, -0.02)})
    assert "Of the 2 others" in said
    assert said.endswith("they were tried on: none.")


def test_differences_are_paired_by_run():
    rows = {"a": {"x": {"g": 0.7}, "y": {"g": 0.5}, "z": {"g": 0.9}}, "b": {"x": {"g": 0.6}, "y": {"g": 0.6}}}
    assert trials.apart(rows, "a", "b", "g") == "+.000 ± .100 (1/2)"
