"""Conversations in the terminal, with an engine that answers each prompt by its length."""

import signal

import pytest

from grok.config.sampling import SamplingParams
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.template import ChatTemplate, built_in
from grok.data.tokenizers import load_tokenizer
from grok.errors import RequestError
from grok.infer.interactive import ChatTurns, TextTurns, chat_loop, stream, with_commands
from grok.infer.request import Output, with_answer_ends
from tests.fixtures.chat_templates import LLAMA_3, make_release


class Letters:
    """A tokenizer of characters."""

    adds_bos = False

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return [ord(letter) for letter in text]


class Lengths:
    """Answers "<n>" in three pieces; refuses prompts of more than ten tokens."""

    def __init__(self, interrupt: bool = False):
        self.prompts: list[str] = []
        self.left_early = False
        self._interrupt = interrupt

    def generate(self, requests):
        for request in requests:
            if len(request.prompt) > 10:
                raise RequestError("prompt", "it is too long.")
            self.prompts.append("".join(map(chr, request.prompt)))
        try:
            for request in requests:
                length = str(len(request.prompt))
                yield Output(request.id, 0, text="<")
                yield Output(request.id, 0, text=length)
                if self._interrupt:
                    signal.raise_signal(signal.SIGINT)
                yield Output(request.id, 0, text=">", finish_reason="stop")
        except GeneratorExit:
            self.left_early = True
            raise


def conversation(engine: Lengths, *lines: str) -> str:
    shown: list[str] = []
    typed = iter([*lines, None])
    params = SamplingParams()
    chat_loop(
        engine,
        TextTurns(Letters()),
        params,
        lambda: next(typed),
        lambda t, nl=True: shown.append(t + "\n" * nl),
    )
    return "".join(shown)


def test_each_line_continues_all_before_it():
    engine = Lengths()
    assert conversation(engine, "ab", "cd") == "<2>\n<8>\n"
    assert engine.prompts == ["ab", "ab<2>\ncd"]


def test_where_what_came_before_leaves_no_room_the_line_is_continued_without_it():
    engine = Lengths()
    shown = conversation(engine, "abcdefgh", "ij", "kl", "m" * 11, "n")
    forgotten = "What came before leaves no room for more, and is forgotten.\n"
    assert shown == f"<8>\n{forgotten}<2>\n<8>\n{forgotten}it is too long.\n<1>\n"
    assert engine.prompts == ["abcdefgh", "ij", "ij<2>\nkl", "n"]


def test_an_interrupt_ends_the_answer_and_not_the_conversation():
    engine = Lengths(interrupt=True)
    before = signal.getsignal(signal.SIGINT)
    assert conversation(engine, "ab", "c") == "<2\n<6\n"
    assert engine.left_early
    assert engine.prompts == ["ab", "ab<2\nc"]
    assert signal.getsignal(signal.SIGINT) is before


def test_prompts_are_written_in_their_order():
    shown: list[str] = []
    texts = stream(
        Lengths(),
        TextTurns(Letters()),
        ["abc", "d"],
        SamplingParams(),
        lambda t, nl=True: shown.append(t),
    )
    assert texts == ["<3>", "<1>"]
    assert "".join(shown) == "abc<3>\nd<1>\n"
    shown.clear()
    marked = (SamplingParams(n=2), lambda t, nl=True: shown.append(t), lambda prompt: f"[{prompt}]")
    stream(Lengths(), TextTurns(Letters()), ["abc"], *marked)
    assert "".join(shown).startswith("[abc]<3>\n")


class Echo:
    """Answers " <n>", n being the number of prompts so far, and keeps these as text."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.prompts: list[str] = []

    def generate(self, requests):
        for request in requests:
            self.prompts.append(self._tokenizer.decode(request.prompt))
            text = f" <{len(self.prompts)}>"
            yield Output(request.id, 0, text=text, finish_reason="stop")


@pytest.fixture
def grok(tmp_path):
    return load_tokenizer(make_release("grok-1", tmp_path))


def test_a_chat_is_written_by_its_template(grok):
    engine, shown = Echo(grok), []
    typed = iter(["One", "Two", None])
    turns = ChatTurns(ChatEncoder(built_in("grok-1"), grok))
    chat_loop(
        engine, turns, SamplingParams(), lambda: next(typed), lambda t, nl=True: shown.append(t)
    )
    end = "<|separator|>"
    first = f"Human: One{end}\n\nAssistant:"
    # The blank that begins an answer is the template's.
    assert engine.prompts == [first, f"{first} <1>{end}\n\nHuman: Two{end}\n\nAssistant:"]
    assert "".join(shown) == "<1><2>"


def test_lines_that_begin_with_a_slash_are_commands(grok):
    engine, shown = Echo(grok), []
    typed = iter(["One", "/history", "/reset", "//Two", "/what", "/help", "/exit", "Three"])
    turns = ChatTurns(ChatEncoder(built_in("grok-1"), grok), system="Be brief.")

    def echo(text, nl=True):
        shown.append(text)

    ask = with_commands(lambda: next(typed), turns, echo)
    answers = []
    chat_loop(engine, turns, SamplingParams(), ask, echo, lambda *answer: answers.append(answer))
    assert len(engine.prompts) == len(answers) == 2
    assert "Be brief." in engine.prompts[1] and "One" not in engine.prompts[1]
    assert "Human: /Two" in engine.prompts[1]
    assert shown[2:7] == [
        "system: Be brief.",
        "user: One",
        "assistant: <1>",
        "A new conversation begins.",
        "<2>",
    ]
    assert "There is no command /what; /help lists those that are." in shown
    assert any("/reset" in line for line in shown)


def test_prompts_of_a_chat_are_conversations_of_their_own(grok):
    engine, shown = Echo(grok), []
    turns = ChatTurns(ChatEncoder(built_in("grok-1"), grok))
    stream(engine, turns, ["One", "Two"], SamplingParams(), lambda t, nl=True: shown.append(t))
    assert [prompt.count("Human:") for prompt in engine.prompts] == [1, 1]
    assert "".join(shown) == "One\n <1>\nTwo\n <2>\n"


def test_a_line_that_the_template_refuses_is_told(grok):
    template = "{{ raise_exception('no') if messages | length > 2 else messages[-1].content }}"
    turns = ChatTurns(ChatEncoder(ChatTemplate(template, "t"), grok))
    shown, typed = [], iter(["a", "b", None])
    chat_loop(
        Echo(grok), turns, SamplingParams(), lambda: next(typed), lambda t, nl=True: shown.append(t)
    )
    assert "What came before leaves no room for more, and is forgotten." in shown


def test_an_answer_ends_where_the_template_ends_it(grok, tmp_path):
    llama = load_tokenizer(make_release("llama-3", tmp_path / "llama"))
    ends = {
        (grok, built_in("grok-1").text): (8,),
        (llama, LLAMA_3): (llama.special_tokens["<|eot_id|>"],),
    }
    for (tokenizer, template), ids in ends.items():
        answers = ChatEncoder(ChatTemplate(template, "t"), tokenizer).answers
        params = with_answer_ends(SamplingParams(stop=("x",), stop_token_ids=(5,)), answers)
        assert params.stop_token_ids == (5, *ids)
        assert params.stop == ("x",)
        ignoring = SamplingParams(ignore_eos=True)
        assert with_answer_ends(ignoring, answers) == ignoring
