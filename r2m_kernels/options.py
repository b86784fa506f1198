"""Options and methods as tables: each is declared once, where its value lives.

:func:`option` makes a field of a dataclass and says what checks, docstring, command and README have to know of it;
:func:`method` marks a classmethod that makes a configuration. :func:`read_options` and :func:`read_methods` collect
them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from . import checks
from .errors import BadOption

T = TypeVar("T")
Check = Callable[[str, Any], Any]
_DECLARED = "r2m"  # of a field's metadata, and the mark of a method


@dataclass(frozen=True)
class Option:
    """What is known of an option, and what a value of it is checked by.

    Attributes:
        name: of the field.
        kind: its type, without None.
        default: of the field.
        optional: whether it may be None.
        section: the heading it stands under; empty: it has no flag, and methods set it.
        sentence: what it is, for everybody.
        note: what only readers of documentation need.
        flag: of the command, without dashes.
        metavar: what the help calls its value; default: its type.
        unset: what an empty value means, in a few words.
        minimum: of a number.
        choices: all values it may have, of its type if that lists them; none where they cannot be listed.
        check: gives a value, whose name comes first, as the field has it; default: what the type asks for.
        free: what was analyzed with one value may be merged with another.
    """

    name: str
    kind: Any
    default: Any
    optional: bool
    section: str
    sentence: str
    note: str = ""
    flag: str = ""
    metavar: str | None = None
    unset: str = ""
    minimum: int | None = None
    choices: tuple[str, ...] = ()
    check: Check | None = None
    free: bool = False

    @property
    def key(self) -> str:
        """Its name among options of the command: the flag's."""
        return self.flag.replace("-", "_")

    @property
    def text(self) -> str:
        """Sentence, note and choices."""
        listed = f"One of {', '.join(self.choices)}." if self.choices else ""
        return " ".join(filter(None, [self.sentence, self.note, listed]))

    def checked(self, value: Any) -> Any:
        """The value as the field has it.

        Raises:
            BadOption: a wrong type or value.
        """
        return value if value is None and self.optional else (self.check or self._of_its_kind)(self.name, value)

    def _of_its_kind(self, name: str, value: Any) -> Any:
        if self.choices:
            return checks.choice(name, value, self.choices)
        if self.kind is bool:
            return checks.boolean(name, value)
        if self.kind is int:
            return checks.integer(name, value, self.minimum)
        if self.kind is float:
            return checks.number(name, value, self.minimum)
        if self.kind is str:
            return checks.text(name, value)
        if self.kind == tuple[str, ...]:
            return checks.globs(name, value)
        raise TypeError(f"{name}: no check is known for {self.kind}")

    def shown(self, value: Any) -> str:
        """A value as help and tables have it; what is empty is not shown."""
        if value is None or value == ():
            return self.unset
        if isinstance(value, tuple):
            return ", ".join(map(str, value))
        if isinstance(value, bool):
            return ("" if value else "no-") + self.flag
        return f"{value:g}" if self.kind is float else str(value)


def normalize(instance: Any, options: Mapping[str, Option]) -> None:
    """Every field as its option has it: of a frozen dataclass, in ``__post_init__``.

    Raises:
        BadOption: a wrong type or value.
    """
    for name, declared in options.items():
        object.__setattr__(instance, name, declared.checked(getattr(instance, name)))


def flag(key: str) -> str:
    """An option as the command line has it."""
    return "--" + key.replace("_", "-")


def option(default: T, section: str, sentence: str, note: str = "", **more: Any) -> T:
    """A field of a dataclass that is an option.

    Args:
        default: its value where none is given.
        section, sentence, note, more: of :class:`Option`.
    """
    declared = {"section": section, "sentence": sentence, "note": note, **more}
    return dataclasses.field(default=default, metadata={_DECLARED: declared})


def read_options(cls: type[Any]) -> dict[str, Option]:
    """The options of a dataclass by the names of its fields; types and choices are those of the annotations."""
    types_of, options = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if _DECLARED in field.metadata:
            members = _members(types_of[field.name])
            known = [member for member in members if member is not type(None)]
            kind = functools.reduce(operator.or_, known)
            listed = get_args(kind) if get_origin(kind) is Literal else ()
            declared = {"flag": field.name.replace("_", "-"), "choices": listed, **field.metadata[_DECLARED]}
            options[field.name] = Option(field.name, kind, field.default, len(known) < len(members), **declared)
    return options


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def documented(cls: type[Any], options: Mapping[str, Option]) -> str:
    """The docstring of a class with its ``Attributes``."""
    lines = ["Attributes:"]
    for one in options.values():
        lines += textwrap.wrap(f"{one.name}: {one.text}", 116, initial_indent="    ", subsequent_indent=" " * 8)
    summary, _, rest = (inspect.getdoc(cls) or "").partition("\n\n")
    return "\n\n".join([summary, "\n".join(lines), rest])


@dataclass(frozen=True)
class Method:
    """A merge method: a constructor of the configuration.

    Attributes:
        name: the constructor's.
        make: the constructor.
        options: all that it uses, by key.
        formula: what it computes, in a few words.
        paper: its name in the field, and where it is from.
        instead: what is to be written today; a method that has it is in no help.
        package: that brings it, where it is not this one.
    """

    name: str
    make: Callable[..., Any]
    options: Mapping[str, Option]
    formula: str
    paper: str = ""
    instead: str = ""
    package: str = ""

    @property
    def former(self) -> str:
        """Why nobody should ask for it any more; empty where nothing is against it."""
        return f"the method {self.name} goes: write {self.instead} instead" if self.instead else ""

    @property
    def title(self) -> str:
        """The method in a few words, with its source."""
        return f"{self.formula} ({self.paper})" if self.paper else self.formula

    def default(self, key: str) -> Any:
        """What an option is that is not given."""
        parameters = parameters_of(self.make)
        return parameters[key] if key in parameters else getattr(self.make(), self.options[key].name)

    def configure(self, given: Mapping[str, Any]) -> Any:
        """The configuration with options by key.

        Raises:
            BadOption: an option that the method does not use, or a bad value.
        """
        for key in given:
            if key not in self.options:
                used = ", ".join(map(flag, sorted(self.options)))
                raise BadOption(f"{flag(key)}: not used by the method '{self.name}', which uses {used}")
        arguments = {key: value for key, value in given.items() if key in parameters_of(self.make)}
        fields = {self.options[key].name: value for key, value in given.items() if key not in arguments}
        return self.make(**arguments).replace(**fields)


def parameters_of(make: Callable[..., Any]) -> dict[str, Any]:
    """A constructor's own, with their defaults."""
    parameters = inspect.signature(make).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}


def uses_of(make: Callable[..., Any]) -> tuple[str, ...]:
    """What it was marked to use beside its parameters."""
    declared: tuple[str, str, tuple[str, ...], str] = getattr(make, _DECLARED, ("", "", (), ""))
    return declared[2]


def method(formula: str, paper: str = "", uses: Iterable[str] = (), instead: str = "") -> Callable[[T], T]:
    """Marks a function that makes a configuration, under ``classmethod``.

    Args:
        formula, paper, instead: of :class:`Method`.
        uses: keys or sections of options that it uses beside its parameters.
    """

    def mark(function: T) -> T:
        setattr(function, _DECLARED, (formula, paper, tuple(uses), instead))
        return function

    return mark


def read_methods(cls: type[Any], options: Mapping[str, Option], common: str) -> dict[str, Method]:
    """The methods of a class by name.

    Args:
        cls: whose classmethods they are.
        options: by key.
        common: the section of options that every method uses.
    """
    methods = {}
    for name, value in vars(cls).items():
        if hasattr(getattr(value, "__func__", None), _DECLARED):
            methods[name] = make_method(name, getattr(cls, name), options, common)
    return methods


def make_method(name: str, make: Callable[..., Any], options: Mapping[str, Option], common: str) -> Method:
    """A method from a function that makes a configuration; :func:`method` may have marked it.

    Args:
        name: of the method.
        make: the function; its parameters are options by key.
        options, common: as :func:`read_methods` has them.
    """
    first = (inspect.getdoc(make) or name).partition("\n")[0].rstrip(".")
    formula, paper, uses, instead = getattr(make, _DECLARED, (first, "", (), ""))
    words = {common, *uses, *parameters_of(make)}
    used = {key: one for key, one in options.items() if key in words or one.section in words}
    return Method(name, make, used, formula, paper, instead)
