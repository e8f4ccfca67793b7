"""Names that belong together, found pair by pair (union-find)."""

from __future__ import annotations


class Unions:
    """Sets of names that only ever grow together.

    >>> sets = Unions()
    >>> sets.join("a", "b"), sets.join("b", "a")
    (True, False)
    >>> sets.root("a") == sets.root("b"), sets.root("c")
    (True, 'c')
    """

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        """The name that stands for a set; a name not met before is a set of its own."""
        while self._parent.setdefault(name, name) != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def join(self, name: str, to: str) -> bool:
        """Make one set of two; False where they are one already."""
        first, second = self.root(name), self.root(to)
        self._parent[first] = second
        return first != second

    def sets(self) -> list[set[str]]:
        """Every set, of names in the order that they were met."""
        members: dict[str, set[str]] = {}
        for name in self._parent:
            members.setdefault(self.root(name), set()).add(name)
        return list(members.values())
