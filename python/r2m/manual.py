"""``python -m r2m.manual``: docs/cli.md from the commands themselves."""

from __future__ import annotations

import click

from r2m.commands.main import r2m

_WIDTH = 120


def manual() -> str:
    """Every command's help as Markdown."""
    parts = ["# Commands\n\nWritten by `python -m r2m.manual`, from the code.\n"]
    group = click.Context(r2m, info_name="r2m", terminal_width=_WIDTH, **r2m.context_settings)
    for name in sorted(r2m.commands):
        command = r2m.commands[name]
        context = click.Context(command, parent=group, info_name=name, terminal_width=_WIDTH)
        context.max_content_width = _WIDTH
        parts.append(f"## r2m {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(manual(), end="")
