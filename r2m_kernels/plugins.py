"""Methods that other packages bring, under the entry point group :data:`GROUP`; docs/methods.md shows how.

Names are known without loading anything. A package is loaded when its method is asked for, and what is wrong with it is
one sentence then: it stands in nobody else's way.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .checks import did_you_mean
from .errors import BadOption, R2MError, printable, quoted
from .options import Method, Option, make_method, parameters_of, uses_of

GROUP = "r2m_kernels.methods"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@functools.cache
def offered() -> dict[str, tuple[importlib.metadata.EntryPoint, ...]]:
    """Name → the entry points that offer it, of all that is installed."""
    points: dict[str, tuple[importlib.metadata.EntryPoint, ...]] = {}
    try:
        for point in sorted(importlib.metadata.entry_points(group=GROUP), key=_package):
            points[point.name] = (*points.get(point.name, ()), point)
    except Exception:  # metadata of some package that cannot be read, which is none of ours
        return {}
    return points


def _package(point: importlib.metadata.EntryPoint) -> str:
    return printable(point.dist.name if point.dist is not None else point.value)


class Methods(Mapping[str, Method]):
    """Methods by name: our own, and those of installed packages, loaded when they are asked for.

    Args:
        own: ours.
        options: by key; what a method may use.
        common: the section of options that every method uses.
        kind: what a method makes.
    """

    def __init__(self, own: Mapping[str, Method], options: Mapping[str, Option], common: str, kind: type[Any]) -> None:
        self._own, self._options, self._common, self._kind = own, options, common, kind

    @property
    def others(self) -> list[str]:
        """Names that other packages offer; whether they can be had shows when they are asked for."""
        return [name for name in offered() if name not in self._own and _NAME.fullmatch(name)]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self.others])

    def __len__(self) -> int:
        return len(self._own) + len(self.others)

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self.others

    def __getitem__(self, name: str) -> Method:
        """A method.

        Raises:
            KeyError: there is none of that name.
            BadOption: the package that offers it is broken.
        """
        if name in self._own:
            return self._own[name]
        if name not in self:
            raise KeyError(name)
        return self._loaded(name)

    def load_others(self) -> tuple[dict[str, Method], list[str]]:
        """What other packages offer, and a sentence on each that cannot be had."""
        loaded, wrong = {}, []
        for name, points in offered().items():
            what = f"method {quoted(name)} of the package {_package(points[0])}"
            if name in self._own:
                wrong.append(f"{what}: there is one of that name here; expected another name")
            elif not _NAME.fullmatch(name):
                wrong.append(f"{what}: expected a name of letters, digits and _")
            else:
                try:
                    loaded[name] = self[name]
                    loaded[name].configure({})
                except BadOption as error:
                    wrong.append(str(error))
        return loaded, wrong

    def _loaded(self, name: str) -> Method:
        point, *more = offered()[name]
        what = f"method {quoted(name)} of the package {_package(point)}"
        if more:
            raise BadOption(f"{what}: the package {_package(more[0])} offers it too; expected one of them")
        with _told(what):
            made = point.load()
            if isinstance(made, Method):
                return replace(made, name=name, package=_package(point))
            if not callable(made):
                kind = self._kind.__name__
                raise BadOption(f"expected a function that returns a {kind}, got {type(made).__name__}")
            self._check(made)
            method = make_method(name, self._guarded(what, made), self._options, self._common)
        return replace(method, package=_package(point))

    def _check(self, make: Callable[..., Any]) -> None:
        """Refuse what no command line or recipe could give."""
        sections = {one.section for one in self._options.values()}
        for word, default in parameters_of(make).items():
            if word not in self._options:
                near = did_you_mean(word, self._options)
                raise BadOption(f"its parameter {quoted(word)} is no option of the command{near}")
            if default is inspect.Parameter.empty:
                raise BadOption(f"its parameter {quoted(word)} has no default")
        for word in uses_of(make):
            if word not in self._options and word not in sections:
                raise BadOption(f"it uses {quoted(word)}, which is no option{did_you_mean(word, self._options)}")

    def _guarded(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its failures as sentences."""

        @functools.wraps(function)
        def make(*arguments: Any, **given: Any) -> Any:
            with _told(what):
                made = function(*arguments, **given)
                if not isinstance(made, self._kind):
                    raise BadOption(f"expected a {self._kind.__name__} of it, got {type(made).__name__}")
            return made

        return make


class _told:
    """In the block every failure becomes one sentence about ``what``."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, R2MError):
            raise BadOption(str(error) if str(error).startswith(self._what) else f"{self._what}: {error}") from None
        if isinstance(error, Exception | SystemExit):
            said = printable(f"{type(error).__name__}: {error}".removesuffix(": "))
            raise BadOption(f"{self._what}: cannot be used: {said}") from None
