"""YAML as recipes and cards have it: values and nothing else, within bounds, written so that nothing hides in it."""

from __future__ import annotations

from typing import Any

import yaml

from r2m_kernels.errors import BadFile, printable, quoted

_MOST_NESTED = 32  # mappings and lists within one another


class PlainLoader(yaml.SafeLoader):
    """Without anchors, with which a few lines can stand for gigabytes, keys given twice, dates and deep nesting."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the document; an alias is none."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not used in recipes", event.start_mark)
        if self._depth == _MOST_NESTED:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"nested more than {_MOST_NESTED} deep", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys all differ."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {quoted(str(key.value))} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# A date is a text: no key takes one, and 2001-13-45 is none.
PlainLoader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if one[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _PlainDumper(yaml.SafeDumper):
    """Whatever cannot be printed stands in quotation marks, where it can be escaped."""


_PlainDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def load(text: bytes | str, what: str) -> Any:
    """The values of a document.

    Args:
        text: of bounded length.
        what: how error messages name it.

    Raises:
        BadFile: no YAML, or more than values.
    """
    try:
        return yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise BadFile(f"{what}: not valid YAML{where}: {printable(problem)}") from None


def dump(content: Any) -> str:
    """A document of values, a line for each: none can look like two, move a cursor or turn the direction of text."""
    text = yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=10**6)
    return "".join(c if c == "\n" or c.isprintable() else f"\\u{ord(c):04x}" for c in text)
