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

    __slots__ = ("children", "count", "is_settled", "rules", "settled_count")

    def __init__(self, *, is_leaf: bool) -> None:
        self.count = 0
        #: Chains from here down are right, and were made when there were so many rules.
        self.is_settled = False
        self.settled_count = 0
        # Leaves are as many as Services: what they do not have must not cost memory.
        self.children: dict[int, _Node] = _NO_CHILDREN if is_leaf else {}
        #: By owner, sorted.
        self.rules: tuple[tuple[Any, tuple[str, ...]], ...] = ()

    def replace(self, owner: Any, rules: tuple[str, ...]) -> int:
        """Let *rules* be what *owner* has here; return how many more there are now."""
        others = [(whose, texts) for whose, texts in self.rules if whose != owner]
        before = sum(len(texts) for whose, texts in self.rules if whose == owner)
        self.rules = tuple(sorted([*others, (owner, rules)] if rules else others))
        return len(rules) - before

    @property
    def is_branching(self) -> bool:
        return len(self.children) != 1


#: Of every leaf; never written to.
_NO_CHILDREN: Final[dict[int, _Node]] = {}


class Tree:
    """Rules by key, as chains.

    They are made when they are asked for: thousands of rules that come together are sorted in one by
    one, but make each chain once.

    Args:
        bits: length of the keys, a multiple of four.
        jump: the rule that sends what matches a prefix to the chain for it.
    """

    def __init__(self, bits: int, jump: Callable[[Prefix], str]) -> None:
        self._bits = bits
        self._jump = jump
        self._root = _Node(is_leaf=False)
        self._chains: dict[Prefix, tuple[str, ...]] = {}
        #: Those that changed since ``take_changed``.
        self._changed: set[Prefix] = set()

    @property
    def count(self) -> int:
        """Return how many rules there are."""
        return self._root.count

    @property
    def chains(self) -> dict[Prefix, tuple[str, ...]]:
        """Return the chains there are below the root."""
        self._settle()
        return self._chains

    def replace(self, key: int, owner: Hashable, rules: tuple[str, ...]) -> None:
        """Let *rules* be what *owner* has under *key*; none: nothing. Owners must be sortable."""
        path = [self._root]
        for shift in range(self._bits - _STRIDE, -1, -_STRIDE):
            children, digit = path[-1].children, _digit(key, shift)
            if digit not in children:
                children[digit] = _Node(is_leaf=not shift)
            path.append(children[digit])
        difference = path[-1].replace(owner, rules)
        for node in path:
            node.count += difference
            node.is_settled = False
        while len(path) > 1 and not path[-1].count:
            depth = len(path) - 1
            self._set(self._prefix(key, depth * _STRIDE), None)
            del path[-2].children[_digit(key, self._bits - depth * _STRIDE)]
            path.pop()

    def root_rules(self) -> tuple[str, ...]:
        """Return what stands in the root: a jump for every branch."""
        return tuple(self._branches(self._root, Prefix(0, 0)))

    def ways(self, key: int) -> Iterator[tuple[Prefix, str]]:
        """Yield every prefix of *key* that may have a chain, the longest first, and the jump to it."""
        for length in range(self._bits, 0, -_STRIDE):
            prefix = self._prefix(key, length)
            yield prefix, self._jump(prefix)

    def take_changed(self) -> dict[Prefix, tuple[str, ...] | None]:
        """Return the chains that changed since this was last called; None: it is gone."""
        self._settle()
        changed = {prefix: self._chains.get(prefix) for prefix in sorted(self._changed)}
        self._changed.clear()
        return changed

    def _settle(self) -> None:
        """Make the chains anew on all ways to what has changed.

        No chain besides can have changed, except below a node that was or is not split.
        """
        pending = [(self._root, Prefix(0, 0))]
        while pending:
            node, prefix = pending.pop()
            if node.is_settled:
                continue
            # The root is always split, and so is whatever is above a node that comes here.
            if prefix.length and min(node.count, node.settled_count) <= _MAX_RULES:
                self._settle_below(node, prefix, is_above_split=True)
                continue
            node.is_settled, node.settled_count = True, node.count
            if prefix.length:
                self._set(prefix, self._content(node, prefix) if node.is_branching else None)
            pending += [
                (child, self._extend(prefix, digit)) for digit, child in node.children.items()
            ]

    def _settle_below(self, node: _Node, prefix: Prefix, *, is_above_split: bool) -> None:
        """Make all chains for *prefix* and longer ones anew."""
        node.is_settled, node.settled_count = True, node.count
        is_chain = node.is_branching and node.count > 1 and is_above_split
        self._set(prefix, self._content(node, prefix) if is_chain else None)
        if node.is_branching:
            is_above_split = node.count > _MAX_RULES
        for digit, child in node.children.items():
            self._settle_below(child, self._extend(prefix, digit), is_above_split=is_above_split)

    def _set(self, prefix: Prefix, rules: tuple[str, ...] | None) -> None:
        if self._chains.get(prefix) == rules:
            return
        if rules is None:
            del self._chains[prefix]
        else:
            self._chains[prefix] = rules
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
        for _owner, texts in node.rules:
            yield from texts
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
