"""Which of a training script's values are the weights: a state dict at the top of a file, or under one of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from r2m.checkpoints.layout import some
from r2m_kernels.errors import BadCheckpoint, printable, quoted

T = TypeVar("T")

# Under which keys training scripts put the weights, when they save more than those; the first that is there counts.
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "module",
    "params_ema",
    "params",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
    "teacher",
)
_DEEPEST = 3  # mappings within one another where a state dict is looked for
_SHOWN = 80  # letters of a key in a message, and of one that a state dict is under


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """The weights.

    Attributes:
        tensors: by name, in the file's order.
        key: what they lay under, with dots; empty at the top.
        notes: what was left out, a clause for each.
    """

    tensors: dict[str, T]
    key: str
    notes: tuple[str, ...] = ()


def chosen(loaded: Any, what: str, kind: type[T], key: str | None = None) -> Chosen[T]:
    """The weights in what a file holds. Entries beside them that are no tensors are left out.

    Args:
        loaded: all of it.
        what: how error messages name the file.
        kind: of tensors.
        key: what they lie under, where that was said; in files that have no such key it says nothing.

    Raises:
        BadCheckpoint: there is no state dict, or none can be chosen.
    """
    if not isinstance(loaded, Mapping):
        got = "one tensor" if isinstance(loaded, kind) else type(loaded).__name__
        raise BadCheckpoint(f"{what}: expected a state dict, got {got}")

    def has_tensors(value: Any) -> bool:
        return any(isinstance(name, str) and isinstance(one, kind) for name, one in value.items())

    there = _mappings(loaded)
    sizes = {path: sum(_is_entry(*one, kind) for one in value.items()) for path, value in there.items()}
    if key in there:
        where = key
        if not sizes[key]:
            raise BadCheckpoint(f"{what}: what is under {quoted(key)} holds no tensors by name (--key)")
    else:
        known = sorted((path for path in there if sizes[path] and _rank(path)[0] < len(WRAPPERS)), key=_rank)
        # Tensors beside the weights are the training's, such as the centre of SVDD.
        where = next((path for path in known if sizes[path] > sizes[""]), "")
        if not sizes[where]:
            _refuse(loaded, what, {path: size for path, size in sizes.items() if size})
    state = there[where]
    tensors = {name: one for name, one in state.items() if _is_entry(name, one, kind)}
    others = [path for path, one in there.items() if path not in ("", where) and sizes[path]]
    notes = [
        f"weights under {quoted(path)} are left out (--key {printable(path)} takes those)"
        for path in others
        if not tensors.keys().isdisjoint(there[path])
    ]
    # Such as torch_ema's: as many as the weights, or of those that are trained. One look at each, however long it is.
    unnamed = [
        f"{path}.{name}" if path else str(name)
        for path, one in there.items()
        for name, value in one.items()
        if isinstance(value, list | tuple) and value and isinstance(value[0], kind) and 2 * len(value) >= len(tensors)
    ]
    notes += [f"tensors without names under {quoted(path[:_SHOWN])} are left out: others' weights?" for path in unnamed]
    stray = [str(name)[:_SHOWN] for name in state if name not in tensors]
    if stray:
        notes.append(f"{some(stray)} {'are' if stray[1:] else 'is'} left out, as no tensor")
    return Chosen(tensors, where, tuple(notes))


def _is_entry(name: Any, value: Any, kind: type) -> bool:
    """Whether something is a tensor by name."""
    return isinstance(name, str) and isinstance(value, kind)


def _mappings(loaded: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """A mapping and those in it, by their keys with dots: outer ones first, each once however often it is there.

    One that is under several keys is found under one that is known to hold weights.
    """
    found: dict[str, Mapping[Any, Any]] = {"": loaded}
    seen, level = {id(loaded)}, dict(found)
    for _ in range(_DEEPEST):
        inner: dict[str, Mapping[Any, Any]] = {}
        for path, one in level.items():
            for name, value in sorted(one.items(), key=lambda entry: entry[0] not in WRAPPERS):
                known = not isinstance(value, Mapping) or id(value) in seen
                if not known and isinstance(name, str) and len(name) <= _SHOWN:
                    seen.add(id(value))
                    inner[f"{path}.{name}" if path else name] = value
        found |= inner
        level = inner
    return found


def _rank(path: str) -> tuple[int, int]:
    """How likely weights are under a key: all of its parts are known ones, and the earlier the better."""
    ranks = [WRAPPERS.index(part) if part in WRAPPERS else len(WRAPPERS) for part in path.split(".")]
    return max(ranks) if len(WRAPPERS) in ranks else ranks[0], len(ranks)


def _refuse(loaded: Mapping[Any, Any], what: str, held: Mapping[str, int]) -> NoReturn:
    if held:
        listed = some([f"{path} ({size})" for path, size in held.items()])
        raise BadCheckpoint(
            f"{what}: holds tensors under {listed}; expected one of {WRAPPERS[0]}, {WRAPPERS[1]}, …: "
            f"say which with --key {printable(next(iter(held)))}"
        )
    keys = some([str(key)[:_SHOWN] for key in loaded]) or "nothing"
    raise BadCheckpoint(f"{what}: holds no tensors by name, neither at the top nor under its keys; it has {keys}")
