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
    for."""

    def __init__(self, layout: PageLayout, num_pages: int, groups: int = 1, slots: int = 3):
        self.scheduler = Scheduler(groups, slots, num_pages, layout)
        self.layout, self.num_pages = layout, num_pages
        self.slots: dict[tuple[int, int, int], tuple] = {}
        self.most_pages = self.finished = 0

    def run(self) -> None:
        """Runs until nothing is left to do."""
        while (step := self.scheduler.next_step()) is not None:
            self._run(step)
            for pool in self.scheduler.pools:
                assert sum(pool.counts()) == self.num_pages
        assert not self.scheduler.running()
        assert not self.scheduler.waiting

    def _run(self, step) -> None:
        chunks = [chunk for chunk, _ in step.chunks()]
        for chunk in chunks:
            pages = chunk.sequence.pages
            self.most_pages = max(self.most_pages, len(pages))
            assert len(pages) <= self.layout.max_pages(len(chunk.sequence.tokens))
            for position in range(chunk.start, chunk.start + chunk.count):
                self.slots[self._slot(chunk.sequence, position)] = self._content(chunk, position)
        for chunk in chunks:
            for position in range(chunk.start, chunk.start + chunk.count):
                for seen in range(self._first(position), position + 1):
                    slot = self._slot(chunk.sequence, seen)
                    assert self.slots[slot] == self._content(chunk, seen), "another's key"
        for chunk in chunks:
            state = chunk.sequence
            if chunk.start + chunk.count == len(state.tokens):
                state.tokens.append(len(state.tokens) * 7 % 5)
                if len(state.tokens) - state.prompt_length == state.request.params.max_tokens:
                    self.scheduler.remove(state)
                    self.finished += 1

    def _first(self, position: int) -> int:
        window = self.layout.window
        return 0 if window is None else max(0, position - window + 1)

    def _slot(self, state: SequenceState, position: int) -> tuple[int, int, int]:
        index = position // SIZE - state.first_page
        assert index >= 0, "a page that was released"
        return state.group, state.pages[index], position % SIZE

    def _content(self, chunk, position: int) -> tuple:
        return tuple(chunk.sequence.tokens[: position + 1])


@pytest.mark.parametrize("spare", [0, 4, 60])
@pytest.mark.parametrize("max_chunks", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 4, 5, 14, 31, 200])
def test_a_token_finds_every_key_that_it_sees(window, max_chunks, spare):
    """Of 30 requests of which many begin alike, in two groups of 5 slots, with pages for one of the
    longest and `spare` others: few enough that some are preempted in their prompts too."""
    layout = PageLayout(SIZE, max_chunks, window)
    num_pages = layout.max_pages(160) + spare
    memory = Memory(layout, num_pages, groups=2, slots=5)
    random = np.random.default_rng(53)
    shared = random.integers(0, 3, 100).tolist()
    for _ in range(30):
        own = random.integers(0, 3, random.integers(1, 30)).tolist()
        prompt = shared[: random.integers(0, 100)] + own
        memory.scheduler.add(sequence(prompt, int(random.integers(1, 31))))
    memory.run()
    assert memory.finished == 30
    assert memory.scheduler.cached_tokens > 0 or spare < 60
    assert [pool.counts()[0] for pool in memory.scheduler.pools] == [0, 0]


def test_pages_behind_the_window_are_released():
    """A prompt of 25 pages and an answer of 10 in no more pages than the window and a step's chunks
    take."""
    layout = PageLayout(SIZE, max_chunks=2, window=9)
    memory = Memory(layout, num_pages=4)  # 8 tokens before the next one, and two new pages
    memory.scheduler.add(sequence(list(range(100)), 40))
    memory.run()
    assert (memory.finished, memory.most_pages, memory.scheduler.preempted) == (1, 4, 0)


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
