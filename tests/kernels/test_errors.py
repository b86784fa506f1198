"""The sentences that users meet: what, where, expected, got. They are part of the interface."""

from __future__ import annotations

import math
import os

import forked
import numpy
import pytest
import torch
from cases import TRUNCATED, checkpoints

from r2m_kernels import BackendUnavailable, InvalidInput, MergeConfig, R2MError, analyze, merge
from r2m_kernels.errors import DoesNotFit


def message(error):
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 0}, "rank: expected a ratio in (0, 1] or a whole number of at least 1, got 0"),
        ({"rank": -0.5}, "rank: expected a ratio in (0, 1] or a whole number of at least 1, got -0.5"),
        ({"rank": 1.5}, "rank: expected a ratio in (0, 1] or a whole number of at least 1, got 1.5"),
        ({"rank": math.nan}, "rank: expected a ratio in (0, 1] or a whole number of at least 1, got nan"),
        ({"rank": True}, "rank: expected a ratio in (0, 1] or a whole number of at least 1, got True"),
        ({"eta": math.nan}, "eta: expected a finite number of at least 0, got nan"),
        ({"eta": -1}, "eta: expected a finite number of at least 0, got -1"),
        ({"eta": "0.6"}, "eta: expected a finite number of at least 0, got '0.6'"),
        ({"core_scale": 1e39}, "core_scale: expected a finite number up to 1e+30, got 1e+39"),
        ({"eta": 10**40}, f"eta: expected a finite number of at least 0 up to 1e+30, got {10**40}"),
        ({"core_scale": math.inf}, "core_scale: expected a finite number, got inf"),
        ({"real_rank": -1}, "real_rank: expected a whole number of at least 0, got -1"),
        ({"real_rank": 1.0}, "real_rank: expected a whole number of at least 0, got 1.0"),
        ({"center": 1}, "center: expected True or False, got 1"),
        ({"residual": "croe"}, "residual: expected one of 'core', 'own', got 'croe'; did you mean 'core'?"),
        ({"eta": None}, "eta: expected a finite number of at least 0, got None"),
        ({"eta_mode": 3}, "eta_mode: expected one of 'relative', 'constant', 'core_norm', 'sum', got 3"),
        ({"exclude": 5}, "exclude: expected a sequence of name patterns, got 5"),
        ({"power_iterations": -1}, "power_iterations: expected a whole number of at least 0, got -1"),
        ({"tolerance": -1e-3}, "tolerance: expected a finite number of at least 0, got -0.001"),
        ({"seed": 0.5}, "seed: expected a whole number, got 0.5"),
        ({"density": 0}, "density: expected a number in (0, 1], got 0"),
        ({"weights": ()}, "weights: expected one positive number per expert, got ()"),
        ({"weights": (1, 0)}, "weights[1]: expected a positive number, got 0"),
        (
            {"spectrum": "rescale", "rank": 4},
            "rank: expected a share of the nuclear norm with spectrum='rescale', got 4",
        ),
        (
            {"spectrum": "reweigh"},
            "rank: spectrum='reweigh' keeps all singular values; expected rank=1.0 alone, got rank=0.4 and 0 ranks by "
            "name",
        ),
        (
            {"elementwise": "ties"},
            "elementwise: 'ties' has neither residuals nor subspace; expected eta=0, real_rank=None and "
            "core_spectrum='keep', got eta=1, real_rank=1, core_spectrum='keep'",
        ),
        ({"descent_steps": -1}, "descent_steps: expected a whole number of at least 0, got -1"),
        (
            {"descent_steps": 5},
            "descent_steps: descent has neither residuals nor another map; expected eta=0, elementwise='none' and "
            "core_spectrum='keep', got eta=1, elementwise='none', core_spectrum='keep'",
        ),
        ({"row_power": -1}, "row_power: expected a finite number of at least 0, got -1"),
        (
            {"eta_mode": "relative"},
            "eta_mode: 'relative' needs the residual term's norm, which row_power=3 makes as rows pass; expected "
            "row_power=0 with it, or eta_mode='constant'",
        ),
        ({"core_spectrum": "flat"}, "core_spectrum: 'flat' has no residuals; expected eta=0, got eta=1"),
        ({"scale": "row"}, "scale: expected one of 'none', 'layer', 'column', got 'row'"),
        ({"rnak": 0.1}, "unknown option 'rnak'; did you mean 'rank'?"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(InvalidInput) as error:
        MergeConfig.r2m(**options)
    assert message(error) == sentence
    base, experts = checkpoints(1, shapes={"a": (3, 4)})
    with pytest.raises(InvalidInput) as error:
        merge(base, experts, **options)
    assert message(error) == sentence


def test_scales_of_the_baselines_are_named_as_they_were_given():
    with pytest.raises(InvalidInput, match="scale: expected a finite number of at least 0, got -1"):
        MergeConfig.cart(0.1, -1)
    with pytest.raises(InvalidInput, match="scale: expected a finite number, got nan"):
        MergeConfig.task_arithmetic(math.nan)
    assert MergeConfig.task_arithmetic(-1).core_scale == -1.0


def test_numpy_scalars_and_lists_are_taken():
    config = MergeConfig(rank=numpy.float64(0.2), real_rank=numpy.int64(2), eta=1, exclude=["a*"])
    assert (config.rank, config.real_rank, config.eta, config.exclude) == (0.2, 2, 1.0, ("a*",))
    assert type(config.rank) is float
    assert MergeConfig(exclude="head.*").exclude == ("head.*",)
    assert MergeConfig(rank=numpy.int32(4)).rank == 4


def test_config_is_frozen_and_has_the_documented_defaults():
    config = MergeConfig.r2m()
    assert config == MergeConfig()
    assert (config.center, config.residual, config.real_rank, config.rank) == (False, "core", 1, 0.4)
    assert (config.eta_mode, config.eta, config.norm_match) == ("constant", 1.0, True)
    assert (config.core_mode, config.core_scale, config.row_power, config.scale) == ("restored", 1.0, 3.0, "none")
    assert (config.head, config.truncate, config.rank_rounding, config.whole_up_to) == ("mean", (), "up", 16)
    assert (config.power_iterations, config.oversampling) == (2, 8)
    with pytest.raises(AttributeError):
        config.rank = 0.2


def test_errors_are_of_the_kinds_that_callers_catch():
    assert issubclass(InvalidInput, R2MError)
    assert issubclass(InvalidInput, ValueError)
    assert issubclass(BackendUnavailable, R2MError)
    assert issubclass(BackendUnavailable, RuntimeError)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["encoder.weight", "encoder.bias", "norm.running_var", "temperature", "class_token"])
@pytest.mark.parametrize("where", ["base", "expert"])
def test_a_non_finite_input_is_named_by_expert_and_tensor(bad, name, where):
    base, experts = checkpoints(2)
    state = base if where == "base" else experts[1]
    state[name].view(-1)[-1] = bad
    with pytest.raises(InvalidInput) as error:
        merge(base, {"fs": experts[0], "fr": experts[1]})
    label = "base" if where == "base" else "expert 'fr'"
    assert message(error) == f"{label}: tensor '{name}' holds NaN or Inf in 1 of {state[name].numel()} elements"


def test_all_mismatches_are_listed_at_once():
    base, experts = checkpoints(2, shapes={"a": (3, 4), "b": (5,), "c": (2, 2), "d": (2, 2)})
    del experts[0]["a"]
    experts[0]["b"] = torch.ones(6)
    experts[1]["c"] = torch.ones(2, 2, dtype=torch.int32)
    experts[1]["z"] = torch.ones(2, 2)
    with pytest.raises(InvalidInput) as error:
        merge(base, {"fs": experts[0], "fr": experts[1]})
    assert message(error).splitlines() == [
        "expert 'fs' does not fit base, 2 mismatches:",
        "  missing: 'a' (float32 [3, 4])",
        "  shape: 'b' expected [5], got [6]",
        "expert 'fr' does not fit base, 2 mismatches:",
        "  extra: 'z' (float32 [2, 2]) is not in the base",
        "  dtype: 'c' expected float32, got int32",
    ]


def test_one_mismatch_is_one_sentence():
    base, experts = checkpoints(1, shapes={"a": (3, 4), "b": (5,)})
    experts[0]["a"] = torch.ones(4, 3)
    with pytest.raises(InvalidInput) as error:
        merge(base, experts)
    assert message(error) == "expert 'expert0' does not fit base: shape: 'a' expected [3, 4], got [4, 3]"


@pytest.mark.parametrize(
    ("rename", "guess"),
    [
        (lambda name: "model." + name, "its names carry the prefix 'model.' that the base's lack"),
        (lambda name: name.removeprefix("vision."), "its names lack the prefix 'vision.' of the base's"),
    ],
)
def test_a_likely_cause_is_guessed_from_names(rename, guess):
    base, experts = checkpoints(1, shapes={"vision.a": (3, 4), "vision.b": (5,)})
    del base["steps"]
    expert = {rename(name): tensor for name, tensor in experts[0].items() if name != "steps"}
    with pytest.raises(InvalidInput, match=guess):
        merge(base, [expert])


def test_a_likely_cause_is_guessed_from_widths():
    base = {"w": torch.zeros(2, 1024)}
    with pytest.raises(InvalidInput, match=r"looks like a ViT-B \(768 wide\) against a ViT-L \(1024 wide\)"):
        merge(base, [{"w": torch.zeros(2, 768)}])


def test_many_mismatches_are_counted_by_how_names_begin_with_three_examples():
    base = {f"layer{i % 6}.{i}.weight": torch.zeros(2, 2) for i in range(150)} | {"a.b": torch.zeros(3)}
    expert = {"layer0.0.weight": torch.zeros(2, 2), "a.b": torch.zeros(4)}
    experts = {str(i): dict(expert) for i in range(16)}
    experts["3"]["a.b"] = torch.zeros(5)
    with pytest.raises(DoesNotFit) as error:
        merge(base, experts)
    assert message(error).splitlines()[:5] == [
        "expert '0' does not fit base, 150 mismatches:",
        "  missing: 149 (layer1.* 25, layer2.* 25, layer3.* 25, layer4.* 25 and 2 more), such as "
        "'layer1.1.weight' (float32 [2, 2]); 'layer2.2.weight' (float32 [2, 2]); 'layer3.3.weight' (float32 [2, 2])",
        "  shape: 'a.b' expected [3], got [4]",
        "expert '1' does not fit base, by the same 150 mismatches",
        "expert '2' does not fit base, by the same 150 mismatches",
    ]
    assert len(message(error).splitlines()) <= 10
    assert message(error).splitlines()[-1] == "11 more do not fit"
    assert error.value.mismatches == 16 * 150
    assert error.value.every.count("missing: ") == 16 * 149


def test_what_was_given_is_not_advised():
    base = {"a": torch.zeros(2, 2)}
    experts = [{"a": torch.zeros(2, 3), "fc.weight": torch.zeros(2, 5)}] * 2
    for more in ({"extra": "average"}, {"head": "mean"}):
        with pytest.raises(DoesNotFit) as error:
            merge(base, experts, **more)
        assert "takes their mean" not in message(error)
        assert "averages the experts'" not in message(error)


@pytest.mark.parametrize("own", [{}, {"fc.weight": torch.zeros(1000, 4)}], ids=["no head", "a head of its own"])
def test_classifiers_that_differ_from_each_other_are_told_as_that(own):
    base = {"a": torch.zeros(4, 4)}
    one, two = ({**base, "fc.weight": torch.zeros(outputs, 4)} for outputs in (1, 2))
    with pytest.raises(DoesNotFit) as error:
        merge({**base, **own}, [one, two])
    assert (
        message(error).count("the experts' classifiers differ, and those of one shape are averaged: --head expert:")
        == 2
    )
    with pytest.raises(DoesNotFit) as error:  # where more is wrong, that says less
        merge({**base, **own, "b": torch.zeros(3)}, [one, two])
    assert "classifiers differ" not in message(error)
    assert merge({**base, **own}, [two, two])["fc.weight"].shape == (2, 4)


@pytest.mark.parametrize(
    ("base", "experts", "sentence"),
    [
        ({"a": torch.ones(2)}, [], "experts: expected at least one, got none"),
        (
            {"a": torch.tensor([1, 2]), "b": torch.tensor(True)},
            [{"a": torch.tensor([1, 2])}],
            "base: nothing to merge, none of its 2 tensors holds floating-point numbers",
        ),
        ({}, [{}], "base: nothing to merge, none of its 0 tensors holds floating-point numbers"),
        (
            {"a": torch.ones(2), "epoch": 3},
            [{"a": torch.ones(2)}],
            "base: expected a state dict of tensors, got int for 'epoch'",
        ),
        ("model.safetensors", [{}], "base: expected a state dict, a module or a TensorSource, got str"),
        (
            {"a": torch.ones(2, dtype=torch.complex64)},
            [{"a": torch.ones(2)}],
            "base cannot be merged: unsupported dtype: 'a' (complex64 [2])",
        ),
    ],
)
def test_inputs_that_are_no_checkpoints(base, experts, sentence):
    with pytest.raises(InvalidInput) as error:
        merge(base, experts)
    assert message(error).splitlines()[0] == sentence


def test_integer_tensors_may_be_missing_and_are_the_bases():
    base, experts = checkpoints(2, shapes={"a": (3, 4)})
    del experts[0]["steps"]
    experts[1]["position_ids"] = torch.arange(3)
    assert list(merge(base, experts)) == ["a", "steps"]


class TestHeadsOfTheirOwn:
    """Another number of classes than the base has."""

    def inputs(self, *, base_head="head"):
        base, experts = checkpoints(2, shapes={"a": (3, 4)})
        base = {f"{base_head}.weight": torch.ones(10, 3), f"{base_head}.bias": torch.ones(10), **base}
        for value, expert in enumerate(experts):
            expert |= {"head.weight": torch.full((2, 3), float(value)), "head.bias": torch.full((2,), float(value))}
        return base, experts

    def test_are_averaged_where_heads_are(self):
        base, experts = self.inputs()
        analysis = analyze(base, experts)
        merged = analysis.merge()
        assert list(merged) == list(base)
        assert torch.equal(merged["head.weight"], torch.full((2, 3), 0.5))
        assert torch.equal(merged["head.bias"], torch.full((2,), 0.5))
        assert analysis.report()["head"] == ["head.weight", "head.bias"]
        assert analysis.report()["dropped"] == []
        without = [{name: tensor for name, tensor in one.items() if "head" not in name} for one in (base, *experts)]
        assert torch.equal(merged["a"], merge(without[0], without[1:])["a"])

    def test_take_the_place_of_a_base_s_by_another_name(self):
        base, experts = self.inputs(base_head="fc")
        analysis = analyze(base, experts)
        assert list(analysis.merge()) == ["a", "steps", "head.weight", "head.bias"]
        assert analysis.report()["dropped"] == ["fc.weight", "fc.bias"]

    def test_are_refused_where_they_are_merged_or_differ_among_themselves(self):
        base, experts = self.inputs()
        with pytest.raises(InvalidInput, match=r"its classifier has other outputs than the base's: head='mean'"):
            merge(base, experts, head="merge")
        experts[1] |= {"head.weight": torch.ones(3, 3), "head.bias": torch.ones(3)}
        with pytest.raises(InvalidInput, match=r"shape: 'head.weight' expected \[10, 3\], got \[2, 3\]"):
            merge(base, experts)

    def test_are_the_base_s_where_that_is_kept(self):
        base, experts = self.inputs()
        merged = merge(base, experts, keep=("head.*",))
        assert torch.equal(merged["head.weight"], base["head.weight"])

    def test_a_nan_in_it_is_named(self):
        base, experts = self.inputs()
        experts[1]["head.weight"][0, 0] = math.nan
        with pytest.raises(InvalidInput, match=r"expert 'expert1': tensor 'head\.weight' holds NaN or Inf in 1 of 6"):
            merge(base, experts)


class TestExtra:
    def inputs(self):
        base, experts = checkpoints(2, shapes={"a": (3, 4)})
        for value, expert in enumerate(experts):
            expert["head.weight"] = torch.full((2, 3), float(value))
        return base, experts

    def test_error_offers_the_way_out(self):
        base, experts = self.inputs()
        with pytest.raises(InvalidInput, match=r"every expert has it: a head the base lacks\? head='mean'"):
            merge(base, experts, head="merge")
        for expert in experts:
            expert["neck.weight"] = torch.ones(2, 3)
        with pytest.raises(InvalidInput, match=r"every expert has it: a head the base lacks\? extra='average'"):
            merge(base, experts, head="merge")

    def test_average_appends_the_mean(self):
        base, experts = self.inputs()
        merged = merge(base, experts, extra="average")
        assert list(merged) == ["a", "steps", "head.weight"]
        assert torch.equal(merged["head.weight"], torch.full((2, 3), 0.5))

    def test_drop_leaves_it_out_and_says_so(self):
        base, experts = self.inputs()
        analysis = analyze(base, experts, extra="drop")
        assert list(analysis.merge()) == ["a", "steps"]
        assert analysis.report()["dropped"] == ["head.weight"]

    def test_its_dtype_does_not_depend_on_the_order_of_experts(self):
        base, experts = self.inputs()
        experts[0]["head.weight"] = experts[0]["head.weight"].half()
        for order in (experts, experts[::-1]):
            assert merge(base, order, extra="average")["head.weight"].dtype == torch.float32

    def test_what_one_expert_alone_has_is_always_refused(self):
        base, experts = self.inputs()
        del experts[1]["head.weight"]
        with pytest.raises(InvalidInput, match=r"extra: 'head.weight' \(float32 \[2, 3\]\) is not in the base"):
            merge(base, experts, extra="average")

    def test_a_nan_in_it_is_named(self):
        base, experts = self.inputs()
        experts[1]["head.weight"][0, 0] = math.nan
        with pytest.raises(InvalidInput, match=r"expert 'expert1': tensor 'head\.weight' holds NaN or Inf in 1 of 6"):
            merge(base, experts, extra="average")


def test_an_analysis_refuses_what_it_cannot_answer():
    base, experts = checkpoints(2, shapes={"a": (80, 90)})
    analysis = analyze(base, experts, rank=0.2)
    with pytest.raises(InvalidInput, match="tensor 'a' was analyzed at rank 16 and cannot be merged at 40"):
        analysis.merge(rank=0.5)
    with pytest.raises(InvalidInput, match="center: this analysis was made with False and cannot be merged with True"):
        analysis.merge(center=True)
    with pytest.raises(InvalidInput, match="eta: this analysis was made with eta=0"):
        analyze(base, experts, eta=0.0).merge(eta=0.5)


def test_the_triton_backend_without_a_gpu_says_what_to_do():
    code = """
import torch, r2m_kernels
try:
    r2m_kernels.merge({"w": torch.ones(2, 2)}, [{"w": torch.ones(2, 2)}], backend="triton")
except r2m_kernels.BackendUnavailable as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out, err = forked.start((), code, environment).communicate(timeout=60)
    assert out.strip() == (
        "backend 'triton' runs on CUDA and ROCm GPUs and not on 'cpu' (device='cuda' chooses one); use backend='torch' "
        "or 'auto'"
    ), err


@pytest.mark.parametrize("device", ["gpu", "meta", ""])
def test_no_such_device(device):
    base, experts = checkpoints(1, shapes={"a": (3, 4)})
    with pytest.raises(InvalidInput) as error:
        merge(base, experts, device=device)
    assert message(error) == f"device: expected one such as cpu, cuda or cuda:1, got '{device}'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_says_so():
    base, experts = checkpoints(1, shapes={"a": (3, 4)})
    for device in ("cuda", "xla"):  # of the second torch says in a page which others there are
        with pytest.raises(BackendUnavailable, match=f"device '{device}' cannot be used here: ") as error:
            merge(base, experts, device=device)
        assert len(str(error.value)) < 150


def test_tensors_without_data_are_refused():
    with pytest.raises(InvalidInput, match="base: expected dense tensors with data, got 'a' on the meta device"):
        merge({"a": torch.ones(3, device="meta")}, [{"a": torch.ones(3)}])
    with pytest.raises(
        InvalidInput, match=r"expert 'fs': expected dense tensors .* got 'a' of layout torch.sparse_coo"
    ):
        merge({"a": torch.ones(3)}, {"fs": {"a": torch.ones(3).to_sparse()}})
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(InvalidInput, match="expert 'fs': expected dense tensors with data, got 'a' that is nested"):
        merge({"a": torch.ones(3)}, {"fs": {"a": nested}})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (({"a": torch.ones(2)}, None), "experts: expected a sequence or a mapping by name, got NoneType"),
        (({"a": torch.ones(2)}, "fs.pth"), "experts: expected a sequence or a mapping by name, got str"),
        (({"a": torch.ones(2)}, [{"a": torch.ones(2)}], {"rank": 0.1}), "config: expected a MergeConfig, got dict"),
        (({1: torch.ones(2)}, [{1: torch.ones(2)}]), "base: expected names of tensors, got 1"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, sentence):
    with pytest.raises(InvalidInput) as error:
        merge(*arguments)
    assert message(error) == sentence


def test_mismatches_are_counted_before_the_list_is_cut():
    base = {f"layer.{i}": torch.zeros(2) for i in range(300)}
    with pytest.raises(InvalidInput, match="expert 'expert0' does not fit base, 300 mismatches"):
        merge(base, [{name: torch.zeros(3) for name in base}])


def test_overflow_of_the_output_dtype_is_named():
    base = {"a": torch.full((2, 2), 60000.0, dtype=torch.float16)}
    experts = [{"a": torch.full((2, 2), 65000.0, dtype=torch.float16)}]
    with pytest.raises(InvalidInput, match="tensor 'a': merged values exceed the range of float16"):
        merge(base, experts, core_scale=3.0)


def test_task_vectors_too_large_for_float32_are_named():
    with pytest.raises(InvalidInput, match="tensor 'a': the differences from the base are too large to be squared"):
        merge({"a": torch.zeros(80, 80)}, [{"a": torch.full((80, 80), 1e30)}], TRUNCATED)


@pytest.mark.parametrize("size", ["4 giraffes", "-1", 0, "0B", "", "9" * 400])
def test_a_memory_budget_is_a_size(size):
    base, experts = checkpoints(1, shapes={"a": (3, 4)})
    with pytest.raises(InvalidInput, match=r"memory_budget: expected a positive size such as 4GiB or 500MB, got"):
        merge(base, experts, memory_budget=size)
