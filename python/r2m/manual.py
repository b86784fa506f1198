"""``python -m r2m.manual``: docs/cli.md, docs/files.md and tables of other pages, from the code itself."""

from __future__ import annotations

import inspect
from pathlib import Path

import click

from r2m.commands.main import r2m
from r2m.commands.options import defaults_of
from r2m.commands.process import EXIT_CODES
from r2m.evaluation.layouts import LAYOUTS
from r2m.evaluation.metrics import METRICS
from r2m.records import RECORDS, SEAL, SEALED, VERSION
from r2m_kernels.config import OFFERED, MergeConfig
from r2m_kernels.fields import OPTIONS

_WIDTH = 120
FILES = f"""
    JSON files have a `{VERSION}`. A key more does not change it; a key that goes or means something else does, and a
    file of a newer version than the command knows is refused. In keys a dot leads to what is in an object, and `*`
    stands for a name or for each entry of a list.
"""
BEGIN, END = "<!-- {}:begin, written by `python -m r2m.manual` -->", "<!-- {}:end -->"


def commands() -> str:
    """Every command's help as Markdown."""
    parts = ["# Commands\n\nWritten by `python -m r2m.manual`, from the code.\n"]
    group = click.Context(r2m, info_name="r2m", terminal_width=_WIDTH, **r2m.context_settings)
    for name in r2m.list_commands(group):
        command = r2m.commands[name]
        context = click.Context(command, parent=group, info_name=name, terminal_width=_WIDTH)
        context.max_content_width = _WIDTH
        parts.append(f"## r2m {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def methods() -> str:
    """What there is, for who merges."""
    return _table(["`--method`", "result"], [[f"`{name}`", one.title] for name, one in OFFERED.items()])


def configurations() -> str:
    """The same for who reads the maths: each by what it changes in R²M or, where that is less, in the mean."""
    made = {name: one.make().to_dict() for name, one in OFFERED.items()}
    rows = []
    for name, one in OFFERED.items():
        changes = {
            other: [f"{key}={value!r}" for key, value in made[name].items() if value != made[other][key]]
            for other in ("r2m", "weight_average")
            if other != name and (other == "r2m" or not name.startswith("r2m_"))
        }
        other, least = min(changes.items(), key=lambda item: len(item[1]))
        text = "the defaults" if name == "r2m" else f"`{other}` with `{', '.join(least)}`"
        rows.append([f"`{name}`", (inspect.getdoc(one.make) or "").partition("\n")[0].replace("``", "`"), text])
    return _table(["method", "what it is", "as a configuration"], rows)


def options() -> str:
    """Fields of the configuration."""
    rows = []
    for name, one in OPTIONS.items():
        flag = f"`--{one.flag}`" if one.section else "–"
        rows.append([f"`{name}`", flag, defaults_of(one) if one.section else one.shown(one.default), one.text])
    return _table([f"field of `{MergeConfig.__name__}`", "flag", "default", "what it is"], rows)


def files() -> str:
    """What commands leave behind: files for scripts, and exit codes."""
    parts = ["# Files and exit codes\n\nWritten by `python -m r2m.manual`, from the code.\n"]
    parts.append(f"{inspect.cleandoc(FILES)}\n")
    for one in RECORDS:
        keys = {VERSION: str(one.version), **one.keys, **({SEAL: SEALED} if one.sealed else {})}
        table = _table(["key", "what it says"], [[f"`{key}`", text] for key, text in keys.items()])
        parts.append(f"## {one.file}\n\n{one.title[0].upper()}{one.title[1:]}.\n\n{table}\n")
    codes = [[str(code), text] for code, text in EXIT_CODES.items()]
    parts.append(f"## Exit codes\n\nOf every command.\n\n{_table(['code', 'meaning'], codes)}\n")
    return "\n".join(parts)


def layouts() -> str:
    """What ``r2m evaluate --data`` reads."""
    rows = [[one.suites, one.shape, one.datasets] for one in LAYOUTS]
    return _table(["as of", "what lies there", "a dataset is"], rows)


def judged() -> str:
    """What ``r2m evaluate`` measures."""
    rows = [
        [f"`{name}`", one.heading, "more" if one.better > 0 else "less", one.meaning] for name, one in METRICS.items()
    ]
    return _table(["key, of `--columns` too", "heading", "better is", "what it is"], rows)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def pages(root: Path) -> dict[Path, str]:
    """File → what it should say, of all that has a part from the code.

    Args:
        root: of the repository.
    """
    tables = {
        root / "docs" / "methods.md": {"methods": methods()},
        root / "docs" / "evaluation.md": {"layouts": layouts(), "metrics": judged()},
        root / "r2m_kernels" / "README.md": {"configurations": configurations(), "options": options()},
    }
    written = {root / "docs" / "cli.md": commands(), root / "docs" / "files.md": files()}
    for path, sections in tables.items():
        text = path.read_text(encoding="utf-8")
        for name, table in sections.items():
            begin, end = BEGIN.format(name), END.format(name)
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
        written[path] = text
    return written


if __name__ == "__main__":
    for _path, _text in pages(Path.cwd()).items():
        _path.write_text(_text, encoding="utf-8")
