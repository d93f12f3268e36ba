"""Which tokens the next step runs: slots, pages, and who waits.

A step is a prefill, which takes in prompts a page at a time, or a decode, one token for each slot;
while both have work they take turns. A token of a prompt is always computed by a prefill and a
token of an answer by a decode, since programs of other shapes round otherwise: a sequence that
loses its pages has its answer fed in token by token again.
"""

import collections
import dataclasses
from collections.abc import Iterator

from grok.infer.page_pool import PagePool, prefix_keys
from grok.infer.request import Request


@dataclasses.dataclass(eq=False)
class SequenceState:
    """One answer in the making: `tokens` are those of the prompt and of the answer so far."""

    request: Request
    choice: int
    tokens: list[int]
    no_prefix_reuse: bool = False  # every token of the prompt has to be run for its logits
    scores: list = dataclasses.field(default_factory=list)  # log-probabilities of the prompt
    keys: list[bytes] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the pages
    group: int = -1  # in a slot of this group; -1: waiting
    age: int = -1

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence from position `start`, all in one page."""

    sequence: SequenceState
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
    """Blocks of each group, None where there is nothing to run."""

    prefill: bool
    blocks_BU: list[list[Chunk | None]]

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and blocks of each."""
        return len(self.blocks_BU), len(self.blocks_BU[0])

    def blocks(self) -> Iterator[tuple[Chunk, tuple[int, int]]]:
        """Every block with its place (b, u)."""
        for group, blocks in enumerate(self.blocks_BU):
            for place, block in enumerate(blocks):
                if block is not None:
                    yield block, (group, place)


class Scheduler:
    """Slots and pages of `groups` groups of devices, and a queue."""

    def __init__(self, groups: int, slots: int, pages: int, page_size: int, prefill_blocks: int):
        """Numbers of slots, pages and blocks of a prefill are those of one group."""
        self.page_size = page_size
        self.pools = [PagePool(pages) for _ in range(groups)]
        self.slots: list[list[SequenceState | None]] = [[None] * slots for _ in range(groups)]
        self.waiting: collections.deque[SequenceState] = collections.deque()
        self.preempted = self.shared = 0
        self._prefill_blocks, self._submitted = prefill_blocks, 0
        self._prefilled = False  # whether the last step was a prefill

    def add(self, sequence: SequenceState) -> None:
        """Puts a sequence last in the queue."""
        sequence.age = self._submitted
        self._submitted += 1
        sequence.keys = prefix_keys(sequence.request.prompt, self.page_size)
        self.waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Takes a sequence out, finished or not; its pages are given back."""
        if sequence.group < 0:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)

    def running(self, group: int | None = None) -> list[SequenceState]:
        """Sequences in slots, oldest first."""
        groups = self.slots if group is None else [self.slots[group]]
        found = [sequence for slots in groups for sequence in slots if sequence is not None]
        return sorted(found, key=lambda sequence: sequence.age)

    def next_step(self) -> ScheduledStep | None:
        """What to run next; None where nothing is to be done. It counts as done from here on."""
        decoding = any(s.computed >= s.prompt_length for s in self.running())
        step = None
        if not (decoding and self._prefilled):
            step = self._prefill()
        if step is None and decoding:
            step = self._decode()
        self._prefilled = step is not None and step.prefill
        return step

    def _prefill(self) -> ScheduledStep | None:
        blocks_BU: list[list[Chunk | None]] = [[] for _ in self.slots]
        for group, blocks in enumerate(blocks_BU):
            for sequence in self.running(group):
                self._schedule_prefill(sequence, blocks)
        while self.waiting:
            open_groups = [g for g, b in enumerate(blocks_BU) if len(b) < self._prefill_blocks]
            if not self._admit(self.waiting[0], open_groups):
                break
            sequence = self.waiting.popleft()
            self._schedule_prefill(sequence, blocks_BU[sequence.group])
        if not any(blocks_BU):
            return None
        for blocks in blocks_BU:
            blocks += [None] * (self._prefill_blocks - len(blocks))
        return ScheduledStep(True, blocks_BU)

    def _schedule_prefill(self, sequence: SequenceState, blocks: list[Chunk | None]) -> None:
        """Adds what is left of a prompt, as far as there is room."""
        while sequence.computed < sequence.prompt_length and len(blocks) < self._prefill_blocks:
            start = sequence.computed
            count = min(self.page_size, sequence.prompt_length - start)
            blocks.append(Chunk(sequence, start, count))
            sequence.computed += count
            if count == self.page_size:
                # Sequences after this one, of the same step too, find it: a layer writes all its
                # keys and values before it reads any.
                page = start // self.page_size
                pool = self.pools[sequence.group]
                pool.remember(sequence.pages[page], sequence.keys[page])

    def _admit(self, sequence: SequenceState, groups: list[int]) -> bool:
        """Gives a waiting sequence a slot, and pages for all tokens it has, in the group that
        knows most of its prompt; False where none has room."""
        # One token at least has to be run for the logits after it.
        keys = sequence.keys[: (sequence.prompt_length - 1) // self.page_size]
        best = None
        for group in groups:
            if None not in self.slots[group]:
                continue
            pool, running = self.pools[group], len(self.running(group))
            known = [] if sequence.no_prefix_reuse else pool.known(keys)
            wanted = -(-len(sequence.tokens) // self.page_size) - len(known)
            # A page for each that runs, lest the newcomer be thrown out at once.
            spare = pool.available(besides=known) - wanted - running
            if spare < 0 and running:
                continue
            if best is None or (len(known), spare) > best[:2]:
                best = len(known), spare, group, known, wanted
        if best is None:
            return False
        _, _, group, known, wanted = best
        pool = self.pools[group]
        pool.share(known)
        new = [page for page in (pool.take() for _ in range(wanted)) if page is not None]
        sequence.pages, sequence.computed = known + new, len(known) * self.page_size
        sequence.group = group
        self.slots[group][self.slots[group].index(None)] = sequence
        self.shared += sequence.computed
        return True

    def _decode(self) -> ScheduledStep:
        blocks_BU: list[list[Chunk | None]] = []
        for group, slots in enumerate(self.slots):
            ready = []
            for sequence in self.running(group):
                if sequence.computed >= sequence.prompt_length and self._reserve_page(sequence):
                    ready.append(sequence)
            blocks = [Chunk(s, s.computed, 1) if s in ready else None for s in slots]
            for sequence in ready:
                sequence.computed += 1
            blocks_BU.append(blocks)
        return ScheduledStep(False, blocks_BU)

    def _reserve_page(self, sequence: SequenceState) -> bool:
        """Finds a page for the next token, at the youngest's expense; False if that is this one."""
        while sequence.group >= 0 and len(sequence.pages) * self.page_size <= sequence.computed:
            page = self.pools[sequence.group].take()
            if page is not None:
                sequence.pages.append(page)
            else:
                self._preempt(self.running(sequence.group)[-1])
        return sequence.group >= 0

    def _preempt(self, sequence: SequenceState) -> None:
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.preempted += 1

    def _leave(self, sequence: SequenceState) -> None:
        self.pools[sequence.group].give_back(sequence.pages)
        slots = self.slots[sequence.group]
        slots[slots.index(sequence)] = None
        sequence.pages, sequence.computed, sequence.group = [], 0, -1
