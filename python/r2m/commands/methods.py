"""``r2m methods``: how checkpoints can be merged, by this package and by others that are installed."""

from __future__ import annotations

import json
import shutil
from typing import Any

import click

from r2m.commands.messages import say
from r2m_kernels.config import METHODS, OFFERED
from r2m_kernels.errors import printable
from r2m_kernels.fields import FILES
from r2m_kernels.options import Method


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For scripts: options with their defaults and sentences, too.")
def methods(as_json: bool) -> None:
    """List the methods: what each one does, where it is from, and which options it uses.

    Those of other packages (entry points under r2m_kernels.methods; docs/methods.md) come last. Options about files,
    such as --average, are every method's.
    """
    others, wrong = METHODS.load_others()
    listed = {**OFFERED, **others}
    if as_json:
        click.echo(json.dumps([_plain(one) for one in listed.values()], indent=2, ensure_ascii=False))
    else:
        say(_table(listed.values()))
    for sentence in wrong:
        say(f"Warning: {printable(sentence)}", err=True)


def _table(listed: Any) -> str:
    """Each method's name beside what it does; its source and options below that."""
    rows = []
    for one in listed:
        flags = " ".join(f"--{option.flag}" for option in one.options.values() if option.section != FILES)
        package = one.package and f"of the package {one.package}"
        said = [one.formula, one.paper, package, flags and f"options: {flags}"]
        rows += [(one.name if number == 0 else "", text) for number, text in enumerate(filter(None, said))]
    formatter = click.HelpFormatter(width=min(100, shutil.get_terminal_size().columns))
    formatter.write_dl(rows)
    return formatter.getvalue().rstrip()


def _plain(one: Method) -> dict[str, Any]:
    return {
        "name": one.name,
        "what": one.formula,
        "source": one.paper or None,
        "package": one.package or None,
        "options": {
            key: {"flag": f"--{option.flag}", "default": one.default(key), "what": option.sentence}
            for key, option in one.options.items()
        },
    }


COMMANDS = (methods,)
