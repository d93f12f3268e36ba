"""Which pages of the cache are whose: one group of devices' pages, and prefixes that are kept."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


def prefix_keys(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """A key for each whole page of `tokens`, of it and all before it."""
    keys, key = [], b""
    for first in range(0, len(tokens) // page_size * page_size, page_size):
        page = np.asarray(tokens[first : first + page_size], np.int64).tobytes()
        key = hashlib.blake2b(key + page, digest_size=16).digest()
        keys.append(key)
    return keys


class PagePool:
    """Pages by number. A page has as many users as sequences that read it.

    One that holds a known prefix stays when its last user leaves, until the room is needed: the
    one longest unused goes first.
    """

    def __init__(self, pages: int):
        self._free = list(reversed(range(pages)))
        self._users = [0] * pages
        self._keys: dict[int, bytes] = {}
        self._found: dict[bytes, int] = {}
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def kept(self) -> int:
        """Pages without a user that hold prefixes."""
        return len(self._kept)

    @property
    def used(self) -> int:
        """Pages that have users."""
        return len(self._users) - self.free - self.kept

    def take(self) -> int | None:
        """A page for one user, to write to; None where all have users."""
        if self._free:
            page = self._free.pop()
        elif self._kept:
            page, _ = self._kept.popitem(last=False)
            del self._found[self._keys.pop(page)]
        else:
            return None
        self._users[page] = 1
        return page

    def give_back(self, pages: Sequence[int]) -> None:
        """One user less for each of a sequence's pages; the last ones are given up first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._keys:
                self._kept[page] = None
            else:
                self._free.append(page)

    def remember(self, page: int, key: bytes) -> None:
        """`page` holds, or will after the step now being made, the prefix of this key."""
        if key not in self._found:
            self._found[key], self._keys[page] = page, key

    def known(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest known prefix."""
        pages = []
        for key in keys:
            if key not in self._found:
                break
            pages.append(self._found[key])
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One user more for each of these."""
        for page in pages:
            self._users[page] += 1
            self._kept.pop(page, None)

    def available(self, besides: Sequence[int] = ()) -> int:
        """How many pages `take` could give if `besides` were shared."""
        return self.free + self.kept - sum(page in self._kept for page in besides)
