"""The answers to a call, as bodies of OpenAI's completions interface or as parts of a stream."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from grok.data.tokenizers import Tokenizer
from grok.infer.openai.requests import CompletionRequest
from grok.infer.request import Output, TokenLogprobs


@dataclasses.dataclass
class _Delta:
    """What Outputs said of one answer, joined: all of it, or what is new."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    experts: list[list[list[int]]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, new: "_Delta") -> None:
        """Adds what is new."""
        self.text += new.text
        self.tokens += new.tokens
        self.logprobs += new.logprobs
        self.experts += new.experts
        self.finish_reason = new.finish_reason or self.finish_reason


class ResponseBuilder:
    """The answers to a call, put together from Outputs."""

    def __init__(self, call: CompletionRequest, tokenizer: Tokenizer):
        self.call, self._tokenizer = call, tokenizer
        count = len(call.prompts) * call.params.n
        self._answers = [_Delta() for _ in range(count)]
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}
        self._offsets = [0] * count
        self._untold: dict[int, _Delta] = {}
        self._begun: set[int] = set()

    def add(self, output: Output) -> list[dict[str, Any]]:
        """Takes an output of one of the call's requests; what a stream tells of it, as choices.

        That is one, but for the parts of answers that were ahead of their prompt's
        log-probabilities, which have to come first: none until then, and then all.
        """
        prompt = int(output.request_id.rpartition("/")[2])
        index = prompt * self.call.params.n + output.choice
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = output.prompt_logprobs
        new = _Delta(finish_reason=output.finish_reason)
        if not self.call.scores_only:
            new.text, new.tokens = output.text, list(output.token_ids)
            new.logprobs, new.experts = list(output.logprobs or ()), list(output.experts or ())
        self._answers[index].extend(new)
        self._untold.setdefault(index, _Delta()).extend(new)
        params = self.call.params
        if params.prompt_logprobs is not None and prompt not in self._prompt_logprobs:
            return []
        siblings = range(prompt * params.n, (prompt + 1) * params.n)
        return [self._emit(each) for each in siblings if each in self._untold]

    def _emit(self, index: int) -> dict[str, Any]:
        """What is new of an answer, as a choice; in front of the first the prompt, if wanted."""
        with_prompt = self.call.echo and index not in self._begun
        self._begun.add(index)
        return self._choice(index, self._untold.pop(index), with_prompt)

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return all(answer.finish_reason for answer in self._answers)

    @property
    def tokens(self) -> int:
        """New tokens so far."""
        return sum(len(answer.tokens) for answer in self._answers)

    @property
    def finish_reasons(self) -> list[str | None]:
        """Why each answer ended."""
        return [answer.finish_reason for answer in self._answers]

    def usage(self) -> dict[str, int]:
        """Counts of tokens, as a body has them."""
        read = sum(map(len, self.call.prompts))
        return {
            "prompt_tokens": read,
            "completion_tokens": self.tokens,
            "total_tokens": read + self.tokens,
        }

    def choices(self) -> list[dict[str, Any]]:
        """The answers as a body that is not streamed has them."""
        self._offsets = [0] * len(self._answers)
        return [
            self._choice(index, answer, self.call.echo, whole=True)
            for index, answer in enumerate(self._answers)
        ]

    def _choice(
        self, index: int, part: _Delta, with_prompt: bool, whole: bool = False
    ) -> dict[str, Any]:
        common: dict[str, Any] = {"index": index, "finish_reason": part.finish_reason}
        if self.call.params.experts:
            common["experts"] = part.experts
        if self.call.chat:
            logprobs = None
            if self.call.params.logprobs is not None:
                logprobs = {"content": [self._chat_token(each) for each in part.logprobs]}
            message = {"role": "assistant", "content": part.text}
            return {**common, ("message" if whole else "delta"): message, "logprobs": logprobs}
        prompt = index // self.call.params.n
        text, tokens = part.text, list[tuple[int, TokenLogprobs | None]]()
        if with_prompt:
            text = self.call.texts[prompt] + text
            known = self._prompt_logprobs.get(prompt, [None] * len(self.call.prompts[prompt]))
            tokens += zip(self.call.prompts[prompt], known, strict=True)
        tokens += zip(part.tokens, part.logprobs, strict=False)
        logprobs = None
        if self.call.params.logprobs is not None:
            logprobs = self._completion_logprobs(index, tokens)
        return {**common, "text": text, "logprobs": logprobs}

    def _completion_logprobs(
        self, index: int, tokens: Iterable[tuple[int, TokenLogprobs | None]]
    ) -> dict[str, Any]:
        ids, known = [], []
        for token, logprobs in tokens:
            ids.append(token)
            known.append(logprobs)
        texts = [self._token_text(token) for token in ids]
        lengths = [len(self._tokenizer.piece_bytes(token).decode(errors="ignore")) for token in ids]
        *offsets, self._offsets[index] = itertools.accumulate(lengths, initial=self._offsets[index])
        return {
            "tokens": texts,
            "token_logprobs": [each and each.logprob for each in known],
            "top_logprobs": [
                each and {self._token_text(token): value for token, value in each.top}
                for each in known
            ],
            "text_offset": offsets,
        }

    def _chat_token(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        def one(token: int, value: float) -> dict[str, Any]:
            data = self._tokenizer.piece_bytes(token)
            return {"token": self._token_text(token), "logprob": value, "bytes": list(data)}

        top = [one(token, value) for token, value in logprobs.top]
        return {**one(logprobs.token, logprobs.logprob), "top_logprobs": top}

    def _token_text(self, token: int) -> str:
        """A token's text; of a part of a character, `bytes:` and they."""
        data = self._tokenizer.piece_bytes(token)
        try:
            return data.decode() or self._tokenizer.piece(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def error_response(parameter: str | None, message: str, kind: str, code: str | None = None) -> dict:
    """An error as a body: `kind` is OpenAI's type of it, such as invalid_request_error."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
