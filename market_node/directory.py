"""Which releases are one organisation's, from the names on the invites of their owners."""

from __future__ import annotations

from market_node.members import Members
from market_node.store import Store
from protocol.errors import NotFound
from protocol.organisations import Organisations, numbered

OWNERS_A_READ = 65_536


class Directory:
    """The organisations of a store's releases; used from one thread."""

    def __init__(self, store: Store, members: Members | None) -> None:
        self._store, self._members = store, members
        self._owners: list[bytes] = []
        self._known: tuple[int, dict[bytes, str]] = 0, {}
        self._made = numbered(())

    def at(self, size: int) -> Organisations:
        """Return the organisations of the first `size` releases; raise NotFound for a size the catalogue never had."""
        while len(self._owners) < size:
            news = self._store.owners_from(len(self._owners), OWNERS_A_READ)
            if not news:
                raise NotFound(f"catalogue: it never had {size} releases")
            self._owners += news
        # A member that was removed, or has gone on under another key, keeps the name that it came with.
        names = {} if self._members is None else {member.owner: member.organisation for member in self._members.all()}
        if self._known != (len(self._owners), names):
            keys = ((("organisation", names[owner]) if owner in names else owner, names.get(owner, "")) for owner in self._owners)
            self._made = numbered(keys)
            self._known = len(self._owners), names
        return self._made.upto(size)
