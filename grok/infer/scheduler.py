"""Continuous batching: which tokens the next step runs, and who holds slots and pages."""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from grok.infer.request import Completion


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

    def cached_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest prefix that the cache holds."""
        cached = itertools.takewhile(lambda key: key in self._page_of_key, keys)
        return [self._page_of_key[key] for key in cached]

    def share(self, pages: Sequence[int]) -> None:
        """Adds one user to each of these pages."""
        for page in pages:
            self._users[page] += 1
            self._cached.pop(page, None)

    def available(self, besides: Sequence[int] = ()) -> int:
        """Number of pages that `allocate` could give if `besides` were shared."""
        _, cached, free = self.counts()
        return free + cached - sum(page in self._cached for page in besides)


@dataclasses.dataclass(eq=False)
class SequenceState:
    """One completion of a request in progress: `tokens` are its prompt and answer so far."""

    completion: Completion
    tokens: list[int]
    no_prefix_reuse: bool = False  # logits of every prompt token are needed: compute them all
    prompt_logprobs: list = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the pages
    group: int = -1  # in a slot of this group; -1: waiting
    age: int = -1

    def __post_init__(self) -> None:
        self.request = self.completion.request
        self.prompt_length = len(self.request.prompt)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence from position `start`, all in one page."""

    sequence: SequenceState
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """Chunks of each group, None where a row of the step is padding."""

    prefill: bool
    chunks_BU: list[list[Chunk | None]]

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and chunks of each."""
        return len(self.chunks_BU), len(self.chunks_BU[0])

    def chunks(self) -> Iterator[tuple[Chunk, tuple[int, int]]]:
        """Every chunk with its index (b, u)."""
        for b, u in itertools.product(*map(range, self.shape)):
            if (chunk := self.chunks_BU[b][u]) is not None:
                yield chunk, (b, u)


class Scheduler:
    """Slots and pages of `groups` groups of devices, and a queue. A step is a prefill, which
    computes prompts a page at a time, or a decode, one token for each slot; while both have work
    they alternate. Prompt tokens are always computed by a prefill and answer tokens by a decode,
    since programs of other shapes round otherwise: the answer of a preempted sequence is decoded
    again token by token."""

    def __init__(self, groups: int, slots: int, num_pages: int, page_size: int, max_chunks: int):
        """`slots`, `num_pages` and `max_chunks` of a prefill are those of one group."""
        self.page_size = page_size
        self.pools = [PagePool(num_pages) for _ in range(groups)]
        self.slots: list[list[SequenceState | None]] = [[None] * slots for _ in range(groups)]
        self.waiting: collections.deque[SequenceState] = collections.deque()
        self.preempted = self.cached_tokens = 0
        self._max_chunks, self._submitted = max_chunks, 0
        self._last_was_prefill = False

    def add(self, sequence: SequenceState) -> None:
        """Puts a sequence last in the queue."""
        sequence.age = self._submitted
        self._submitted += 1
        sequence.keys = prefix_keys(sequence.request.prompt, self.page_size)
        self.waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Takes a sequence out, finished or not, and releases its pages."""
        if sequence.group < 0:
            self.waiting.remove(sequence)
        else:
            self._free_slot(sequence)

    def running(self, group: int | None = None) -> list[SequenceState]:
        """Sequences in slots, oldest first."""
        groups = self.slots if group is None else [self.slots[group]]
        sequences = filter(None, itertools.chain.from_iterable(groups))
        return sorted(sequences, key=lambda sequence: sequence.age)

    def next_step(self) -> ScheduledStep | None:
        """The step to run next, counted as done from here on; None without work."""
        decoding = any(s.computed >= s.prompt_length for s in self.running())
        step = None if decoding and self._last_was_prefill else self._prefill()
        if step is None and decoding:
            step = self._decode()
        self._last_was_prefill = step is not None and step.prefill
        return step

    def _prefill(self) -> ScheduledStep | None:
        chunks_BU: list[list[Chunk | None]] = [[] for _ in self.slots]
        for group, chunks in enumerate(chunks_BU):
            for sequence in self.running(group):
                self._schedule_prefill(sequence, chunks)
        while self.waiting:
            open_groups = [g for g, c in enumerate(chunks_BU) if len(c) < self._max_chunks]
            if not self._admit(self.waiting[0], open_groups):
                break
            sequence = self.waiting.popleft()
            self._schedule_prefill(sequence, chunks_BU[sequence.group])
        if not any(chunks_BU):
            return None
        for chunks in chunks_BU:
            chunks += [None] * (self._max_chunks - len(chunks))
        return ScheduledStep(True, chunks_BU)

    def _schedule_prefill(self, sequence: SequenceState, chunks: list[Chunk | None]) -> None:
        while sequence.computed < sequence.prompt_length and len(chunks) < self._max_chunks:
            start = sequence.computed
            count = min(self.page_size, sequence.prompt_length - start)
            chunks.append(Chunk(sequence, start, count))
            sequence.computed += count
            if count == self.page_size:
                # Later sequences, of the same step too, can share the page: a layer writes all its
                # keys and values before it reads any.
                page = start // self.page_size
                prefix = sequence.pages[page], sequence.keys[page]
                self.pools[sequence.group].register_prefix(*prefix)

    def _admit(self, sequence: SequenceState, groups: list[int]) -> bool:
        """Gives a waiting sequence a slot, and pages for all its tokens, in the group that caches
        most of its prompt; False where none has room."""
        # The last prompt token is always computed, for the logits after it.
        keys = sequence.keys[: (sequence.prompt_length - 1) // self.page_size]
        best = None
        for group in groups:
            if None not in self.slots[group]:
                continue
            pool, running = self.pools[group], len(self.running(group))
            cached = [] if sequence.no_prefix_reuse else pool.cached_prefix(keys)
            needed = -(-len(sequence.tokens) // self.page_size) - len(cached)
            # A page for each running sequence, lest the new one be preempted at once.
            spare = pool.available(besides=cached) - needed - running
            if spare < 0 and running:
                continue
            if best is None or (len(cached), spare) > best[:2]:
                best = len(cached), spare, group, cached, needed
        if best is None:
            return False
        _, _, group, cached, needed = best
        pool = self.pools[group]
        pool.share(cached)
        new = [page for page in (pool.allocate() for _ in range(needed)) if page is not None]
        sequence.pages, sequence.computed = cached + new, len(cached) * self.page_size
        sequence.group = group
        self.slots[group][self.slots[group].index(None)] = sequence
        self.cached_tokens += sequence.computed
        return True

    def _decode(self) -> ScheduledStep:
        chunks_BU: list[list[Chunk | None]] = []
        for group, slots in enumerate(self.slots):
            ready = [
                sequence
                for sequence in self.running(group)
                if sequence.computed >= sequence.prompt_length and self._reserve_page(sequence)
            ]
            chunks_BU.append([Chunk(s, s.computed, 1) if s in ready else None for s in slots])
            for sequence in ready:
                sequence.computed += 1
        return ScheduledStep(False, chunks_BU)

    def _reserve_page(self, sequence: SequenceState) -> bool:
        """Ensures a page for the next token, preempting the youngest sequence where there is none;
        False where that is this one."""
        while sequence.group >= 0 and len(sequence.pages) * self.page_size <= sequence.computed:
            if (page := self.pools[sequence.group].allocate()) is not None:
                sequence.pages.append(page)
            else:
                youngest = self.running(sequence.group)[-1]
                self._free_slot(youngest)
                self.waiting.appendleft(youngest)
                self.preempted += 1
        return sequence.group >= 0

    def _free_slot(self, sequence: SequenceState) -> None:
        self.pools[sequence.group].release(sequence.pages)
        slots = self.slots[sequence.group]
        slots[slots.index(sequence)] = None
        sequence.pages, sequence.computed, sequence.group = [], 0, -1
