"""Training: one recipe for all, repeatable, and stopped when something goes wrong."""

from __future__ import annotations

import io
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from r2m.demo.networks import new_detector
from r2m.demo.parallel import Work, run_together, training_progress
from r2m.demo.samples import PretrainingSet
from r2m.demo.training import Recipe, train_base, train_detector
from rich.console import Console

RECIPE = Recipe(steps=4, batch=8)


def noise(seed, count=12):
    return np.random.default_rng(seed).uniform(size=(count, 48, 48)).astype(np.float32)


def ignore(loss):
    """Take no notice of progress."""


def equal(one, other):
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_new_detector_is_small_seeded_and_has_running_statistics():
    before = torch.get_rng_state()
    detector = new_detector(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert 200_000 < sum(parameter.numel() for parameter in detector.parameters()) < 500_000
    assert equal(detector, new_detector(0))
    assert not equal(detector, new_detector(1))
    state = detector.state_dict()
    assert state["head.weight"].shape[0] == state["head.bias"].shape[0] == 2
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}
    assert any(name.endswith("running_var") for name in state)


def test_training_learns_repeats_and_leaves_its_start_alone():
    base = new_detector(0)
    real, forged = noise(1) * 0.5, noise(2) * 0.5 + 0.4
    losses = []
    recipe = Recipe(steps=30, batch=16)
    trained = train_detector(base, real, [forged], recipe, 0, losses.append)
    assert equal(base, new_detector(0))
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert not trained.training
    # The statistics stay the base's: a merge has no data to re-estimate them.
    before, after = base.state_dict(), trained.state_dict()
    statistics = [name for name in before if name.split(".")[-1] in ("running_mean", "num_batches_tracked")]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert equal(trained, train_detector(base, real, [forged], recipe, 0, ignore))
    assert not equal(trained, train_detector(base, real, [forged], recipe, 1, ignore))
    with torch.inference_mode():
        fake_logits = trained(torch.from_numpy(forged))
    assert (fake_logits[:, 1] > fake_logits[:, 0]).all()  # fake is class 1


def test_the_joint_model_sees_every_family():
    base, real = new_detector(0), noise(1)
    one = train_detector(base, real, [noise(2)], RECIPE, 0, ignore)
    both = train_detector(base, real, [noise(2), noise(3)], RECIPE, 0, ignore)
    assert not equal(one, both)


def test_the_base_gets_a_fresh_head():
    pictures = noise(1, 16)
    labels = np.arange(16)
    data = PretrainingSet(pictures, np.stack([labels % 4, labels % 6, labels % 3]))
    base = train_base(data, RECIPE, 0, ignore)
    fresh = new_detector(0)
    assert torch.equal(base.head.weight, fresh.head.weight)
    assert not torch.equal(base.backbone.blocks[0].conv.weight, fresh.backbone.blocks[0].conv.weight)
    assert set(base.state_dict()) == set(fresh.state_dict())  # no trace of the heads of the generic task


def test_results_do_not_depend_on_how_many_train_at_once():
    def train(seed):
        return train_detector(new_detector(0), noise(1), [noise(2)], RECIPE, seed, ignore)

    jobs = {f"seed {seed}": lambda seed=seed: train(seed) for seed in range(3)}
    alone, together = run_together(jobs, 1), run_together(jobs, 3)
    assert list(alone) == list(together) == list(jobs)
    assert all(equal(alone[name], together[name]) for name in jobs)


def test_a_failure_stops_the_other_jobs():
    stop, stopped = threading.Event(), threading.Event()

    def fail():
        raise OSError("disk full")

    def work():
        if stop.wait(30):
            stopped.set()
            raise CancelledError

    with pytest.raises(OSError, match="disk full"):
        run_together({"long": work, "bad": fail, "never started": work}, 2, stop)
    assert stopped.is_set()


def test_progress_off_a_terminal_is_a_few_plain_lines():
    console = Console(file=io.StringIO(), width=40)
    with training_progress({"base": Work(10), "other": Work(8)}, console) as report:
        for _ in range(10):
            report("base", 0.25)
        for _ in range(8):
            report("other", 0.5)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 8
    assert lines[3].startswith("base: step 10 of 10, loss 0.250; all training: about")
    assert lines[-1] == "other: step 8 of 8, loss 0.500; all training: about 0 s left"
    assert all("\x1b" not in line for line in lines)


def test_progress_on_a_terminal_is_bars():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with training_progress({"base": Work(2, weight=2)}, console) as report:
        report("base", 0.25)
        report("base", 0.125)
    shown = console.file.getvalue()
    assert "100 %" in shown
    assert "loss 0.125" in shown
    assert "all training" in shown
