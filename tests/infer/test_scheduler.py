"""Pages and slots without a model: a memory that remembers what each step wrote where, and looks up
every key that a token sees, as attention would."""

import types

import numpy as np
import pytest

from grok.config.sampling import SamplingParams
from grok.infer.page_pool import PageLayout, PagePool, prefix_keys
from grok.infer.request import Request
from grok.infer.scheduler import Scheduler, SequenceState

SIZE = 4  # tokens of a page


def sequence(prompt: list[int], answer_length: int) -> SequenceState:
    """A completion in progress; it ends after `answer_length` tokens."""
    request = Request("id", tuple(prompt), SamplingParams(max_tokens=answer_length))
    return SequenceState(types.SimpleNamespace(request=request), list(prompt))


class Memory:
    """Runs a scheduler's steps: each slot of a page holds the tokens up to the one it was written
    for. With `ahead`, as in the engine, a step is scheduled before the tokens of the one before are
    known, and of those of `ends` that they end earlier than they may."""

    def __init__(self, layout: PageLayout, num_pages: int, groups: int = 1, slots: int = 3):
        self.scheduler = Scheduler(groups, slots, num_pages, layout)
        self.layout, self.num_pages = layout, num_pages
        self.slots: dict[tuple[int, int, int], tuple] = {}
        self.ends: dict[SequenceState, int] = {}
        self.finished: set[SequenceState] = set()
        self.most_pages = self.dropped = 0

    def run(self, ahead: bool = False) -> None:
        """Runs until nothing is left to do."""
        previous = None
        while (step := self.scheduler.next_step()) is not None or previous is not None:
            if step is not None:
                self._run(step)
            for pool in self.scheduler.pools:
                assert sum(pool.counts()) == self.num_pages
            if ahead:
                previous, step = step, previous
            if step is not None:
                self._look_at(step)
        assert not self.scheduler.running()
        assert not self.scheduler.waiting

    def _run(self, step) -> None:
        chunks = [chunk for chunk, _ in step.chunks()]
        for chunk in chunks:
            pages, end = chunk.sequence.pages, chunk.start + chunk.count
            self.most_pages = max(self.most_pages, len(pages))
            assert len(pages) <= self.layout.max_pages(max(end, len(chunk.sequence.tokens)))
            for position in range(chunk.start, end):
                self.slots[self._slot(chunk.sequence, position)] = self._content(chunk, position)
        for chunk in chunks:
            for position in range(chunk.start, chunk.start + chunk.count):
                for seen in range(self._first(position), position + 1):
                    slot = self._slot(chunk.sequence, seen)
                    assert self.slots[slot] == self._content(chunk, seen), "another's key"

    def _look_at(self, step) -> None:
        for chunk, _ in step.chunks():
            state, end = chunk.sequence, chunk.start + chunk.count
            if state in self.finished:
                self.dropped += 1
            elif end >= len(state.tokens):
                assert end == len(state.tokens), "a token is missing"
                state.tokens.append(_token(end))
                length = len(state.tokens) - state.prompt_length
                if length == self.ends.get(state, state.request.params.max_tokens):
                    self.scheduler.remove(state)
                    self.finished.add(state)

    def _first(self, position: int) -> int:
        window = self.layout.window
        return 0 if window is None else max(0, position - window + 1)

    def _slot(self, state: SequenceState, position: int) -> tuple[int, int, int]:
        index = position // SIZE - state.first_page
        assert index >= 0, "a page that was released"
        return state.group, state.pages[index], position % SIZE

    def _content(self, chunk, position: int) -> tuple:
        tokens = chunk.sequence.tokens
        return (*tokens[: position + 1], *map(_token, range(len(tokens), position + 1)))


def _token(index: int) -> int:
    """The token of an answer that is at this place of its sequence."""
    return index * 7 % 5


def run_30(memory: Memory, ahead: bool) -> None:
    """Thirty requests of which many begin alike; a third end before they have to."""
    random = np.random.default_rng(53)
    shared = random.integers(0, 3, 100).tolist()
    for i in range(30):
        own = random.integers(0, 3, random.integers(1, 30)).tolist()
        prompt, length = shared[: random.integers(0, 100)] + own, int(random.integers(1, 31))
        memory.scheduler.add(state := sequence(prompt, length))
        if i % 3 == 0:
            memory.ends[state] = int(random.integers(1, length + 1))
    memory.run(ahead)
    assert len(memory.finished) == 30
    assert [pool.counts()[0] for pool in memory.scheduler.pools] == [0, 0]


@pytest.mark.parametrize("spare", [0, 4, 60])
@pytest.mark.parametrize("max_chunks", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 4, 5, 14, 31, 200])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_a_token_finds_every_key_that_it_sees(window, max_chunks, spare, ahead):
    """In two groups of 5 slots, with pages for one of the longest requests and `spare` others: few
    enough that some are preempted in their prompts too."""
    layout = PageLayout(SIZE, max_chunks, window)
    num_pages = layout.max_pages(160) + spare
    memory = Memory(layout, num_pages, groups=2, slots=5)
    run_30(memory, ahead)
    assert memory.scheduler.cached_tokens > 0 or spare < 60
    # An end that no one could know costs one token; the end of the longest answer none.
    assert 0 < memory.dropped <= 10 if ahead else memory.dropped == 0


def test_pages_behind_the_window_are_released():
    """A prompt of 25 pages and an answer of 10 in no more pages than the window and a step's chunks
    take."""
    layout = PageLayout(SIZE, max_chunks=2, window=9)
    memory = Memory(layout, num_pages=4)  # 8 tokens before the next one, and two new pages
    memory.scheduler.add(sequence(list(range(100)), 40))
    memory.run()
    assert (len(memory.finished), memory.most_pages, memory.scheduler.preempted) == (1, 4, 0)


@pytest.mark.parametrize(("window", "pages"), [(None, 35), (1, 1), (2, 2), (5, 2), (6, 3)])
def test_pages_while_decoding(window, pages):
    layout = PageLayout(SIZE, max_chunks=1, window=window)
    assert layout.max_pages(140) == pages
    memory = Memory(layout, num_pages=pages)
    memory.scheduler.add(sequence(list(range(100)), 40))
    memory.run()
    assert memory.most_pages == pages


def test_a_released_page_is_offered_while_what_it_holds_is_valid():
    """A prefix behind the window is found again until its pages are allocated to others."""
    layout = PageLayout(SIZE, max_chunks=1, window=5)
    memory = Memory(layout, num_pages=30)
    prompt = list(range(48))
    memory.scheduler.add(sequence(prompt, 1))
    memory.run()
    pool, keys = memory.scheduler.pools[0], prefix_keys(prompt, SIZE)
    assert [pool.cached_prefix(keys[:n], layout)[0] for n in range(13)] == list(range(13))
    assert [len(pool.cached_prefix(keys[:n], layout)[1]) for n in (1, 2, 12)] == [1, 1, 1]
    for _ in range(18 + 11):
        pool.allocate()
    assert pool.counts() == (29, 1, 0)
    # Of the last two, which were released together, the first one is left, and enough.
    length, pages = pool.cached_prefix(keys, layout)
    assert (length, len(pages)) == (11, 1)
    assert pool.allocate() == pages[0]
    assert pool.cached_prefix(keys, layout) == (0, [])


def test_a_prefix_with_a_gap_counts_up_to_the_gap_and_from_a_window_behind_it():
    pool, keys = PagePool(10), prefix_keys(list(range(32)), SIZE)
    for index in (0, 1, 3, 4, 5):
        pool.register_prefix(pool.allocate(), keys[index])
    assert pool.cached_prefix(keys, PageLayout(SIZE)) == (2, [0, 1])
    # A token behind page 5 sees one page before its own, or two, or three, of which one is missing.
    assert pool.cached_prefix(keys, PageLayout(SIZE, window=5)) == (6, [4])
    assert pool.cached_prefix(keys, PageLayout(SIZE, window=13)) == (6, [2, 3, 4])
    assert pool.cached_prefix(keys, PageLayout(SIZE, window=14)) == (2, [0, 1])
    assert pool.cached_prefix([], PageLayout(SIZE, window=5)) == (0, [])
