"""One answer as it grows: its tokens, its text without stop texts, and how it ended."""

import numpy as np

from grok.data.tokenizers import StreamDecoder, Tokenizer
from grok.infer.request import Output, Request, TokenLogprobs


class Completion:
    """What came of one choice of a request so far, and what of it was told already."""

    def __init__(self, request: Request, choice: int, tokenizer: Tokenizer | None):
        self.request, self.choice = request, choice
        self.finish_reason: str | None = None
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, request.prompt)
        params = request.params
        end = () if tokenizer is None or params.ignore_eos else (tokenizer.eos_id,)
        self._ends = frozenset((*params.stop_token_ids, *end))
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._experts: list[list[list[int]]] = []
        self._text = ""
        self._told_tokens = self._told_experts = self._told_text = 0
        self._sum = 0.0

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of its tokens, by which the best of several are found."""
        return self._sum / max(1, len(self._tokens))

    def add(self, logprobs: TokenLogprobs) -> None:
        """Takes the next token; afterwards `finish_reason` may be set."""
        params, token = self.request.params, logprobs.token
        if token in self._ends:
            self._finish("stop")
            return
        self._tokens.append(token)
        self._logprobs.append(logprobs)
        self._sum += logprobs.logprob
        if self._decoder is not None:
            self._grow(self._decoder.push(token))
        if self.finish_reason is None and len(self._tokens) == params.max_tokens:
            self._finish("length")

    def add_experts(self, experts_LC: np.ndarray) -> None:
        """Takes the experts that the next of its tokens without any went to."""
        self._experts.append(experts_LC.tolist())

    def cancel(self) -> None:
        """Ends it here."""
        self._finish("cancelled")

    def drain(self) -> Output:
        """What is new since the last time."""
        tokens = tuple(self._tokens[self._told_tokens :])
        logprobs = tuple(self._logprobs[self._told_tokens :])
        experts = tuple(self._experts[self._told_experts :])
        safe = len(self._text) - (self._stop_prefix_length() if self.finish_reason is None else 0)
        text = self._text[self._told_text : safe]
        self._told_tokens, self._told_text = len(self._tokens), max(safe, self._told_text)
        self._told_experts = len(self._experts)
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return Output(
            self.request.id,
            self.choice,
            tokens,
            text,
            None if self.request.params.logprobs is None else logprobs,
            prompt_logprobs,
            self.finish_reason,
            experts if self.request.params.experts else None,
        )

    def _finish(self, reason: str) -> None:
        if self._decoder is not None:
            self._grow(self._decoder.flush())
        self.finish_reason = self.finish_reason or reason

    def _grow(self, text: str) -> None:
        """Adds text, and ends before the first stop text in it."""
        stops = self.request.params.stop
        longest = max(map(len, stops), default=1)
        first = max(0, len(self._text) - longest + 1)
        self._text += text
        found = [at for stop in stops if (at := self._text.find(stop, first)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.finish_reason = "stop"

    def _stop_prefix_length(self) -> int:
        """Length of the longest end of the text that a stop text begins with."""
        most = 0
        for stop in self.request.params.stop:
            for length in range(min(len(stop) - 1, len(self._text)), most, -1):
                if stop.startswith(self._text[len(self._text) - length :]):
                    most = length
                    break
        return most
