"""The order in which commands are used, and what each one shows when it is done: the next step."""

from __future__ import annotations

import click

from r2m_kernels.errors import printable

# Command → what is given to it in the usual case, step by step.
WAY = {
    "init": "BASE fs=FS.pth fr=FR.pth",
    "inspect": "BASE FS.pth FR.pth --norms",
    "plan": "recipe.yaml --out merged",
    "merge": "recipe.yaml --out merged",
    "evaluate": "merged --data PICTURES --out evaluated",
    "detect": "merged PICTURE…",
    "report": "merged --evaluation evaluated",
    "add": "merged --expert NEW=NEW.pth",
}
_LATER = ("remove", "sweep", "calibrate", "methods", "card", "convert", "relink", "schema", "demo")
ORDER = (*WAY, *_LATER)


class WayGroup(click.Group):
    """A group whose help begins with the way through it, and lists commands in the order of use, none cut short."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use; what has no place in it comes last."""
        return sorted(self.commands, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The way, and every command with its whole first sentence."""
        commands = {name: self.commands[name] for name in self.list_commands(ctx)}
        with formatter.section("The way"):
            formatter.write_dl([(f"r2m {name}", words) for name, words in WAY.items() if name in commands])
        with formatter.section("Commands, in this order"):
            formatter.write_dl([(name, _sentence(command)) for name, command in commands.items()])


def _sentence(command: click.Command) -> str:
    """The first paragraph of a command's help."""
    return " ".join((command.help or "").partition("\n\n")[0].split())


def evaluation_of(out: str) -> str:
    """Where an output's evaluation may go: beside it, also where a slash ends its path."""
    return f"{out.rstrip('/') or out}.evaluation"


def following(command: str, *words: str) -> str:
    """``"Next: r2m merge recipe.yaml --out merged"``."""
    return f"Next: r2m {command} {' '.join(map(printable, words))}"
