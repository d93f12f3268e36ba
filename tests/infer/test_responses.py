"""Places of tokens in a text, and JSON of whatever clients send."""

import itertools
import json

import pytest

from grok.config.sampling import SamplingConfig
from grok.data.tokenizers import StreamDecoder, load_tokenizer
from grok.errors import RequestError
from grok.infer.openai.requests import RequestParser
from grok.infer.openai.responses import ResponseBuilder, json_text
from grok.infer.request import Output, TokenLogprobs
from tests.fixtures.tokenizers import make_release


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of bytes: most characters are several tokens."""
    return load_tokenizer(make_release(tmp_path_factory.mktemp("release"), "llama31"))


def built(tokenizer, prompt, answer: str, step: int, **body) -> list[dict]:
    """Events of a stream that gives `step` tokens at a time, and last the whole choice."""
    parser = RequestParser(tokenizer, SamplingConfig(), 128)
    request = parser.completion({"prompt": prompt, "logprobs": 0, "max_tokens": 99, **body})
    builder = ResponseBuilder(request, tokenizer)
    decoder = StreamDecoder(tokenizer, request.prompts[0])
    ids = tokenizer.encode(answer)
    scores = (None, *(TokenLogprobs(i, -1.0) for i in request.prompts[0][1:]))
    events = []
    for first in range(0, len(ids), step):
        some, last = ids[first : first + step], first + step >= len(ids)
        text = "".join(map(decoder.push, some)) + (decoder.flush() if last else "")
        logprobs = tuple(TokenLogprobs(i, -1.0) for i in some)
        prompt_logprobs = scores if first == 0 and request.echo else None
        end = "length" if last else None
        output = Output("key/0", 0, tuple(some), text, logprobs, prompt_logprobs, end)
        events += builder.add(output)
    return [*events, *builder.choices()]


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("echo", [False, True])
def test_tokens_of_a_character_share_its_place(tokenizer, step, echo):
    answer = "a\U0001f680\u65e5b\u00e9c"
    *events, choice = built(tokenizer, "\u65e5x", answer, step, echo=echo)
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert any(token.startswith("bytes:") for token in tokens)
    for token, offset, after in zip(tokens, offsets, [*offsets[1:], None], strict=True):
        if token == "<|begin_of_text|>":
            assert after == offset == 0
        elif not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
            assert after is None or after == offset + len(token)
        elif after is not None:
            assert after - offset in (0, 1)
    assert offsets[-1] == len(choice["text"]) - 1
    parts = (event["logprobs"]["text_offset"] for event in events)
    assert list(itertools.chain.from_iterable(parts)) == offsets


def test_an_answer_completes_the_character_that_its_prompt_begins(tokenizer):
    ids = tokenizer.encode("x\u65e5")
    assert len(ids) == 4
    parser = RequestParser(tokenizer, SamplingConfig(), 128)
    assert parser.completion({"prompt": ids[:2]}).texts == ("x",)
    broken = [*ids[:2], *tokenizer.encode("y")]
    assert parser.completion({"prompt": broken}).texts == ("x\ufffdy",)


def test_json_has_any_text():
    assert json_text({"a": "\u65e5"}) == '{"a": "\u65e5"}'
    half = json_text({"\ud800": "\u65e5"})
    assert json.loads(half.encode()) == {"\ud800": "\u65e5"}


def test_prompts_of_a_list_have_seeds_of_their_own(tokenizer):
    parser = RequestParser(tokenizer, SamplingConfig(), 128)
    body = {"prompt": ["a", "a", "a"]}

    def seeds(drawn: int, **fields) -> list[int]:
        return [r.params.seed for r in parser.completion(body | fields).requests("k", drawn)]

    assert len({*seeds(5), *seeds(6)}) == 6
    assert seeds(5, seed=9) == seeds(6, seed=9)
    assert seeds(5, seed=9)[0] == 9
    assert len(set(seeds(5, seed=9))) == 3


def test_prompts_beyond_the_context_are_refused_before_they_are_decoded(tokenizer):
    parser = RequestParser(tokenizer, SamplingConfig(), 128, max_choices=4)
    with pytest.raises(RequestError, match="129 tokens is longer than the model's context of 128"):
        parser.completion({"prompt": [5] * 129})
    with pytest.raises(RequestError, match="5 answers are asked for at once"):
        parser.completion({"prompt": ["a"] * 5})
    whole = parser.completion({"prompt": [5] * 128, "echo": True, "logprobs": 0, "max_tokens": 0})
    assert (whole.params.max_tokens, whole.params.prompt_logprobs) == (0, 0)
