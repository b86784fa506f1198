"""Methods of this package as an algorithm of fusion_bench, ``method=r2m``. Written for fusion-bench 0.2.33."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool
from fusion_bench.mixins import auto_register_config
from fusion_bench.models.utils import (
    get_target_state_dict,
    load_state_dict_into_target_modules,
    validate_target_modules_equal,
)
from torch import nn

from r2m_kernels import analyze
from r2m_kernels.config import make_config
from r2m_kernels.errors import BadOption

LOG = logging.getLogger(__name__)


@auto_register_config
class R2MAlgorithm(BaseAlgorithm):
    """A merge of a pool's models on its pretrained one.

    Args:
        method: a key of :data:`r2m_kernels.config.METHODS`.
        options: of the method, by the flags of ``r2m merge``.
        weights: one positive number per model, in the pool's order; None: equal ones.
        device: where to compute; None: where the pretrained model is.
        backend, memory_budget: of :func:`r2m_kernels.merge`.
    """

    def __init__(
        self,
        method: str = "r2m",
        options: Mapping[str, Any] | None = None,
        weights: Sequence[float] | None = None,
        device: str | None = None,
        backend: str = "auto",
        memory_budget: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Before any model is loaded, and as plain values: what comes from a configuration file is none.
        self._merge = make_config(method, {key: _plain(value) for key, value in (options or {}).items()})
        if weights is not None:
            self._merge = self._merge.replace(weights=tuple(weights))

    @torch.no_grad()
    def run(self, modelpool: BaseModelPool | Mapping[str, nn.Module]) -> nn.Module:
        """The pretrained model with merged weights: a copy where the pool holds models and not their paths.

        Raises:
            BadOption: there is no pretrained model.
            InvalidInput: as :func:`r2m_kernels.merge`.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(dict(modelpool))
        if not pool.has_pretrained:
            raise BadOption(f"modelpool: expected a model named _pretrained_, got {', '.join(pool.all_model_names)}")
        base = pool.load_pretrained_model()
        models = dict(pool.named_models())
        validate_target_modules_equal([base, *models.values()])
        analysis = analyze(
            get_target_state_dict(base),
            {name: get_target_state_dict(model) for name, model in models.items()},
            self._merge,
            device=self.device,
            backend=self.backend,
            memory_budget=self.memory_budget,
        )
        merged = analysis.merge()
        LOG.info("%s", analysis.report())
        result: nn.Module = deepcopy(base) if pool.has_instance_models else base
        load_state_dict_into_target_modules(result, merged)
        return result


def _plain(value: Any) -> Any:
    """Without the containers of a configuration file."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
