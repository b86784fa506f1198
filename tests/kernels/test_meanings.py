"""Weights that are stored as something else than their numbers are refused; look-alikes are merged."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from r2m_kernels import MergeConfig, merge
from r2m_kernels.errors import DoesNotFit

# Integers and what scales them, as the libraries store a layer of 32 × 16.
QUANTISED = {
    "GPTQ or AWQ": {
        "q.qweight": torch.ones(4, 32, dtype=torch.int32),
        "q.qzeros": torch.ones(1, 4, dtype=torch.int32),
        "q.scales": torch.ones(1, 32, dtype=torch.float16),
        "q.g_idx": torch.zeros(16, dtype=torch.int32),
    },
    "bitsandbytes in 4 bits": {
        "q.weight": torch.ones(256, 1, dtype=torch.uint8),
        "q.weight.absmax": torch.ones(8),
        "q.weight.quant_map": torch.linspace(-1, 1, 16),
    },
    "bitsandbytes in 8 bits": {"q.weight": torch.ones(32, 16, dtype=torch.int8), "q.SCB": torch.ones(32)},
    "compressed-tensors": {
        "q.weight_packed": torch.ones(32, 2, dtype=torch.int32),
        "q.weight_scale": torch.ones(32, 1),
        "q.weight_shape": torch.tensor([32, 16]),
    },
    "quanto": {"q.weight._data": torch.ones(32, 16, dtype=torch.int8), "q.weight._scale": torch.ones(32, 1)},
    "HQQ": {"W_q": torch.ones(128, 2, dtype=torch.uint8), "meta": torch.ones(2), "bias": torch.ones(32)},
    "which 'q.codebooks' scales": {  # AQLM
        "q.codes": torch.ones(32, 2, 1, dtype=torch.int16),
        "q.codebooks": torch.ones(1, 256, 1, 8),
        "q.scales": torch.ones(32, 1, 1, 1),
    },
    "which 'experts.down_proj_scales' scales": {  # MXFP4
        "experts.down_proj_blocks": torch.ones(4, 32, 2, 16, dtype=torch.uint8),
        "experts.down_proj_scales": torch.ones(4, 32, 2, dtype=torch.uint8),
    },
    "by 8-bit floating point in blocks, which 'q.weight_scale_inv' scales": {
        "q.weight": torch.ones(32, 16, dtype=torch.float8_e4m3fn),
        "q.weight_scale_inv": torch.ones(1, 1),
    },
    "which 'q.scale_weight' scales": {
        "q.weight": torch.ones(32, 16, dtype=torch.float8_e5m2),
        "q.scale_weight": torch.ones(1),
    },
    "holds the bits of a quantised weight by bitsandbytes in 4 bits": {  # whose storage may have any type
        "q.weight": torch.ones(64, 1, dtype=torch.bfloat16),
        "q.weight.absmax": torch.ones(8),
        "q.weight.quant_map": torch.linspace(-1, 1, 16),
    },
    "which 'q.weight_scale' scales": {"q.weight": torch.ones(256, dtype=torch.uint8), "q.weight_scale": torch.ones(1)},
    "which 'q.scales' scales": {  # SpQR
        "q.dense_weights": torch.ones(4, 32, dtype=torch.int64),
        "q.scales": torch.ones(4, 32),
    },
    "which 'q.packed_scale_0' scales": {  # of a traced graph
        "q.packed_weight_0": torch.ones(32, 16, dtype=torch.int8),
        "q.packed_scale_0": torch.ones(()),
    },
    "'q.weight' holds the integers": {"q.weight": torch.ones(32, 16, dtype=torch.int8), "q.bias": torch.ones(32)},
}


def _hooked(wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(wrap(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2)).state_dict()


def _pruned():
    layer = nn.Linear(8, 6)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer.state_dict()


class _Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


def _symmetric():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", _Symmetric())
    return layer.state_dict()


NORMALISED = {
    "weight_norm": lambda: _hooked(nn.utils.weight_norm),
    "weight_norm of the whole": lambda: _hooked(lambda layer: nn.utils.weight_norm(layer, dim=None)),
    "spectral_norm": lambda: _hooked(nn.utils.spectral_norm),
    "pruning": _pruned,
    "spectral_norm of its own class": lambda: {
        "module.weight_bar": torch.ones(6, 8),
        "module.weight_u": torch.ones(6),
        "module.weight_v": torch.ones(8),
    },
    "spectral_norm of BigGAN": lambda: {"weight": torch.ones(6, 8), "u0": torch.ones(1, 6), "sv0": torch.ones(1)},
    "weight_norm of rows": lambda: {"weight_v": torch.ones(6, 8), "weight_g": torch.ones(6)},
    "spectral_norm of its own vector": lambda: {"q.weight": torch.ones(6, 8), "q.u": torch.ones(6)},
    "weight_norm parametrized": lambda: _hooked(parametrizations.weight_norm),
    "spectral_norm parametrized": lambda: _hooked(parametrizations.spectral_norm),
    "a parametrization": lambda: _hooked(parametrizations.orthogonal),
    "a parametrization of one's own": _symmetric,
}


@pytest.mark.parametrize("whose", QUANTISED)
def test_a_quantised_weight_is_refused_with_whose_it_is(whose):
    state = {**QUANTISED[whose], "norm.weight": torch.ones(16)}
    with pytest.raises(DoesNotFit, match="quantised") as refused:
        merge(state, {"fs": state, "fr": state})
    assert whose in str(refused.value)
    assert str(refused.value).startswith("base: ")
    assert len(str(refused.value).splitlines()) == 3  # one for each of them


def test_one_quantised_expert_is_named_and_not_what_follows_from_it():
    plain = {"q.weight": torch.ones(32, 16)}
    with pytest.raises(DoesNotFit) as refused:
        merge(plain, {"fs": plain, "fr": QUANTISED["bitsandbytes in 8 bits"]})
    (line,) = str(refused.value).splitlines()
    assert "'fr'" in line
    assert "'q.SCB'" in line


@pytest.mark.parametrize(
    "factors",
    [
        ("q.lora_A.weight", "q.lora_B.weight"),
        ("q.lora_A.default.weight", "q.lora_B.default.weight"),  # of PEFT, nothing unloaded
        ("q.lora_A", "q.lora_B"),  # of loralib
        ("lora_te_q.lora_down.weight", "lora_te_q.lora_up.weight"),
        ("lora_A", "lora_B"),
        ("q.lokr_w1", "q.lokr_w2_a"),
        ("q.hada_w1_a", "q.hada_w1_b"),
    ],
)
def test_factors_of_an_update_are_not_merged_one_by_one(factors):
    state = {"q.weight": torch.ones(8, 8), factors[0]: torch.ones(2, 8), factors[1]: torch.ones(8, 2)}
    with pytest.raises(
        DoesNotFit, match="is a factor of an adapter's update, and products of means are no mean"
    ) as told:
        merge(state, {"fs": state})
    assert repr(factors[0]) in str(told.value)
    like = {"explora_A.weight": torch.ones(8, 8), "flora_down": torch.ones(8, 8), "lora_rank.weight": torch.ones(8, 8)}
    assert torch.equal(merge(like, {"fs": like})["lora_rank.weight"], like["lora_rank.weight"])


@pytest.mark.parametrize("how", NORMALISED)
def test_a_weight_that_is_a_function_of_several_tensors_is_refused(how):
    state = NORMALISED[how]()
    with pytest.raises(DoesNotFit) as refused:
        merge(state, {"fs": state})
    assert f"under {how.split(' of ')[0].removesuffix(' parametrized')}," in str(refused.value)


def test_what_is_kept_is_the_bases_whatever_it_means():
    state = {**QUANTISED["bitsandbytes in 8 bits"], **_hooked(nn.utils.weight_norm)}
    moved = {name: tensor + 1 for name, tensor in state.items()}
    merged = merge(state, {"fs": moved}, MergeConfig.weight_average().replace(keep=("q.*", "0.*")))
    assert torch.equal(merged["0.weight_g"], state["0.weight_g"])
    assert torch.equal(merged["q.SCB"], state["q.SCB"])
    assert torch.equal(merged["2.weight"], state["2.weight"] + 1)
    with pytest.raises(DoesNotFit):  # one of the two is not enough
        merge(state, {"fs": moved}, MergeConfig.weight_average().replace(keep=("q.*", "0.weight_g")))


def test_what_looks_alike_is_merged():
    state = {
        "attn.logit_scale": torch.ones(4, 1, 1),
        "attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        "embeddings.position_ids": torch.arange(50).unsqueeze(0),
        "key_g": torch.randn(3, 5),  # no lengths of key_v
        "key_v": torch.randn(7, 5),
        "layer.weight_scale": torch.ones(6),
        "layer.weight": torch.randn(6, 6),
        "bn.num_batches_tracked": torch.tensor(3),
        "h.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),  # GPT-2's mask
        "h.attn.scale": torch.ones(()),
        "crop.coords": torch.zeros(4, 4, dtype=torch.int64),
        "crop.scale": torch.ones(()),
        "crop.weight": torch.zeros(4, dtype=torch.int64),  # a row, and its scale elsewhere
        "stem.weight_u": torch.ones(3),
        "stem.weight": torch.randn(3, 3),
    }
    moved = {name: tensor + 1 for name, tensor in state.items()}
    merged = merge(state, {"fs": moved}, MergeConfig.weight_average())
    assert torch.allclose(merged["key_v"], moved["key_v"])
    assert torch.equal(merged["attn.relative_position_index"], state["attn.relative_position_index"])


def test_complex_numbers_are_no_quantised_weight():
    state = {"filter.weight": torch.ones(4, 4, dtype=torch.complex64), "w": torch.ones(4, 4)}
    with pytest.raises(DoesNotFit, match=r"unsupported dtype: 'filter\.weight'"):
        merge(state, {"fs": state})
