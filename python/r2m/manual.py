"""``python -m r2m.manual``: docs/cli.md, docs/files.md, docs/api.md and tables of other pages, from the code itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import click
import torch

import r2m_kernels
from r2m.commands.main import r2m
from r2m.commands.options import defaults_of
from r2m.commands.process import EXIT_CODES
from r2m.evaluation.layouts import LAYOUTS
from r2m.evaluation.metrics import METRICS
from r2m.records import RECORDS, SEAL, SEALED, VERSION
from r2m_kernels import ops
from r2m_kernels.config import OFFERED, MergeConfig
from r2m_kernels.fields import OPTIONS

_WIDTH = 120
# Of `r2m_kernels.__all__` what has a docstring; operators have a part of their own.
DOCUMENTED = [name for name in r2m_kernels.__all__ if name not in ("__version__", "ops", "reference", "Progress")]
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


def api() -> str:
    """Public names of ``r2m_kernels`` and its operators: signatures and docstrings."""
    parts = ["# API\n\nWritten by `python -m r2m.manual`, from the code. Examples run as tests.\n", "## r2m_kernels\n"]
    parts += [_entry("r2m_kernels", name, getattr(r2m_kernels, name)) for name in DOCUMENTED]
    parts.append(f"## r2m_kernels.ops\n\n```text\n{inspect.getdoc(ops)}\n```\n")
    for name in ops.__all__:
        if callable(getattr(ops, name)):
            packet = getattr(torch.ops.r2m, name)
            schemas = "\n".join(str(getattr(packet, one)._schema) for one in packet.overloads())
            parts.append(f"{_entry('r2m_kernels.ops', name, getattr(ops, name))}\n```text\n{schemas}\n```\n")
    return "\n".join(parts)


def _entry(module: str, name: str, of: Any) -> str:
    """A name with its signature, where it has one that says something, and its docstring."""
    lines = [f"### {module}.{name}\n"]
    if inspect.isfunction(of):
        signature = inspect.signature(of)
        shown = [re.sub(r": '(.+?)'", r": \1", str(one)) for one in signature.parameters.values()]
        by_name = [one.kind is one.KEYWORD_ONLY for one in signature.parameters.values()]
        if any(by_name):
            shown.insert(by_name.index(True), "*")
        listed = ",\n    ".join(shown)
        lines.append(f"```python\n{name}(\n    {listed},\n) -> {signature.return_annotation}\n```\n")
    text = inspect.getdoc(of) or ""
    if of is MergeConfig:
        text = f"{text.partition('Attributes:')[0]}Fields: r2m_kernels/README.md §11. Methods: docs/methods.md."
    return "\n".join([*lines, f"```text\n{text}\n```\n"])


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
    written = {
        root / "docs" / f"{name}.md": made() for name, made in (("cli", commands), ("files", files), ("api", api))
    }
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
