"""Methods of this package in mergekit's configurations: ``merge_method: r2m``. Written for mergekit 0.1.5.

mergekit asks a method for one tensor at a time, and R²M's core and norms are of all tensors. So the first tensor asked
for makes the whole merge, as ``r2m merge`` does, from the files that mergekit reads; then each is handed out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import (
    BasePolicy,
    BatchOptions,
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    TensorGroup,
    register,
    registered_methods,
)
from mergekit.merge_methods.base import ParameterSpec
from torch import Tensor

from r2m.job import Job, open_job
from r2m.options import Options
from r2m.recipe import ARRANGEMENT, Arrangement, Expert, Recipe
from r2m_kernels import Analysis
from r2m_kernels.config import METHODS, OFFERED, make_config
from r2m_kernels.errors import BadOption, DoesNotFit, quoted
from r2m_kernels.options import Option

LOG = logging.getLogger(__name__)
_PREFIX = "r2m"  # of the names that mergekit knows our methods by: some of theirs are called as ours are
_WEIGHT, _HEAD = "weight", "head"
_SLICES = ".slices["  # in what mergekit calls a row of layers, before it plans its tensors


@dataclass(frozen=True)
class _Asked:
    """What decides a merge, as a tensor's request has it: the same for all tensors of one."""

    base: ModelReference
    weights: tuple[tuple[ModelReference, float], ...]  # of the experts, in their order
    options: tuple[tuple[str, Any], ...]
    device: str

    @property
    def words(self) -> str:
        """Models and parameters for a message."""
        weights = [f"{_WEIGHT}={weight:g} of {model}" for model, weight in self.weights]
        return ", ".join([*(f"{key}={value}" for key, value in self.options), *weights, f"base {self.base}"])


@dataclass
class _Merge:
    """A merge under way: its files, its analysis, and what was merged of it by output type."""

    asked: _Asked
    job: Job
    analysis: Analysis
    merged: dict[torch.dtype | None, dict[str, Tensor]] = field(default_factory=dict)

    def tensor(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """A merged tensor; ``dtype``: of all floating-point ones, None: the base's."""
        if dtype not in self.merged:
            self.merged[dtype] = self.analysis.merge(self.job.arranged.config, dtype=dtype)
        return self.merged[dtype][name]


class Method(MergeMethod):
    """A method of :data:`r2m_kernels.config.METHODS` as mergekit calls them.

    Its parameters are the method's options that are single values, by the names of a recipe; ``head``, the rule for the
    classifier; and ``weight`` of each model, by default 1.

    Args:
        name: of the method, here.
    """

    def __init__(self, name: str) -> None:
        self.name, self._lock = name, threading.Lock()
        self._planned: set[str] = set()
        self._merge: _Merge | None = None
        described = METHODS[name]
        parameters = [_parameter(key, one) for key, one in described.options.items() if _single(one)]
        self.spec = MergeMethodSpec(
            name=name if name.startswith(_PREFIX) else f"{_PREFIX}_{name}",
            pretty_name=described.title,
            reference_url="https://arxiv.org/abs/2509.24367" if name == _PREFIX else None,
            parameters=(
                *parameters,
                _parameter(_HEAD, ARRANGEMENT[_HEAD]),
                ParameterSpec(_WEIGHT, float, ParameterScope.NON_BASE, default=1.0),
            ),
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        )

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        """Also takes down what mergekit plans: slices of models when a merge begins, then tensor by tensor."""
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        with self._lock:
            if group_name is not None and _SLICES in group_name:
                self._planned, self._merge = set(), None
            elif group_name is not None:
                self._planned.add(group_name)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        made = (self._tensor(group, given) for group, given in zip(groups, parameters, strict=True))
        return tuple(tensor if out_dtype is None else tensor.to(out_dtype) for tensor in made)

    def _tensor(self, group: TensorGroup, parameters: Mapping[str, Any]) -> Tensor:
        """The merged tensor for a group, on its device.

        Raises:
            BadOption: it asks for another merge than the tensors before it.
            DoesNotFit: what mergekit hands over is not the tensor of that name in the models' files.
        """
        name, base = str(group.metadata.name), group.base
        if base is None or not all(isinstance(entry.id, ModelReference) for entry in group.entries):
            raise BadOption(f"{self.spec.name}: expected models by their paths; r2m_kernels.merge merges state dicts")
        asked = _Asked(
            base.id,
            tuple((entry.id, parameters[_WEIGHT][entry.id]) for entry in group.non_base),
            tuple((key, value) for key, value in parameters.items() if key != _WEIGHT and value is not None),
            str(base.tensor.device),
        )
        with self._lock:
            merge = self._merge = self._merge or self._begin(asked)
            if merge.asked != asked:
                raise BadOption(
                    f"{self.spec.name}: tensor {quoted(name)} is asked for with {asked.words}, others with "
                    f"{merge.asked.words}; expected the same for all, since core and norms are of all tensors"
                )
            for entry, source in zip((base, *group.non_base), merge.job.sources, strict=True):
                stored = source.read(name) if name in source.specs else None
                # Also where layers were stacked anew, or rows of an embedding moved: no file holds such a model.
                if stored is None or not torch.equal(stored.to(entry.tensor), entry.tensor):
                    raise DoesNotFit(
                        f"{self.spec.name}: tensor {quoted(name)} as mergekit has it is not the one of that name in "
                        f"{source.label}; expected whole models, without slices of other layers or a new vocabulary"
                    )
            asked_for = base.tensor.dtype  # the configuration's dtype, if it has one
            same = merge.job.sources[0].specs[name].dtype == asked_for
            return merge.tensor(name, None if same else asked_for).to(base.tensor.device)

    def _begin(self, asked: _Asked) -> _Merge:
        options = dict(asked.options)
        arrangement = Arrangement(head=options.pop(_HEAD, None))
        config = make_config(self.name, options)
        weights = tuple(weight for _, weight in asked.weights)
        if len(set(weights)) > 1:
            config = config.replace(weights=weights)
        experts = {str(model): Expert(_place(model)) for model, _ in asked.weights}
        recipe = Recipe(_place(asked.base), experts, config, self.name, arrangement=arrangement)
        job = open_job(recipe, Options(device=asked.device))
        if left_out := job.sources[0].specs.keys() - self._planned:
            raise DoesNotFit(
                f"{self.spec.name}: mergekit's architecture for {job.sources[0].label} leaves out {len(left_out)} of "
                f"{len(job.sources[0].specs)} tensors, {quoted(min(left_out))} among them; `r2m merge` takes them all"
            )
        analysis = job.analyze()
        LOG.info("%s", analysis.report(job.arranged.config))
        return _Merge(asked, job, analysis)


def _place(model: ModelReference) -> str:
    """The directory that mergekit reads a model from; of one with a LoRA, where it was merged into it."""
    return str(LoaderCache().get(model).index.base_path)


def _single(declared: Option) -> bool:
    """Whether a value is one word or number: a list is a gradient over layers to mergekit."""
    return bool(declared.choices) or declared.kind in (bool, int, float, str, float | int)


def _parameter(key: str, declared: Option) -> ParameterSpec:
    kind = str if declared.choices else declared.kind
    return ParameterSpec(key, kind | None, ParameterScope.SHARED, default=None, description=declared.sentence)


def register_all() -> None:
    """Make the methods known to mergekit, once."""
    known = {one.spec.name for one in registered_methods()}
    for method in map(Method, OFFERED):
        if method.spec.name not in known:
            register(method)
