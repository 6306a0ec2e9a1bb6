"""YAML text as plain data that remembers its lines. The only file that imports PyYAML; imported when a file is read.

Scalars follow YAML 1.2's core schema, not PyYAML's 1.1: ``no`` is text, ``010`` is text, ``1e-3`` is a number. Digits
may be grouped by ``_``. Tags and merge keys are not supported; a key given twice is an error.
"""

import re
from dataclasses import dataclass

import yaml

from mempool.config.model import Loc, path_text
from mempool.errors import ConfigError

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0o[0-7_]+")
_FLOAT = re.compile(
    r"[-+]?((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A parsed file: ``data`` of dicts, lists and scalars, and the nodes they came from."""

    file: str
    data: object
    root: yaml.Node | None

    def line(self, loc: Loc) -> int:
        """Line (from 1) of the field at ``loc``, or of the nearest thing around it that the file has."""
        node, line = self.root, 1 if self.root is None else _line(self.root)
        for part in loc:
            if isinstance(node, yaml.MappingNode):
                entry = next(((key, value) for key, value in node.value if key.value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                entry = (node.value[part], node.value[part])
            else:
                entry = None
            if entry is None:
                break
            line, node = _line(entry[0]), entry[1]
        return line

    def span(self, loc: Loc) -> tuple[int, int] | None:
        """First character of the scalar at ``loc``, and the one after its last; None if the file has no such scalar."""
        node = self.root
        for part in loc:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            node = next((value for key, value in pairs if key.value == part), None)
        return (node.start_mark.index, node.end_mark.index) if isinstance(node, yaml.ScalarNode) else None


def parse(text: str, *, file: str) -> Document:
    """Parse YAML text.

    Args:
        text: One YAML document.
        file: Its name, for messages.

    Raises:
        ConfigError: It is not valid YAML, or says a key twice; the message has file and line.
    """
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        return Document(file=file, data=None if root is None else _Reader(file).read(root, ()), root=root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: is not valid YAML: {what}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{file}:{line}: is not valid YAML: the character {error.character!r} is not allowed."
        ) from error
    except RecursionError:
        raise ConfigError(f"{file}: is nested too deeply to be a cluster file.") from None


class _Reader:
    """Turns nodes into data. Aliases of one node share one value, so that no file can blow up."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._open: set[int] = set()
        self._done: dict[int, object] = {}

    def read(self, node: yaml.Node, loc: Loc) -> object:
        if id(node) in self._done:
            return self._done[id(node)]
        if id(node) in self._open:
            raise self._error(node, loc, "contains itself through an alias; write it out.")
        if node.tag not in _PLAIN_TAGS:
            raise self._error(node, loc, f"has the tag {node.tag!r}; tags are not supported, write the plain value.")
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            data: object = self._mapping(node, loc)
        elif isinstance(node, yaml.SequenceNode):
            data = [self.read(child, (*loc, index)) for index, child in enumerate(node.value)]
        else:
            data = _scalar(node)
        self._open.remove(id(node))
        self._done[id(node)] = data
        return data

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, object]:
        data: dict[str, object] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, loc, "has a key that is no plain name; write names before the colons.")
            key = str(key_node.value)
            if key in data:
                raise self._error(key_node, (*loc, key), f"is given twice (first in line {lines[key]}); keep one.")
            lines[key] = _line(key_node)
            data[key] = self.read(value_node, (*loc, key))
        return data

    def _error(self, node: yaml.Node, loc: Loc, text: str) -> ConfigError:
        return ConfigError(f"{self._file}:{_line(node)}: {path_text(loc) or 'the file'} {text}")


def _scalar(node: yaml.Node) -> object:
    text = str(node.value)
    if getattr(node, "style", None) is not None:  # quoted, or a block of text
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
