"""The pretrained regime of the quality benchmark: networks, fine-tuning, and whose pictures judge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from r2m.demo.faces import crop_face, read_photographs, split_people
from r2m.demo.forgeries import UNSEEN, forge
from r2m.demo.networks import new_detector
from r2m.demo.training import Recipe, train_detector

from bench.quality import efficientnet, groups, mobilenet, models, networks, packages, settings, super_resolution
from bench.quality.forgeries import FURTHER_FORGERIES
from bench.quality.models import Models, Run
from r2m_kernels import analyze

MAKERS = {"mobilenet": mobilenet.mobilenet, "lite0": efficientnet.efficientnet_lite0}
needs_packages = pytest.mark.skipif(
    not packages.PACKAGES.is_dir(), reason=f"no weights to try: {packages.MISSING.partition(': ')[2]} installs them"
)


@pytest.mark.parametrize("architecture", MAKERS)
def test_a_detector_loads_strictly_and_folded_it_is_the_same(architecture):
    state = new_detector(0, MAKERS[architecture]).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5, generator=generator)
    pictures = torch.rand(2, 40, 40, generator=generator)
    with torch.inference_mode():
        plain, folded = (networks.load_state(architecture, state, folded=f)(pictures) for f in (False, True))
    # 50 layers, each rounded anew: some 1e-7 of logits of size one a layer.
    assert torch.allclose(plain, folded, atol=1e-5)
    missing = {name: tensor for name, tensor in state.items() if name != "head.bias"}
    for wrong in (missing, {**state, "more": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match=r"head\.bias|more"):
            networks.load_state(architecture, wrong)


@needs_packages
@pytest.mark.parametrize("architecture", MAKERS)
def test_the_weights_know_an_espresso(architecture):
    from skimage.data import coffee

    backbone = networks.new_network(architecture, 0).backbone
    _, classifier = networks.ARCHITECTURES[architecture].weights()
    grey = coffee()[::2, 50:250:2].mean(axis=2, dtype=np.float32) / 255
    with torch.inference_mode():
        logits = backbone(torch.from_numpy(grey)[None]) @ classifier["weight"].T + classifier["bias"]
    assert int(logits.argmax()) == 967  # ImageNet's number of it


def test_fine_tuning_leaves_the_statistics_alone():
    base = new_detector(0, mobilenet.mobilenet)
    pictures = np.random.default_rng(0).random((4, 32, 32), dtype=np.float32)
    recipe = Recipe(1, batch=4, learning_rate=1e-4, head_rate=10.0)
    tuned = train_detector(base, pictures, [pictures], recipe, 0, lambda loss: None)
    before, after = base.state_dict(), tuned.state_dict()
    for name, tensor in before.items():
        kept = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, after[name]) == kept, name
    # The first step of Adam moves every number with a gradient by the learning rate: the head ten times as far.
    for name, rate in {"head.bias": 1e-3, "backbone.features.18.1.bias": 1e-4}.items():
        assert float((after[name] - before[name]).abs().max()) == pytest.approx(rate, rel=0.02)


def test_every_pretrained_specialist_draws_its_pictures_in_an_order_of_its_own():
    pretrained, scratch = Models(Run("mobilenet", 3)), Models(Run("cnn", 3))
    names = (*settings.MAIN, "joint FS+FR+EFS")
    assert len({pretrained.order(name) for name in names}) == len(names)
    assert pretrained.order("FS") == Models(Run("mobilenet", 3)).order("FS") != Models(Run("mobilenet", 4)).order("FS")
    assert {scratch.order(name) for name in names} == {3}


def test_a_specialist_that_moves_farther_has_the_head_of_the_others(monkeypatch, tmp_path):
    recipes = {}
    monkeypatch.setattr(Models, "_get", lambda self, name, recipe, train: recipes.setdefault(name, recipe))
    made = Models(Run("mobilenet", 3), tmp_path)
    made.specialist("FS")
    for rate in settings.RATES:
        made.moved("FS", rate)
    usual = recipes.pop("FS")
    for rate, recipe in zip(settings.RATES, recipes.values(), strict=True):
        assert recipe.learning_rate == pytest.approx(rate * 1e-4)
        assert recipe.learning_rate * recipe.head_rate == pytest.approx(usual.learning_rate * usual.head_rate)
        assert recipe.steps == usual.steps


def test_a_specialist_that_is_trained_longer_has_the_usual_rates_and_a_file_of_its_own(monkeypatch, tmp_path):
    recipes = {}
    monkeypatch.setattr(Models, "_get", lambda self, name, recipe, train: recipes.setdefault(name, recipe))
    made = Models(Run("mobilenet", 3), tmp_path)
    usual = made.specialist("FS")
    longer = {times: made.longer("FS", times) for times in settings.STEPS}
    assert len(recipes) == 1 + len(settings.STEPS)
    assert longer == {times: replace(usual, steps=times * usual.steps) for times in settings.STEPS}
    assert made.overtrained("FS") is recipes["FS overtrained"] is longer[10]  # the name that caches know


def test_groups_share_no_people_and_one_array_of_real_pictures(monkeypatch):
    asked = {}

    def recorded(label):
        def make(photographs, people, kind, *rest, **keywords):
            asked.setdefault(label, set()).update(people)
            return np.zeros((len(people), 8, 8), np.float32)

        return make

    run = Run("mobilenet", 3)
    monkeypatch.setattr(super_resolution, "make_pictures", recorded("test"))
    monkeypatch.setattr(groups, "make_pictures", recorded("test"))
    made = groups.groups_of(run)
    assert tuple(made) == groups.GROUPS["pretrained"]
    assert tuple(made["code"].forged) == UNSEEN
    assert tuple(made["neural"].forged) == tuple(super_resolution.NETWORKS)
    assert len({id(group.real) for group in made.values()}) == 1
    monkeypatch.setattr(groups, "make_pictures", recorded("validation"))
    assert tuple(groups.validation_group(run).forged) == settings.MAIN
    monkeypatch.setattr(models.samples, "make_pictures", recorded("training"))
    Models(run)._pictures(*settings.MAIN)
    people = split_people(3)
    assert asked == {"test": set(people.test), "validation": set(people.validation), "training": set(people.train)}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values()))


@pytest.mark.parametrize("kind", ["FS", "FE", "RT", "compression splice"])
def test_a_forgery_covers_the_same_part_of_a_face_at_any_size(kind):
    photographs = read_photographs()

    def covered(size):
        shares = []
        for seed in range(6):
            rng = np.random.default_rng(seed)
            picture, donor = (crop_face(photographs[person, 0], rng, size) for person in (0, 1))
            forgery = FURTHER_FORGERIES.get(kind)
            made = forgery(picture, donor, rng) if forgery else forge(kind, picture, donor, rng)
            shares.append((np.abs(made - picture) > 1e-3).mean())
        return float(np.mean(shares))

    # Twice as wide without longer lengths it would be a quarter.
    assert 0.75 < covered(96) / covered(48) < 1.25


@pytest.mark.slow
@needs_packages
def test_a_quick_specialist_is_trained_again_to_the_bit_and_moves_a_little(tmp_path):
    torch.set_num_threads(1)
    run = Run("mobilenet", 0, quick=True)
    first, again = (Models(run, tmp_path / name) for name in ("first", "again"))
    base, specialist = first.base(), first.specialist("FS")
    assert all(torch.equal(tensor, specialist[name]) for name, tensor in again.specialist("FS").items())
    assert all(torch.equal(tensor, specialist[name]) for name, tensor in base.items() if "running" in name)
    report = analyze(base, {"FS": specialist}).report()
    assert 0.0001 < report["task_vectors"]["relative_to_base"]["FS"] < 0.01  # a tenth of the steps of 1 %


@pytest.mark.slow
@needs_packages
@pytest.mark.parametrize("kind", super_resolution.NETWORKS)
def test_super_resolution_keeps_the_face_and_not_its_detail(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(super_resolution, "CACHE", tmp_path)
    wanted = (read_photographs(), split_people(0).test[:2], kind, 1, 0, 80)
    made = super_resolution.make_pictures(*wanted)
    assert made.shape == (20, 80, 80)
    assert np.array_equal(made, super_resolution.make_pictures(*wanted))  # from the disk
    forgery = super_resolution._forgery(*super_resolution.NETWORKS[kind])
    rng = np.random.default_rng(0)
    picture = crop_face(read_photographs()[0, 0], rng, 80)
    forged = forgery(picture, picture, rng)
    coarse, coarse_forged = (one.reshape(10, 8, 10, 8).mean(axis=(1, 3)) for one in (picture, forged))
    assert np.corrcoef(coarse.ravel(), coarse_forged.ravel())[0, 1] > 0.9
    assert np.abs(forged - picture).mean() > 0.01


def test_seeds_of_one_purpose_have_no_other():
    used = [settings.DEVELOPMENT, settings.FRESH, settings.CALIBRATION, settings.LATER]
    assert sum(map(len, used)) == len(set().union(*used))
    assert set(settings.REGIMES) == set(networks.ARCHITECTURES)
    for architecture, of_it in networks.ARCHITECTURES.items():
        assert (of_it.weights is None) == (settings.REGIMES[architecture] == "scratch")
        assert set(settings.fresh_of(architecture)) <= set(settings.FRESH)


def test_without_the_packages_it_says_what_installs_them(monkeypatch, tmp_path):
    from r2m_kernels.errors import BackendUnavailable

    monkeypatch.setattr(packages, "PACKAGES", tmp_path)
    with pytest.raises(BackendUnavailable, match="make build/quality/packages/ready"):
        networks.new_network("mobilenet", 0)
    with pytest.raises(BackendUnavailable, match="ncnn is missing"):
        packages.load_module("ncnn")
