"""Texts and conversations as tokens, and back: the bodies of /tokenize and /detokenize, as vLLM has
them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grok.data.tokenizers import StreamDecoder, Tokenizer, encode_prompt
from grok.errors import DataError, RequestError
from grok.infer.openai.fields import FLAG, MESSAGES, MODEL, TOOLS, Field, Text, Tokens, known_fields
from grok.infer.openai.messages import chat_prompt
from grok.infer.openai.requests import RequestParser
from grok.infer.openai.responses import json_text

STRINGS = Field(bool, "return the name of each token in the vocabulary as token_strs", FLAG)
TOKENIZE = {
    "model": MODEL,
    "prompt": Field(Text, "the text", "a text, where there are no messages", required=True),
    "add_special_tokens": Field(bool, "put bos before it where completions do; default true", FLAG),
    "return_token_strs": STRINGS,
}
TOKENIZE_CHAT = {
    "model": MODEL,
    "messages": MESSAGES,
    "tools": TOOLS,
    "add_generation_prompt": Field(bool, "end where an answer begins; default true", FLAG),
    "add_special_tokens": Field(bool, "false alone: a chat template writes its own", FLAG),
    "return_token_strs": STRINGS,
}
DETOKENIZE = {
    "model": MODEL,
    "tokens": Field(Tokens, "ids of tokens", "a list of ids", required=True),
}


@dataclasses.dataclass(frozen=True)
class TokenizationAnswer:
    """The body of an answer, in JSON, and the model that was asked for."""

    model: str
    body: str


def tokenize(parser: RequestParser, body: Mapping[str, Any]) -> TokenizationAnswer:
    """The tokens that a completion or a chat of this body would begin with, however many."""
    chat = body.get("messages") is not None
    fields = known_fields(body, TOKENIZE_CHAT if chat else TOKENIZE)
    ids = _chat_ids(parser, fields) if chat else _text_ids(parser, fields)
    names = map(parser.tokenizer.piece, ids) if fields.get("return_token_strs") else None
    answer = {
        "count": len(ids),
        "max_model_len": parser.context_length,
        "tokens": list(ids),
        "token_strs": names and list(names),
    }
    return TokenizationAnswer(fields.get("model", ""), json_text(answer))


def _text_ids(parser: RequestParser, fields: Mapping[str, Any]) -> Sequence[int]:
    special = {"allow_special": parser.allow_special}
    try:
        if fields.get("add_special_tokens", True):
            return encode_prompt(parser.tokenizer, fields["prompt"], **special)
        return parser.tokenizer.encode(fields["prompt"], **special)
    except DataError as error:
        raise RequestError("prompt", str(error)) from None


def _chat_ids(parser: RequestParser, fields: Mapping[str, Any]) -> Sequence[int]:
    if fields.get("add_special_tokens"):
        message = "a chat template writes its special tokens; add_special_tokens=false would work."
        raise RequestError("add_special_tokens", message)
    ids, _ = chat_prompt(parser.chat_encoder, fields, fields.get("add_generation_prompt", True))
    return ids


def detokenize(parser: RequestParser, body: Mapping[str, Any]) -> TokenizationAnswer:
    """The text of tokens, with the names of special ones."""
    fields, last = known_fields(body, DETOKENIZE), parser.tokenizer.vocab_size - 1
    ids, longest = fields["tokens"], parser.context_length
    if len(ids) > longest:  # each takes its time, while other requests wait
        message = f"{len(ids)} tokens are more than the model's context; {longest} would work."
        raise RequestError("tokens", message)
    if ids and not 0 <= min(ids) <= max(ids) <= last:
        raise RequestError("tokens", f"tokens has an id that is not from 0 to {last}.")
    text = "".join(_pieces(parser.tokenizer, ids))
    return TokenizationAnswer(fields.get("model", ""), json_text({"prompt": text}))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[str]:
    decoder, names = StreamDecoder(tokenizer), {i: n for n, i in tokenizer.special_tokens.items()}
    for token in ids:
        if token in names:
            yield decoder.flush() + names[token]
        else:
            yield decoder.push(token)
    yield decoder.flush()
