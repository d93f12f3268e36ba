"""Pages of the cache: those that a sequence needs, who reads each, and which prefixes they hold."""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Pages of `page_size` tokens that a sequence needs, of which a prefill step computes
    `max_chunks`. With a sliding window, those wholly behind it are needed no more."""

    page_size: int
    max_chunks: int = 1
    window: int | None = None

    def first_page(self, position: int) -> int:
        """Index of the first page that a token at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    def max_pages(self, length: int) -> int:
        """The most pages that a sequence of up to `length` tokens needs at a time."""
        pages = -(-length // self.page_size)
        if self.window is None:
            return pages
        return min(pages, -(-(self.window - 1) // self.page_size) + self.max_chunks)


def prefix_keys(tokens: Sequence[int], page_size: int) -> list[bytes]:
    """A key for each full page of `tokens`, of its tokens and all before them."""
    keys, key = [], b""
    for first in range(0, len(tokens) // page_size * page_size, page_size):
        page = np.asarray(tokens[first : first + page_size], np.int64).tobytes()
        key = hashlib.blake2b(key + page, digest_size=16).digest()
        keys.append(key)
    return keys


class PagePool:
    """Pages by number, with a count of the sequences that read each. A page that holds a prefix
    stays cached when its last user releases it, until the room is needed: the least recently used
    one is evicted first."""

    def __init__(self, num_pages: int):
        self._free = list(reversed(range(num_pages)))
        self._users = [0] * num_pages
        self._keys: dict[int, bytes] = {}
        self._page_of_key: dict[bytes, int] = {}
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()

    def counts(self) -> tuple[int, int, int]:
        """Pages that have users, those without that hold prefixes, and those that hold nothing."""
        cached, free = len(self._cached), len(self._free)
        return len(self._users) - cached - free, cached, free

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

    def cached_prefix(self, keys: Sequence[bytes], layout: PageLayout) -> tuple[int, list[int]]:
        """Length in pages of the longest prefix after which all pages that a token sees are cached,
        and these pages."""
        length = first_cached = 0
        for index, key in enumerate(keys):
            if key not in self._page_of_key:
                first_cached = index + 1
            elif first_cached <= layout.first_page((index + 1) * layout.page_size):
                length = index + 1
        seen = keys[layout.first_page(length * layout.page_size) : length]
        return length, [self._page_of_key[key] for key in seen]

    def share(self, pages: Sequence[int]) -> None:
        """Adds one user to each of these pages."""
        for page in pages:
            self._users[page] += 1
            self._cached.pop(page, None)

    def available(self, besides: Sequence[int] = ()) -> int:
        """Number of pages that `allocate` could give if `besides` were shared."""
        _, cached, free = self.counts()
        return free + cached - sum(page in self._cached for page in besides)
