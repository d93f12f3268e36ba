"""Bodies of requests: tools, tokens of texts and conversations, and what is refused in them."""

import json
from pathlib import Path

import pytest

from grok.config.sampling import SamplingConfig
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.template import ChatTemplate
from grok.data.tokenizers import load_tokenizer
from grok.errors import RequestError
from grok.infer.openai.requests import RequestParser
from grok.infer.openai.tokenization import detokenize, tokenize

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPLATES = json.loads((GOLDEN / "chat" / "transformers.json").read_text())
CHATS = [chat for chat in TEMPLATES["chats"] if chat["template"] == "tools"]
TALK = [{"role": "user", "content": "How is it?"}]
NOW = {"type": "function", "function": {"name": "now"}}
WITH_TOOLS = next(chat for chat in CHATS if "tools" in chat and len(chat["messages"]) > 1)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "families" / "llama31")


@pytest.fixture(scope="module")
def parser(tokenizer) -> RequestParser:
    """Of a model whose template writes tools."""
    chat = ChatEncoder(ChatTemplate(TEMPLATES["templates"]["tools"], "a template"), tokenizer)
    return RequestParser(tokenizer, SamplingConfig(), 4096, chat)


@pytest.fixture(scope="module")
def without_tools(tokenizer) -> RequestParser:
    chat = ChatEncoder(ChatTemplate(TEMPLATES["templates"]["llama-3"], "a template"), tokenizer)
    return RequestParser(tokenizer, SamplingConfig(), 4096, chat)


def test_tools_and_calls_are_written_by_the_template(parser):
    """As OpenAI's clients send them: no content beside a call, whose arguments are JSON as text."""
    body = json.loads(json.dumps({key: WITH_TOOLS[key] for key in ("messages", "tools")}))
    (message,) = [message for message in body["messages"] if "tool_calls" in message]
    function = message["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    message["content"] = None
    for choice in ({}, {"tool_choice": "auto"}):
        request = parser.chat(body | choice)
        assert request.texts == (WITH_TOOLS["text"],)
        assert list(request.prompts[0]) == WITH_TOOLS["ids"]
    plain = next(c for c in CHATS if "tools" not in c and c["messages"] == WITH_TOOLS["messages"])
    for left_out in ({"tool_choice": "none"}, {"tools": []}, {"tools": None}):
        assert parser.chat(body | left_out).texts == (plain["text"],)


def test_special_tokens_in_tools_are_text(parser, tokenizer):
    (name,) = [name for name in tokenizer.special_tokens if name == "<|eot_id|>"]
    tool = {"type": "function", "function": {"name": f"a{name}b", "parameters": {name: name}}}
    (prompt,) = parser.chat({"messages": TALK, "tools": [tool]}).prompts
    assert prompt.count(tokenizer.special_tokens[name]) == 2  # behind tools and the question


NESTED: dict = {}
for _ in range(5000):
    NESTED = {"a": NESTED}


@pytest.mark.parametrize(
    ("fields", "parameter", "words"),
    [
        ({"tools": {}}, "tools", "should be a list of 128 objects at most, each with type"),
        ({"tools": [{"type": "retrieval"}]}, "tools", 'each with type "function"'),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "a function with a name"),
        ({"tools": [NOW] * 129}, "tools", "128 objects at most"),
        ({"tools": [NOW | {"x": "a" * 100_000}]}, "tools", "100,000 at most would work"),
        ({"tools": [NOW | {"x": float("nan")}]}, "tools", "without NaN"),
        ({"tools": [NOW | {"x": NESTED}]}, "tools", "not nested deeply"),
        ({"tools": [NOW], "tool_choice": "required"}, "tool_choice", '"auto" or "none"'),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "no model is made to call a tool"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "there is no parameter"),
        ({"messages": []}, "messages", "one at least"),
        ({"messages": [{"content": "no role"}]}, "messages", "objects with role and content"),
        ({"messages": [{"role": "user"}]}, "messages", "the content of a message should be text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "the content of a message should be text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]},
            "messages",
            "a list of objects with a function, its name and arguments",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "now", "arguments": "[1]"}}],
                    }
                ]
            },
            "messages",
            "the arguments of 'now' in tool_calls should be the JSON of an object",
        ),
        ({"stream": 1}, "stream", "stream should be true or false"),
        ({"stream_options": {"other": True}}, "stream_options", "include_usage"),
        ({"model": 5}, "model", "model should be text"),
        ({"top_logprobs": 2}, "top_logprobs", "goes with logprobs=true alone"),
    ],
)
def test_refused_chats(parser, fields, parameter, words):
    with pytest.raises(RequestError) as caught:
        parser.chat({"messages": TALK, **fields})
    assert (caught.value.parameter, words in str(caught.value)) == (parameter, True), caught.value


def test_tools_are_refused_where_the_template_writes_none(without_tools):
    with pytest.raises(RequestError, match="template of this model writes no tools") as caught:
        without_tools.chat({"messages": TALK, "tools": [NOW]})
    assert caught.value.parameter == "tools"
    plain = without_tools.chat({"messages": TALK})
    for fields in ({"tools": [NOW], "tool_choice": "none"}, {"tools": []}):
        assert without_tools.chat({"messages": TALK, **fields}) == plain


def test_tokens_are_those_that_an_answer_begins_with(parser, tokenizer):
    def tokens(body: dict) -> dict:
        return json.loads(tokenize(parser, body).body)

    answer = tokenize(parser, {"prompt": "How is it?", "model": "m"})
    ids = list(parser.completion({"prompt": "How is it?"}).prompts[0])
    assert answer.model == "m"
    assert json.loads(answer.body) == {
        "count": len(ids),
        "max_model_len": 4096,
        "tokens": ids,
        "token_strs": None,
    }
    bare = tokens({"prompt": "How is it?", "add_special_tokens": False})["tokens"]
    assert [tokenizer.bos_id, *bare] == ids
    chat = {"messages": WITH_TOOLS["messages"], "tools": WITH_TOOLS["tools"]}
    named = tokens(chat | {"return_token_strs": True, "add_special_tokens": False})
    assert named["tokens"] == WITH_TOOLS["ids"]
    assert named["token_strs"] == list(map(tokenizer.piece, WITH_TOOLS["ids"]))
    shorter = tokens(chat | {"add_generation_prompt": False})["tokens"]
    assert shorter == named["tokens"][: len(shorter)]
    assert len(shorter) < len(named["tokens"])
    # Longer than the context: counted all the same.
    assert tokens({"prompt": "a " * 5000})["count"] > 4096


def test_text_of_tokens(parser, tokenizer):
    def text(ids: list[int]) -> str:
        return json.loads(detokenize(parser, {"tokens": ids}).body)["prompt"]

    assert text(WITH_TOOLS["ids"]) == WITH_TOOLS["text"]
    assert text([]) == ""
    part = tokenizer.encode("\u65e5")[:1]
    broken = text([*part, tokenizer.eos_id, *tokenizer.encode("x")])
    assert broken == f"\ufffd{tokenizer.piece(tokenizer.eos_id)}x"


@pytest.mark.parametrize(
    ("convert", "body", "parameter", "words"),
    [
        (tokenize, {}, "prompt", "prompt should be a text, where there are no messages"),
        (tokenize, {"prompt": [1, 2]}, "prompt", "should be a text"),
        (tokenize, {"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        (tokenize, {"prompt": "a", "messages": TALK}, "prompt", "no parameter 'prompt'"),
        (tokenize, {"messages": "a"}, "messages", "should be a list of objects"),
        (
            tokenize,
            {"messages": TALK, "add_special_tokens": True},
            "add_special_tokens",
            "add_special_tokens=false would work",
        ),
        (detokenize, {}, "tokens", "should be a list of ids"),
        (detokenize, {"tokens": "a"}, "tokens", "should be a list of ids"),
        (detokenize, {"tokens": [True]}, "tokens", "should be a list of ids"),
        (detokenize, {"tokens": [-1]}, "tokens", "not from 0 to"),
        (detokenize, {"tokens": [5] * 4097}, "tokens", "4096 would work"),
        (detokenize, {"tokens": [10**400]}, "tokens", "not from 0 to"),
    ],
)
def test_refused_texts_and_tokens(parser, convert, body, parameter, words):
    with pytest.raises(RequestError) as caught:
        convert(parser, body)
    assert (caught.value.parameter, words in str(caught.value)) == (parameter, True), caught.value


def test_messages_need_a_template_here_too(tokenizer):
    bare = RequestParser(tokenizer, SamplingConfig(), 4096)
    with pytest.raises(RequestError, match="chat needs a template"):
        tokenize(bare, {"messages": TALK})
