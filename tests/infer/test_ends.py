"""Prompts that begin, and completions that end, as the tokenizer of each family says."""

import jax
import pytest

import grok
from grok.config import EngineConfig
from grok.config.sampling import SamplingConfig, SamplingParams
from grok.data.tokenizers import StreamDecoder, Tokenizer, encode_prompt, load_tokenizer
from grok.errors import RequestError
from grok.infer.engine import Engine
from grok.infer.interactive import TextTurns, stream
from grok.infer.openai.requests import RequestParser
from grok.infer.request import Request
from tests.fixtures.tokenizers import NAMES, edit_json, make_release


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Llama 3.1's, with the ends of a chat model."""
    folder = make_release(tmp_path_factory.mktemp("release"), "llama31")
    edit_json(folder / "generation_config.json", eos_token_id=[313, 318, 319])
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def engine(tiny_run, tokenizer):
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    model = grok.init(tiny_run.model, jax.random.key(3), mesh)
    options = EngineConfig(max_num_seqs=4, page_size=16, prefill_chunk_size=32, num_pages=32)
    return Engine(model, tokenizer, mesh, options)


def run(engine, tokenizer, **params):
    request = Request("r", tuple(encode_prompt(tokenizer, "Hi")), SamplingParams(**params))
    outputs = list(engine.generate([request]))
    ids = [token for output in outputs for token in output.token_ids]
    return ids, outputs[-1].finish_reason, "".join(output.text for output in outputs)


@pytest.mark.parametrize("end", [313, 318, 319])
def test_each_end_ends_a_completion(engine, tokenizer, end):
    assert run(engine, tokenizer, max_tokens=5, allowed_token_ids=(end,)) == ([], "stop", "")
    ids, reason, text = run(
        engine, tokenizer, max_tokens=5, allowed_token_ids=(end,), ignore_eos=True
    )
    assert (ids, reason, text) == ([end] * 5, "length", "")


def test_no_end_comes_before_min_tokens(engine, tokenizer):
    allowed = (64, 313, 318, 319)
    ids, reason, text = run(
        engine, tokenizer, max_tokens=4, min_tokens=4, allowed_token_ids=allowed, seed=1
    )
    assert (ids, reason, text) == ([64] * 4, "length", "aaaa")


def test_text_is_streamed_by_whole_characters(engine, tokenizer):
    allowed = tuple(tokenizer.encode("\U0001f680\u65e5"))
    ids, _, text = run(engine, tokenizer, max_tokens=40, allowed_token_ids=allowed, seed=5)
    decoder = StreamDecoder(tokenizer, encode_prompt(tokenizer, "Hi"))
    assert text == "".join(decoder.push(i) for i in ids) + decoder.flush()


class Prompts:
    """An engine that keeps the prompts and answers nothing."""

    def __init__(self):
        self.prompts: list[list[int]] = []

    def generate(self, requests):
        self.prompts += [list(request.prompt) for request in requests]
        return iter(())


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("allow_special", [False, True])
def test_prompts_of_sample_and_of_requests_begin_alike(tmp_path, family, allow_special):
    tokenizer = load_tokenizer(make_release(tmp_path, family))
    end = tokenizer.eos_id
    text = f"Hello{tokenizer.piece(end)}"
    ids = encode_prompt(tokenizer, text, allow_special=allow_special)
    assert (end in ids) == allow_special
    assert (ids[0] == tokenizer.bos_id) == tokenizer.adds_bos
    engine = Prompts()
    turns = TextTurns(tokenizer, allow_special)
    stream(engine, turns, [text], SamplingParams(), lambda *_, **__: None)
    assert engine.prompts == [ids]
    parser = RequestParser(tokenizer, SamplingConfig(), 128, allow_special=allow_special)
    assert parser.completion({"prompt": text}).prompts == (tuple(ids),)
    # Tokens are taken as they are.
    assert parser.completion({"prompt": [5, 6]}).prompts == ((5, 6),)


def test_a_prompt_that_cannot_be_encoded_is_the_clients_mistake(tmp_path):
    parser = RequestParser(load_tokenizer(make_release(tmp_path, "grok2")), SamplingConfig(), 128)
    with pytest.raises(RequestError, match="1000000 spaces in a row"):
        parser.completion({"prompt": " " * 1_000_000})
