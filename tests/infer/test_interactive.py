"""Conversations in the terminal, with an engine that answers each prompt by its length."""

import signal

from grok.config.sampling import SamplingParams
from grok.errors import RequestError
from grok.infer.interactive import chat_loop, stream
from grok.infer.request import Output


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
        Letters(),
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
        Lengths(), Letters(), ["abc", "d"], SamplingParams(), lambda t, nl=True: shown.append(t)
    )
    assert texts == ["<3>", "<1>"]
    assert "".join(shown) == "abc<3>\nd<1>\n"
