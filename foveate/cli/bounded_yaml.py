"""YAML that ends: PyYAML's safe loader with bounds on what a file may hold.

An alias counts as all that its anchor holds, so that anchors cannot grow, whatever refers to them.
"""

from __future__ import annotations

from typing import Any

import yaml

from foveate.io.quoting import quoted
from foveate.io.reading import check_plain

LARGEST = 64 * 1024
"""Bytes of a file."""
NODES = 5000
"""Values and keys of a file, with all that aliases stand for."""
DEPTH = 32
"""Lists and mappings within each other."""


def parse_yaml(text: str) -> Any:
    """One YAML document as plain values.

    Raises:
        ValueError: it is none, or beyond the bounds.
    """
    if len(text) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST // 1024} KiB")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:  # PyYAML's constructors of numbers and dates raise anything
        raise ValueError(f"a value cannot be read ({type(error).__name__})") from None
    check_plain(value)
    return value


class _Loader(yaml.SafeLoader):
    """Counts nodes before anything is made of them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, or refuse it."""
        alias = self.check_event(yaml.AliasEvent)
        before, mark = self._nodes, self.peek_event().start_mark
        self._nodes += 1
        self._depth += 1
        if self._depth > DEPTH:
            raise _bounds(f"it nests more than {DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        if alias:
            if id(node) not in self._sizes:
                raise _bounds("an anchor contains itself", mark)
            self._nodes += self._sizes[id(node)]
        if self._nodes > NODES:
            raise _bounds(f"it contains more than {NODES} values", mark)
        self._depth -= 1
        self._sizes.setdefault(id(node), self._nodes - before)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping, whose keys differ."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _bounds(f"the key {quoted(key.value)} appears twice", key.start_mark)
                seen.add(key.value)
        return node


def _bounds(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, _place(mark))


def _place(mark: Any) -> Any:
    """Line and column, without the text around them."""
    return yaml.Mark(mark.name, mark.index, mark.line, mark.column, None, None)
