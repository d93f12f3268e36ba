"""An engine without a model: its tokens are a hash of prompt, seed and place, so they depend on the
request alone, as the real one's do."""

import hashlib
from collections import deque

from grok.data.tokenizers import StreamDecoder, Tokenizer
from grok.infer.page_pool import PageLayout
from grok.infer.request import Limits, Output, Request, TokenLogprobs
from grok.infer.stats import EngineStats


class FakeEngine:
    def __init__(self, tokenizer: Tokenizer, context_length: int = 128, slots: int = 4):
        self._tokenizer, self._slots = tokenizer, slots
        self._limits = Limits(
            tokenizer.vocab_size, context_length, PageLayout(context_length), slots, 1
        )
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._tokens_in = self._tokens_out = 0
        self._cancelled: list[Output] = []

    @property
    def unfinished(self) -> int:
        return len({sequence.request.id for sequence in [*self._waiting, *self._running]})

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            self._tokens_in, 0, self._tokens_out, 0, len(self._running), len(self._waiting), 0, 0, 0
        )

    def submit(self, request: Request) -> None:
        self._limits.check(request)
        for choice in range(request.params.n):
            self._waiting.append(_Sequence(request, choice, self._tokenizer))

    def cancel(self, request_id: str) -> None:
        for sequence in [*self._waiting, *self._running]:
            if sequence.request.id == request_id:
                self._cancelled.append(
                    Output(request_id, sequence.choice, finish_reason="cancelled")
                )
        self._waiting = deque(
            sequence for sequence in self._waiting if sequence.request.id != request_id
        )
        self._running = [
            sequence for sequence in self._running if sequence.request.id != request_id
        ]

    def step(self) -> list[Output]:
        outputs, self._cancelled = self._cancelled, []
        while self._waiting and len(self._running) < self._slots:
            self._running.append(self._waiting.popleft())
            self._tokens_in += len(self._running[-1].request.prompt)
        outputs += [sequence.step() for sequence in self._running]
        self._tokens_out += len(self._running)
        self._running = [sequence for sequence in self._running if not sequence.finished]
        return outputs


class _Sequence:
    def __init__(self, request: Request, choice: int, tokenizer: Tokenizer):
        self.request, self.choice = request, choice
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, after=request.prompt)
        self._made = 0
        self.finished = False

    def step(self) -> Output:
        params = self.request.params
        if params.max_tokens == 0:
            self.finished = True
            scores = {"logprobs": (), "prompt_logprobs": self._of_prompt()}
            return Output(self.request.id, self.choice, finish_reason="length", **scores)
        key = f"{self.request.prompt} {params.seed} {self.choice} {self._made}"
        token = 4 + int.from_bytes(hashlib.blake2b(key.encode()).digest()[:4]) % (
            self._tokenizer.vocab_size - 4
        )
        self._made += 1
        self.finished = self._made == params.max_tokens
        text = self._decoder.push(token) + (self._decoder.flush() if self.finished else "")
        return Output(
            self.request.id,
            self.choice,
            (token,),
            text,
            (_logprobs(token, params.logprobs),) if params.logprobs is not None else None,
            self._of_prompt() if self._made == 1 and self.choice == 0 else None,
            "length" if self.finished else None,
            # Of the token before, as the real one.
            ([[token % 8, 1]],) * (self._made > 1) if params.experts else None,
        )

    def _of_prompt(self) -> tuple[TokenLogprobs | None, ...] | None:
        count = self.request.params.prompt_logprobs
        if count is None:
            return None
        return (None, *(_logprobs(token, count) for token in self.request.prompt[1:]))


def _logprobs(token: int, count: int) -> TokenLogprobs:
    top = tuple((max(0, token - rank), -0.5 - rank) for rank in range(count))
    return TokenLogprobs(token, -0.5, top)
