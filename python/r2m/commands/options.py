"""What the commands' options share: headings in ``--help``, and those that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

FILES, METHOD, REAL, TRUNCATION, STRENGTH, RUN = (
    "Files",
    "Method",
    "Real subspace",
    "Residual truncation",
    "Strength of the residuals",
    "Running",
)


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


def option(section: str, *names: str, **kwargs: Any) -> Callable[[Any], Any]:
    """An option under a heading."""
    # `default` would make an option that was left out look given; the help shows the defaults of MergeConfig.
    return click.option(*names, cls=SectionOption, section=section, **kwargs)


def choice(*choices: str) -> click.Choice[str]:
    """The type of an option with choices."""
    return click.Choice(choices)


def settle_network(ctx: click.Context, _: click.Parameter, offline: bool) -> None:
    """Keep ``hf://`` paths to the cache."""
    if offline:
        from r2m import hub

        hub.work_offline()


OFFLINE = click.option(
    "--offline", is_flag=True, expose_value=False, callback=settle_network, help="Of hf:// paths, the cache alone."
)
