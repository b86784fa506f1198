"""Writes adapters of PEFT: LoRA whose scale is 1, as ``PeftModel.from_pretrained`` and ``load_adapter`` read it.

Reference: ``peft.LoraConfig``, ``peft.utils.save_and_load`` 0.21.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from r2m.checkpoints.adapter_config import CONFIG, WEIGHTS
from r2m.checkpoints.adapter_layout import IN_PROJECTION, OUT_PROJECTION, Layout
from r2m.checkpoints.saved_names import Family, in_models
from r2m.checkpoints.writer import SafetensorsSink
from r2m.places import sync, write_file
from r2m_kernels.streaming import TensorSpec

_BEFORE = "base_model.model."


class AdapterWriter:
    """One adapter being written into a directory, tensor by tensor.

    Args:
        directory: an existing one.
        layout: what is in it.
        specs: of the model's tensors, as they are saved whole.
        ranks: weight → columns of its change.
        dtypes: weight → dtype of its factors, and of its bias.
        family: of the model, where it has other names than its file.
    """

    def __init__(
        self,
        directory: Path,
        layout: Layout,
        specs: Mapping[str, TensorSpec],
        ranks: Mapping[str, int],
        dtypes: Mapping[str, torch.dtype],
        family: Family | None = None,
    ) -> None:
        self._directory, self._layout, self._specs, self._family = directory, layout, specs, family
        self._ranks, self._dtypes = _alike_in_attention(layout, ranks), dtypes
        self._sink = SafetensorsSink(directory, {}, sys.maxsize, single=WEIGHTS[0])
        self._sink.begin(self._announced())

    def _announced(self) -> dict[str, TensorSpec]:
        found = {}
        for module, name in self._layout.targets.items():
            shape, rank, dtype = self._specs[name].shape, self._ranks[module], self._dtypes[name]
            found[self._key(module, "lora_A.weight")] = TensorSpec((rank, *shape[1:]), dtype)
            found[self._key(module, "lora_B.weight")] = TensorSpec((shape[0], rank, *(1,) * (len(shape) - 2)), dtype)
            if self._layout.biased:
                found[self._key(module, "lora_B.bias")] = TensorSpec(shape[:1], dtype)
        whole = (name for names in self._layout.saved.values() for name in names)
        return found | {_BEFORE + self._called(name): self._specs[name] for name in whole}

    def _called(self, name: str) -> str:
        return in_models(name, self._family) if self._family else name

    def _key(self, module: str, part: str) -> str:
        if self._twice(module):
            module = f"{module.removesuffix(OUT_PROJECTION)}.base_layer{OUT_PROJECTION}"
        return f"{_BEFORE}{self._called(module)}.{part}"

    def _twice(self, module: str) -> bool:
        """Whether it is the projection of PyTorch's attention, which lies in what PEFT wraps, and is added twice."""
        attention = module.removesuffix(OUT_PROJECTION)
        return attention != module and self._layout.targets.get(attention, "").endswith(IN_PROJECTION)

    def write_change(self, module: str, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
        """A layer's: left · right is added to its weight, (m, r) by (r, n), and ``bias`` to its bias."""
        name, rank = self._layout.targets[module], self._ranks[module]
        shape, more = self._specs[name].shape, rank - left.shape[1]
        left, right = functional.pad(left, (0, more)), functional.pad(right, (0, 0, 0, more))
        if self._twice(module):
            left = left / 2
        parts = {"lora_A.weight": right.reshape(rank, *shape[1:])}
        parts["lora_B.weight"] = left.reshape(shape[0], rank, *(1,) * (len(shape) - 2))
        parts |= {} if bias is None else {"lora_B.bias": bias}
        for part, tensor in parts.items():
            self._sink.write(self._key(module, part), tensor.to(self._dtypes[name]))

    def write_whole(self, name: str, tensor: Tensor) -> None:
        """A tensor of a module that is saved whole."""
        self._sink.write(_BEFORE + self._called(name), tensor)

    def finish(self, base: str, card: bytes, card_file: str) -> None:
        """Write what is beside the tensors; all of it is on the disk then.

        Args:
            base: what the model is called.
            card: of the adapter.
            card_file: what that file is called.
        """
        self._sink.finish()
        write_file(self._directory / CONFIG, self._config(base))
        write_file(self._directory / card_file, card)
        sync(self._directory)

    def _config(self, base: str) -> bytes:
        ranks = {self._called(module): rank for module, rank in self._ranks.items()}
        targets = {self._called(module): name for module, name in self._layout.targets.items()}
        attention = {one + OUT_PROJECTION for one, name in targets.items() if name.endswith(IN_PROJECTION)}
        common = Counter(ranks.values()).most_common(1)[0][0]
        # PEFT takes the first that fits the end of a module's name: of those that do, its own is the longest.
        others = {one: ranks[one] for one in sorted(ranks, key=lambda one: (-len(one), one)) if ranks[one] != common}
        content = {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "r": common,
            "lora_alpha": common,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": _targets(sorted(targets.keys() - attention), map(self._called, self._specs)),
            "modules_to_save": [*map(self._called, self._layout.saved)] or None,
            "lora_bias": self._layout.biased,
            "bias": "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "task_type": None,
        }
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _alike_in_attention(layout: Layout, ranks: Mapping[str, int]) -> dict[str, int]:
    """Module → rank; one for both projections of PyTorch's attention, as PEFT has it."""
    found = {module: ranks.get(name, 1) for module, name in layout.targets.items()}
    for module, name in layout.targets.items():
        if name.endswith(IN_PROJECTION):
            pair = (module, module + OUT_PROJECTION)
            found |= dict.fromkeys(pair, max(found[one] for one in pair))
    return found


def _targets(modules: list[str], names: Iterable[str]) -> list[str] | str:
    """Names, or a pattern where another module's name ends as one of them: to PEFT it would be that one."""
    parts = (name.split(".")[:-1] for name in names)
    known = {".".join(one[:count]) for one in parts for count in range(1, len(one) + 1)} - {*modules}
    if any(one.endswith(f".{module}") for module in modules for one in known):
        return "|".join(module.replace(".", r"\.") for module in modules)
    return modules
