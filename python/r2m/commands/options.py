"""What the commands' options share: headings in ``--help``, flags made from tables, those that several have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from r2m.options import RUN
from r2m.recipe import ARRANGEMENT
from r2m_kernels.checks import did_you_mean
from r2m_kernels.config import FLAGS, METHODS, OFFERED
from r2m_kernels.options import Option


class SectionOption(click.Option):
    """An option that ``--help`` lists under a heading."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose ``--help`` groups its options by :attr:`SectionOption.section`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):  # the usage line shows arguments
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def method_name(text: str) -> str:
    """A method by name, also one of a package that was installed since."""
    if text not in METHODS:
        raise click.BadParameter(
            f"{text!r} is not one of {', '.join(map(repr, METHODS))}{did_you_mean(text, METHODS)}."
        )
    return text


def option(section: str, *names: str, **kwargs: Any) -> Callable[[Any], Any]:
    """An option under a heading."""
    # `default` would make an option that was left out look given; the help shows the configuration's defaults.
    return click.option(*names, cls=SectionOption, section=section, **kwargs)


def read_rank(text: str) -> str | int | float:
    """``"16"`` is a rank, ``"0.1"`` and ``"1.0"`` are shares; the configuration refuses other text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read_rank_of(text: str) -> tuple[str, str | int | float]:
    glob, _, rank = text.rpartition("=")
    return glob, read_rank(rank)


# How values of a type are written, where click has no type of its own for them.
_WRITTEN: dict[Any, dict[str, Any]] = {
    float | int: {"type": read_rank},
    int | str: {"type": str},
    tuple[str, ...]: {"type": str, "multiple": True, "metavar": "GLOB"},
    tuple[tuple[str, float | int], ...]: {"type": _read_rank_of, "multiple": True, "metavar": "GLOB=RANK"},
}


def flags(declared: Iterable[Option]) -> Callable[[Any], Any]:
    """Options from a table, in its order; what is left out is None or empty."""

    def add(command: Any) -> Any:
        for one in reversed(list(declared)):
            command = _flag(one)(command)
        return command

    return add


def _flag(declared: Option) -> Callable[[Any], Any]:
    if declared.kind is bool:
        words = f"--{declared.flag}/--no-{declared.flag}" if declared in FLAGS.values() else f"--{declared.flag}"
        return option(declared.section, words, is_flag=True, default=None, help=help_of(declared))
    kind = click.Choice(declared.choices) if declared.choices else declared.kind
    written = {"type": kind, **_WRITTEN.get(declared.kind, {})}
    if declared.metavar:
        written["metavar"] = declared.metavar
    return option(declared.section, f"--{declared.flag}", help=help_of(declared), **written)


def help_of(declared: Option) -> str:
    """A flag's sentence and its defaults."""
    repeat = "  Repeat for each." if _WRITTEN.get(declared.kind, {}).get("multiple") else ""
    defaults = defaults_of(declared)
    return f"{declared.sentence}{repeat}" + (f"  [default: {defaults}]" if defaults else "")


def defaults_of(declared: Option) -> str:
    """``"1; 0.6 in r2m_paper"``: what it is by default, and where it is something else."""
    if declared not in FLAGS.values():  # no method's
        return "" if declared.default is False else declared.shown(declared.default)
    shown: dict[str, list[str]] = {}
    for name, method in OFFERED.items():
        if declared.key in method.options:
            shown.setdefault(declared.shown(method.default(declared.key)), []).append(name)
    usual = next((text for text, names in shown.items() if "r2m" in names or len(shown) == 1), None)
    others = [f"{text} in {', '.join(names)}" for text, names in shown.items() if text != usual]
    return "; ".join(filter(None, [usual, *others]))


def _settle_network(ctx: click.Context, _: click.Parameter, offline: bool) -> None:
    """Keep ``hf://`` paths to the cache."""
    if offline:
        from r2m.checkpoints import hub

        hub.work_offline()


OFFLINE = option(
    RUN,
    "--offline",
    is_flag=True,
    expose_value=False,
    callback=_settle_network,
    help="Of hf://owner/name[@revision][/file] checkpoints, only what is in the cache.",
)
QUIET = option(RUN, "--quiet", is_flag=True, help="Say nothing unless it fails.")


def names(command: Any) -> Any:
    """The options of names, as merge has them."""
    command = click.option("--preset", type=click.Choice(ARRANGEMENT["preset"].choices), help="As of merge.")(command)
    command = click.option("--key", metavar="KEY", help="As of merge.")(command)
    command = click.option("--drop", multiple=True, metavar="OLD", help="As of merge.")(command)
    return click.option("--rename", multiple=True, metavar="OLD=NEW", help="As of merge.")(command)
