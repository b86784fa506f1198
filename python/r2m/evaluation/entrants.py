"""Who is judged: what was asked for, the specialists of merges, adapters one by one, and finished scores."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from r2m.checkpoints.adapter_config import CONFIG
from r2m.evaluation.comparison import merged
from r2m.evaluation.ensemble import Ensemble
from r2m.evaluation.models import Fake, fake_of, kind_of, load, preprocessing_of
from r2m.evaluation.request import Request
from r2m.naming import named, split
from r2m.preprocessing import Preprocessing
from r2m_kernels.errors import BadFile, BadOption, printable, quoted


@dataclass(frozen=True)
class Chosen:
    """Whom a request names, itself or by the recipe of a merge.

    Attributes:
        models: name → a checkpoint.
        adapters: name → the output of a merge with adapters.
        scores: name → a file of finished scores.
        merges: a specialist's path → the merge beside which it is judged.
        untold: lines on specialists that are not.
    """

    models: Mapping[str, str]
    adapters: Mapping[str, str]
    scores: Mapping[str, str]
    merges: Mapping[str, str]
    untold: list[str]

    @property
    def checkpoints(self) -> dict[str, str]:
        """Those that are run."""
        return {**self.models, **self.adapters}


@dataclass(frozen=True)
class Entrant:
    """Who has a row in the table.

    Attributes:
        path: of the checkpoint, or of the scores.
        model: that is run; None: one of an ensemble's adapters, or finished scores.
        preprocessing: of who is run, alone or in an ensemble.
        files: directories of what it takes, beside ``path``.
        detector: how it is loaded.
        fake: which of its outputs is the fake's.
    """

    path: str
    model: nn.Module | Ensemble | None = None
    preprocessing: Preprocessing | None = None
    files: tuple[str, ...] = field(default=())
    detector: str | None = None
    fake: Fake | None = None


def chosen(request: Request) -> Chosen:
    """Whom it names.

    Raises:
        InvalidInput: names that are given twice, or what is taken for a merge and is none.
    """
    found, merges, untold = _specialists(request)
    given = [
        [*map(split, (*request.merged, *request.models)), *found.items()],
        list(map(split, request.adapters)),
        list(map(split, request.scores)),
    ]
    each = iter(named([one for kind in given for one in kind]).items())
    models, adapters, scores = (dict(itertools.islice(each, len(kind))) for kind in given)
    return Chosen(models, adapters, scores, merges, untold)


def load_all(who: Chosen, request: Request) -> dict[str, Entrant]:
    """All of them, each ensemble followed by its adapters, in the order of the table.

    Raises:
        InvalidInput: one cannot be loaded, its preprocessing is not known, or two would have one name.
    """
    merge = next((split(one)[1] for one in request.merged), None)
    of = {path: who.merges.get(path, merge) for path in who.checkpoints.values()}
    kinds = {name: kind_of(name, path, request, of[path]) for name, path in who.checkpoints.items()}
    preprocessings = {
        name: preprocessing_of(name, path, request, who.merges.get(path)) for name, path in who.checkpoints.items()
    }
    entered: dict[str, Entrant] = {}
    for name, path in who.checkpoints.items():
        model = load(name, path, request, name in who.adapters, of[path])
        about = kinds[name], fake_of(name, path, request, of[path])
        members = model.paths if isinstance(model, Ensemble) else {}
        entered[name] = Entrant(path, model, preprocessings[name], tuple(members.values()), *about)
        for member, place in members.items():
            twice = f"{name}/{member}"
            if twice in {**who.checkpoints, **who.scores}:
                raise BadOption(f"model {quoted(twice)}: is also an adapter's name, of {quoted(name)}; give it another")
            entered[twice] = Entrant(place, None, preprocessings[name], (), *about)
    return entered | {name: Entrant(path) for name, path in who.scores.items()}


def _specialists(request: Request) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """By name what merges were made of, by its path the merge, and lines on those that are not run."""
    found: dict[str, str] = {}
    of: dict[str, str] = {}
    lines = []
    asked = [split(one) for one in (*request.merged, *request.models, *request.adapters, *request.scores)]
    names, taken = {name for name, _ in asked}, {os.path.realpath(path): path for _, path in asked}
    for argument in request.merged:
        path = split(argument)[1]
        recipe = merged(path)
        if recipe is None:
            raise BadFile(f"{path}: expected the output of a merge; a checkpoint that is none is given by --model")
        for name, expert in recipe.experts.items():
            why = "is not there" if not os.path.exists(expert) else "is an adapter" if _is_adapter(expert) else ""
            if why:
                lines.append(f"not beside it: {printable(name)}, of {printable(path)}: {printable(expert)} {why}")
            elif os.path.realpath(expert) in taken:
                of.setdefault(taken[os.path.realpath(expert)], path)
            else:
                taken[os.path.realpath(expert)] = expert
                numbered = (f"{name}#{number}" for number in itertools.count(2))
                free = next(one for one in itertools.chain([name], numbered) if one not in {*names, *found})
                found[free], of[expert] = expert, path
    return found, of, lines


def _is_adapter(path: str) -> bool:
    return os.path.isfile(os.path.join(path, CONFIG))
