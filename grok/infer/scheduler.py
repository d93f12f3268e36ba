"""Continuous batching: which tokens the next step runs, and who holds slots and pages."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator

from grok.infer.page_pool import PageLayout, PagePool, prefix_keys
from grok.infer.request import Completion


@dataclasses.dataclass(eq=False)
class SequenceState:
    """One completion of a request in progress: `tokens` are its prompt and answer as far as they
    are known. The token at `computed` may be on the devices alone until its step is looked at."""

    completion: Completion
    tokens: list[int]
    no_prefix_reuse: bool = False  # logits of every prompt token are needed: compute them all
    prompt_logprobs: list = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    first_page: int = 0  # index of the first of `pages`: those before are behind the window
    computed: int = 0  # tokens whose keys and values are in the pages
    group: int = -1  # in a slot of this group; -1: waiting, or all of it was scheduled
    slot: int = -1
    age: int = -1

    def __post_init__(self) -> None:
        self.request = self.completion.request
        self.prompt_length = len(self.request.prompt)
        # The last token of an answer is not computed, that of a prompt without an answer is.
        new_tokens = max(1, self.request.params.max_tokens)
        self.last_computed = self.prompt_length + new_tokens - 1

    @property
    def decoding(self) -> bool:
        """True where a decode is to follow, unless the answer turns out to have ended."""
        return self.prompt_length <= self.computed < self.last_computed

    @property
    def exhausted(self) -> bool:
        """True once the longest answer's last token was scheduled."""
        return self.computed >= self.last_computed


@dataclasses.dataclass(eq=False, slots=True)
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
        for b, chunks in enumerate(self.chunks_BU):
            for u, chunk in enumerate(chunks):
                if chunk is not None:
                    yield chunk, (b, u)


class Scheduler:
    """Slots and pages of `groups` groups of devices, and a queue. A step is a prefill, which
    computes prompts a page at a time, or a decode, one token for each slot; while both have work
    they alternate. Prompt tokens are always computed by a prefill and answer tokens by a decode,
    since programs of other shapes round otherwise: the answer of a preempted sequence is decoded
    again token by token.

    A step is scheduled before the tokens of the one before are known. A sequence is taken to go on
    until its longest answer is scheduled, and then leaves its slot; where it ended earlier, the
    token too many is for the caller to drop. Steps run one after the other on the devices, so slots
    and pages may be given to the next step at once: those of a sequence that has ended, and those
    wholly behind a sliding window."""

    def __init__(self, groups: int, slots: int, num_pages: int, layout: PageLayout):
        """`slots`, `num_pages` and the chunks of `layout` are those of one group."""
        self.layout, self.page_size = layout, layout.page_size
        self._num_pages = num_pages
        self.pools = [PagePool(num_pages) for _ in range(groups)]
        self.slots: list[list[SequenceState | None]] = [[None] * slots for _ in range(groups)]
        self.waiting: collections.deque[SequenceState] = collections.deque()
        self.preempted = self.cached_tokens = 0
        self._max_chunks, self._submitted = layout.max_chunks, 0
        self._last_was_prefill = False

    def add(self, sequence: SequenceState) -> None:
        """Puts a sequence last in the queue."""
        sequence.age = self._submitted
        self._submitted += 1
        sequence.keys = prefix_keys(sequence.request.prompt, self.page_size)
        self.waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Takes a sequence out, finished or not, and releases its pages."""
        if sequence.group >= 0:
            self._free_slot(sequence)
        elif not sequence.exhausted:
            self.waiting.remove(sequence)

    def preempt_all(self) -> None:
        """Takes the pages of all sequences, and forgets what pages hold: all is computed again."""
        for sequence in reversed(self.running()):
            self._preempt(sequence)
        self.pools = [PagePool(self._num_pages) for _ in self.pools]

    def running(self, group: int | None = None) -> list[SequenceState]:
        """Sequences in slots, oldest first."""
        groups = self.slots if group is None else [self.slots[group]]
        sequences = filter(None, itertools.chain.from_iterable(groups))
        return sorted(sequences, key=lambda sequence: sequence.age)

    def page_counts(self) -> tuple[int, ...]:
        """Pages that are used, cached and free, of all groups."""
        counts = (pool.counts() for pool in self.pools)
        return tuple(map(sum, zip(*counts, strict=True)))

    def next_step(self) -> ScheduledStep | None:
        """The step to run next, counted as done from here on; None without work."""
        self._release_unneeded()
        decoding = any(sequence.decoding for sequence in self.running())
        step = None if decoding and self._last_was_prefill else self._prefill()
        if step is None and decoding:
            step = self._decode()
        self._last_was_prefill = step is not None and step.prefill
        return step

    def _prefill(self) -> ScheduledStep | None:
        chunks_BU: list[list[Chunk | None]] = [[] for _ in self.slots]
        for group, chunks in enumerate(chunks_BU):
            for sequence in self.running(group):
                unread = sequence.computed < sequence.prompt_length
                # No chunk of this step is of a sequence that loses its pages: those are younger.
                if unread and len(chunks) < self._max_chunks and self._reserve_page(sequence):
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
            if not self._has_page(sequence):
                return
            start = sequence.computed
            count = min(self.page_size, sequence.prompt_length - start)
            chunks.append(Chunk(sequence, start, count))
            sequence.computed += count
            if count == self.page_size:
                # Later sequences, of the same step too, can share the page: a layer writes all its
                # keys and values before it reads any.
                index = start // self.page_size
                page, key = sequence.pages[index - sequence.first_page], sequence.keys[index]
                self.pools[sequence.group].register_prefix(page, key)

    def _admit(self, sequence: SequenceState, groups: list[int]) -> bool:
        """Gives a waiting sequence a slot, and the pages that it needs at a time, in the group that
        caches most of its prompt; False where none has room."""
        # The last prompt token is always computed, for the logits after it.
        keys = sequence.keys[: (sequence.prompt_length - 1) // self.page_size]
        best = None
        for group in groups:
            if None not in self.slots[group]:
                continue
            pool, running = self.pools[group], len(self.running(group))
            reusable = [] if sequence.no_prefix_reuse else keys
            length, cached = pool.cached_prefix(reusable, self.layout)
            needed = self._new_pages(sequence, length)
            # A page for each running sequence, lest the new one be preempted at once.
            spare = pool.available(besides=cached) - needed - running
            if spare < 0 and running:
                continue
            if best is None or (length, spare) > best[:2]:
                best = length, spare, group, cached, needed
        if best is None:
            return False
        length, _, group, cached, needed = best
        pool = self.pools[group]
        pool.share(cached)
        new = [page for page in (pool.allocate() for _ in range(needed)) if page is not None]
        sequence.pages, sequence.computed = cached + new, length * self.page_size
        sequence.first_page, sequence.group = length - len(cached), group
        sequence.slot = self.slots[group].index(None)
        self.slots[group][sequence.slot] = sequence
        self.cached_tokens += sequence.computed
        return True

    def _decode(self) -> ScheduledStep:
        chunks_BU: list[list[Chunk | None]] = []
        for group, slots in enumerate(self.slots):
            chunks: list[Chunk | None] = [None] * len(slots)
            for sequence in self.running(group):
                # No chunk of this step is of a sequence that loses its pages: those are younger.
                if sequence.decoding and self._reserve_page(sequence):
                    chunks[sequence.slot] = Chunk(sequence, sequence.computed, 1)
                    sequence.computed += 1
            chunks_BU.append(chunks)
        return ScheduledStep(False, chunks_BU)

    def _new_pages(self, sequence: SequenceState, cached_length: int) -> int:
        """Number of pages that a sequence gets behind a cached prefix of this length in pages: for
        all its tokens, or as many as a window leaves it."""
        num_tokens = len(sequence.tokens)
        first = self.layout.first_page(cached_length * self.page_size)
        end = min(-(-num_tokens // self.page_size), first + self.layout.max_pages(num_tokens))
        return end - cached_length

    def _has_page(self, sequence: SequenceState) -> bool:
        """Ensures a page for the next token; False where all pages have users."""
        end = sequence.first_page + len(sequence.pages)
        if sequence.computed < end * self.page_size:
            return True
        if (page := self.pools[sequence.group].allocate()) is None:
            return False
        sequence.pages.append(page)
        return True

    def _reserve_page(self, sequence: SequenceState) -> bool:
        """Ensures a page for the next token, preempting the youngest sequence where there is none;
        False where that is this one."""
        while sequence.group >= 0 and not self._has_page(sequence):
            self._preempt(self.running(sequence.group)[-1])
        return sequence.group >= 0

    def _preempt(self, sequence: SequenceState) -> None:
        self._free_slot(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preempted += 1

    def _release_unneeded(self) -> None:
        """Releases the slots of sequences of which all was scheduled, and the pages that no further
        token sees. What these hold stays valid, and cached as a prefix, until they are allocated
        again."""
        for sequence in self.running():
            if sequence.exhausted:
                self._free_slot(sequence)
                continue
            count = self.layout.first_page(sequence.computed) - sequence.first_page
            if count > 0:
                self.pools[sequence.group].release(sequence.pages[:count])
                del sequence.pages[:count]
                sequence.first_page += count

    def _free_slot(self, sequence: SequenceState) -> None:
        self.pools[sequence.group].release(sequence.pages)
        self.slots[sequence.group][sequence.slot] = None
        sequence.pages, sequence.first_page = [], 0
        sequence.group = sequence.slot = -1
