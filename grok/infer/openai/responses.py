"""Outputs of the engine as bodies or stream events of OpenAI's completions interface."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from grok.data.tokenizers import StreamDecoder, Tokenizer
from grok.infer.openai.requests import CompletionRequest
from grok.infer.request import Output, TokenLogprobs


class AnswerFailed(Exception):
    """An error that ended one request in the engine, by a fault that is not its client's."""


class TextOffsets:
    """The place of each token in a text, in characters; of one that continues a character, that
    character's. The ids `after` which the text begins are no part of it."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int]):
        self._tokenizer, self._decoder = tokenizer, StreamDecoder(tokenizer, after)
        self._length = 0

    def next(self, token: int) -> int:
        """The place of the next token."""
        data, offset = self._tokenizer.piece_bytes(token), self._length
        continues = data[:1] and 0x80 <= data[0] < 0xC0
        if self._decoder.pending and data and not continues:
            offset += 1  # U+FFFD, in place of a character that was only begun
        self._length += len(self._decoder.push(token))
        return offset


class LeadStripper:
    """Takes the blanks, `lead`, that a chat template has before answers from where they begin."""

    def __init__(self, lead: str):
        self._lead, self._begun = lead, set[int]()

    def strip(self, index: int, output: Output) -> Output:
        """The next output of answer `index`, without the blanks if its text begins here."""
        if not output.text or index in self._begun:
            return output
        self._begun.add(index)
        return dataclasses.replace(output, text=output.text.removeprefix(self._lead))


class ResponseBuilder:
    """Puts the answers to a request together from Outputs. `tokens` is the number of new tokens so
    far, `finish_reasons` has one for each answer."""

    def __init__(self, request: CompletionRequest, tokenizer: Tokenizer):
        self.request, self._tokenizer = request, tokenizer
        count = len(request.prompts) * request.params.n
        self.tokens = 0
        self.finish_reasons: list[str | None] = [None] * count
        self._answers: list[list[Output]] = [[] for _ in range(count)]
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}
        self._offsets: dict[int, TextOffsets] = {}
        self._pending: dict[int, list[Output]] = {}
        self._leads = LeadStripper(request.lead)

    def add(self, output: Output) -> list[dict[str, Any]]:
        """Takes an output of one of the engine's requests; returns choices of a stream event. That
        is one choice, except where answers were ahead of their prompt's log-probabilities, which
        have to come first: none until then, and then all. Raises AnswerFailed."""
        if output.error is not None:
            raise AnswerFailed(output.error)
        params = self.request.params
        prompt = int(output.request_id.rpartition("/")[2])
        index = prompt * params.n + output.choice
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = output.prompt_logprobs
        output = self._leads.strip(index, output)
        self.tokens += len(output.token_ids)
        self.finish_reasons[index] = output.finish_reason
        self._answers[index].append(output)
        self._pending.setdefault(index, []).append(output)
        if params.prompt_logprobs is not None and prompt not in self._prompt_logprobs:
            return []
        choices = []
        for sibling in range(prompt * params.n, (prompt + 1) * params.n):
            if sibling in self._pending:
                outputs = self._pending.pop(sibling)
                with_prompt = self.request.echo and outputs[0] is self._answers[sibling][0]
                choices.append(self._choice(sibling, outputs, with_prompt))
        return choices

    @property
    def finished(self) -> bool:
        """True when every answer has ended."""
        return all(self.finish_reasons)

    def usage(self) -> dict[str, int]:
        """Counts of tokens, as a body has them."""
        prompt_tokens = sum(map(len, self.request.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": prompt_tokens + self.tokens,
        }

    def choices(self) -> list[dict[str, Any]]:
        """The complete answers, as a body that is not streamed has them."""
        self._offsets = {}
        return [
            self._choice(index, answer, self.request.echo, complete=True)
            for index, answer in enumerate(self._answers)
        ]

    def _choice(
        self, index: int, outputs: list[Output], with_prompt: bool, complete: bool = False
    ) -> dict[str, Any]:
        request, text = self.request, "".join(output.text for output in outputs)
        token_logprobs = [token for output in outputs for token in output.logprobs or ()]
        choice: dict[str, Any] = {"index": index, "finish_reason": self.finish_reasons[index]}
        if request.params.experts:
            choice["experts"] = [token for output in outputs for token in output.experts or ()]
        logprobs = None
        if request.chat:
            if request.params.logprobs is not None:
                logprobs = {"content": [self._chat_token(token) for token in token_logprobs]}
            message = {"role": "assistant", "content": text}
            return {**choice, ("message" if complete else "delta"): message, "logprobs": logprobs}
        prompt = index // request.params.n
        tokens: list[tuple[int, TokenLogprobs | None]] = []
        if with_prompt:
            text = request.texts[prompt] + text
            ids = request.prompts[prompt]
            tokens += zip(ids, self._prompt_logprobs.get(prompt, [None] * len(ids)), strict=True)
        tokens += [(token.token, token) for token in token_logprobs]
        if request.params.logprobs is not None:
            logprobs = self._completion_logprobs(index, tokens)
        return {**choice, "text": text, "logprobs": logprobs}

    def _completion_logprobs(
        self, index: int, tokens: Sequence[tuple[int, TokenLogprobs | None]]
    ) -> dict[str, Any]:
        if index not in self._offsets:
            request = self.request
            after = () if request.echo else request.prompts[index // request.params.n]
            self._offsets[index] = TextOffsets(self._tokenizer, after)
        offsets = self._offsets[index]
        return {
            "tokens": [self._token_text(token) for token, _ in tokens],
            "token_logprobs": [logprobs and logprobs.logprob for _, logprobs in tokens],
            "top_logprobs": [
                logprobs and {self._token_text(token): value for token, value in logprobs.top}
                for _, logprobs in tokens
            ],
            "text_offset": [offsets.next(token) for token, _ in tokens],
        }

    def _chat_token(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            data = self._tokenizer.piece_bytes(token)
            return {"token": self._token_text(token), "logprob": value, "bytes": list(data)}

        top = [entry(token, value) for token, value in logprobs.top]
        return {**entry(logprobs.token, logprobs.logprob), "top_logprobs": top}

    def _token_text(self, token: int) -> str:
        """A token's text; `bytes:` and its bytes where it is part of a character."""
        data = self._tokenizer.piece_bytes(token)
        try:
            return data.decode() or self._tokenizer.piece(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def error_response(parameter: str | None, message: str, kind: str) -> dict[str, Any]:
    """The body of an error: `kind` is OpenAI's type of it, such as invalid_request_error."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": None}}


def json_text(data: Any) -> str:
    """JSON of whatever a client sent and an engine made, which UTF-8 can always hold."""
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(data)
    return text
