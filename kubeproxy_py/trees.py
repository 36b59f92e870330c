"""
Search trees made of chains: a lookup passes tens of rules, whatever the number of entries.

Pure. A tree holds rules under keys, which are strings of bits (an address; a protocol and port). Its
root stands in a well-known chain that everybody jumps to. Below, a chain answers for one prefix of
the key, and holds the rules under that prefix or jumps to chains of longer prefixes. What a chain
holds depends on the rules under its prefix alone and not on the order in which they came, so equal
sets make equal chains; and a chain is right whoever jumps to it, so chains may be written one after
the other, longer prefixes first.

A packet that matches nothing falls back through the tree and goes on behind the jump.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final, NamedTuple

# Bits a level: at most sixteen jumps in a chain, eight on average, and few levels. Levels on which
# nothing branches are skipped.
_STRIDE: Final = 4
# A chain with more rules than this is split: so many rules cost about what another level does.
_MAX_RULES: Final = 8


class Prefix(NamedTuple):
    """The first *length* bits of a key; *value* has them at their places and zeros behind."""

    value: int
    length: int


class _Node:
    """The rules under one prefix. Only nodes of full length hold rules themselves."""

    __slots__ = ("children", "count", "rules")

    def __init__(self) -> None:
        self.count = 0
        self.children: dict[int, _Node] = {}
        self.rules: dict[Any, tuple[str, ...]] = {}

    @property
    def is_branching(self) -> bool:
        return len(self.children) != 1


class Tree:
    """Rules by key, as chains.

    Args:
        bits: length of the keys, a multiple of four.
        jump: the rule that sends what matches a prefix to the chain for it.
    """

    def __init__(self, bits: int, jump: Callable[[Prefix], str]) -> None:
        self._bits = bits
        self._jump = jump
        self._root = _Node()
        #: The chains there are below the root.
        self.chains: dict[Prefix, tuple[str, ...]] = {}
        #: Those that changed since ``take_changed``, with what they were.
        self._changed: set[Prefix] = set()

    @property
    def count(self) -> int:
        """Return how many rules there are."""
        return self._root.count

    def replace(self, key: int, owner: Hashable, rules: tuple[str, ...]) -> None:
        """Let *rules* be what *owner* has under *key*; none: nothing. Owners must be sortable."""
        path = [self._root]
        for shift in range(self._bits - _STRIDE, -1, -_STRIDE):
            path.append(path[-1].children.setdefault(_digit(key, shift), _Node()))
        leaf = path[-1]
        difference = len(rules) - len(leaf.rules.get(owner, ()))
        if rules:
            leaf.rules[owner] = rules
        else:
            leaf.rules.pop(owner, None)
        for node in path:
            node.count += difference
        while len(path) > 1 and not path[-1].count:
            depth = len(path) - 1
            self._set(self._prefix(key, depth * _STRIDE), None)
            del path[-2].children[_digit(key, self._bits - depth * _STRIDE)]
            path.pop()
        self._refresh(key, path, difference)

    def root_rules(self) -> tuple[str, ...]:
        """Return what stands in the root: a jump for every branch."""
        return tuple(self._branches(self._root, Prefix(0, 0)))

    def take_changed(self) -> dict[Prefix, tuple[str, ...] | None]:
        """Return the chains that changed since this was last called; None: it is gone."""
        changed = {prefix: self.chains.get(prefix) for prefix in sorted(self._changed)}
        self._changed.clear()
        return changed

    def _refresh(self, key: int, path: list[_Node], difference: int) -> None:
        """Make the chains along *path* anew, whose counts have changed by *difference*.

        No chain besides can have changed, except below a node that was or is not split.
        """
        above = path[0].count + _MAX_RULES + 1  # the root is always split
        for depth, node in enumerate(path[1:], start=1):
            prefix = self._prefix(key, depth * _STRIDE)
            if min(node.count, node.count - difference) <= _MAX_RULES:
                self._refresh_below(node, prefix, above)
                return
            if node.is_branching:
                self._set(prefix, self._content(node, prefix))
                above = node.count
            else:
                self._set(prefix, None)

    def _refresh_below(self, node: _Node, prefix: Prefix, above: int) -> None:
        is_chain = node.is_branching and node.count > 1 and above > _MAX_RULES
        self._set(prefix, self._content(node, prefix) if is_chain else None)
        if node.is_branching:
            above = node.count
        for digit, child in node.children.items():
            self._refresh_below(child, self._extend(prefix, digit), above)

    def _set(self, prefix: Prefix, rules: tuple[str, ...] | None) -> None:
        if self.chains.get(prefix) == rules:
            return
        if rules is None:
            del self.chains[prefix]
        else:
            self.chains[prefix] = rules
        self._changed.add(prefix)

    def _content(self, node: _Node, prefix: Prefix) -> tuple[str, ...]:
        if node.count <= _MAX_RULES or prefix.length == self._bits:
            return tuple(self._all(node))
        return tuple(self._branches(node, prefix))

    def _branches(self, node: _Node, prefix: Prefix) -> Iterator[str]:
        for digit in sorted(node.children):
            child, below = node.children[digit], self._extend(prefix, digit)
            while not child.is_branching:
                ((digit, child),) = child.children.items()  # noqa: PLW2901 - going down
                below = self._extend(below, digit)
            if child.count > 1:
                yield self._jump(below)
            else:
                yield from self._all(child)

    def _all(self, node: _Node) -> Iterator[str]:
        """Yield the rules under *node*: by key, then by owner, which decides between equal keys."""
        for owner in sorted(node.rules):
            yield from node.rules[owner]
        for digit in sorted(node.children):
            yield from self._all(node.children[digit])

    def _prefix(self, key: int, length: int) -> Prefix:
        rest = self._bits - length
        return Prefix(key >> rest << rest, length)

    def _extend(self, prefix: Prefix, digit: int) -> Prefix:
        length = prefix.length + _STRIDE
        return Prefix(prefix.value | digit << (self._bits - length), length)


def _digit(key: int, shift: int) -> int:
    return key >> shift & ((1 << _STRIDE) - 1)
