"""Pages of the cache of one group of devices: who uses them, and which prefixes they hold."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


def prefix_keys(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """A key for each full page of `tokens`, of its tokens and all before them."""
    keys, key = [], b""
    for first in range(0, len(tokens) // page_size * page_size, page_size):
        page = np.asarray(tokens[first : first + page_size], np.int64).tobytes()
        key = hashlib.blake2b(key + page, digest_size=16).digest()
        keys.append(key)
    return keys


class PagePool:
    """Pages by number, with a count of the sequences that read each.

    A page that holds a prefix stays cached when its last user releases it, until the room is
    needed: the least recently used one is evicted first.
    """

    def __init__(self, num_pages: int):
        self._free = list(reversed(range(num_pages)))
        self._users = [0] * num_pages
        self._keys: dict[int, bytes] = {}
        self._page_of_key: dict[bytes, int] = {}
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages without a user that hold prefixes."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages that have users."""
        return len(self._users) - self.free - self.cached

    def allocate(self) -> int | None:
        """A page for one user, to write to; None where all have users."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            del self._page_of_key[self._keys.pop(page)]
        else:
            return None
        self._users[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Removes one user of each of a sequence's pages; its last pages are evicted first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._keys:
                self._cached[page] = None
            else:
                self._free.append(page)

    def register_prefix(self, page: int, key: bytes) -> None:
        """Notes that `page` holds, or will after the scheduled step, the prefix of this key."""
        if key not in self._page_of_key:
            self._page_of_key[key], self._keys[page] = page, key

    def cached_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest prefix that the cache holds."""
        pages = []
        for key in keys:
            if key not in self._page_of_key:
                break
            pages.append(self._page_of_key[key])
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds one user to each of these pages."""
        for page in pages:
            self._users[page] += 1
            self._cached.pop(page, None)

    def available(self, besides: Sequence[int] = ()) -> int:
        """Number of pages that `allocate` could give if `besides` were shared."""
        return self.free + self.cached - sum(page in self._cached for page in besides)
