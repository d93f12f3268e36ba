"""Conversations to tokens, the same for supervised data and for prompts of a served model.

A text is encoded whole, as the model's own library would do it, but for one cut before each answer
of an assistant: a served model sees the tokens of the prompt up to there, then writes its own. What
a template writes itself is read with its special tokens; texts of special tokens within messages
are not, since whoever writes a message must not be able to end it, or to speak as another. These
are cut in two (`BREAK`) before the template sees them, so it may trim and join messages freely."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from grok.data.chat.renderer import (
    MAX_SECONDS,
    LimitError,
    Renderer,
    Rendering,
    Span,
    TemplateError,
)
from grok.data.chat.template import ChatTemplate
from grok.data.tokenizers import Tokenizer, start_ids
from grok.data.tokenizers.tokenizer import check_unicode
from grok.errors import DataError

# Half of a surrogate pair, which no message that is valid Unicode has.
BREAK = "\udc00"
# Texts that are meant as one token, whether the tokenizer has it or not.
CONTROL = re.compile(r"<\|[^\s<>|]+\|>")
ANSWER = "An answer."

Messages = Sequence[Mapping[str, Any]]
Tools = Messages | None


class Segment(NamedTuple):
    """A part of a conversation's text; `has_loss` where an assistant wrote it."""

    text: str
    has_loss: bool


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The tokens of a conversation, for each whether an assistant wrote it, and its text."""

    ids: list[int]
    mask: list[bool]
    segments: list[Segment]


@dataclasses.dataclass(frozen=True)
class Answers:
    """The form of an assistant's message in a template: blanks, the `lead`, before its text, and
    at its end a token, or a text where that is not one token."""

    lead: str = ""
    end_ids: tuple[int, ...] = ()
    end_texts: tuple[str, ...] = ()


class ChatEncoder:
    """Conversations to tokens by a template and a tokenizer. `notices` are sentences on what may
    be amiss, `answers` says how answers begin and end. With `allow_special`, special tokens in
    messages are read as such; `now` is the time that the template sees. Raises TemplateError for
    what is no template."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        allow_special: bool = False,
        now: str | None = None,
    ):
        self.template, self._tokenizer = template, tokenizer
        self._allow_special = allow_special
        try:
            self._renderer = Renderer(template.text, template_fields(tokenizer), now, MAX_SECONDS)
        except TemplateError as error:
            raise TemplateError(f"{template.origin} is no chat template: {error}.") from None
        self._names = {*tokenizer.special_tokens, *CONTROL.findall(template.text)}
        # Longest first: one may be part of another.
        self._broken = sorted((n for n in self._names if len(n) > 1), key=len, reverse=True)
        self._beginnings = {
            name[:length] for name in self._broken for length in range(1, len(name))
        }
        self._start = start_ids(tokenizer) if template.is_built_in else []
        self.finds_answers = True  # False: supervised data cannot be made by this template
        self.notices: list[str] = []
        self.answers = self._probe()

    @property
    def reads_tools(self) -> bool:
        """True where the template writes tools."""
        return self._renderer.reads_tools

    def prompt(
        self, messages: Messages, tools: Tools = None, add_generation_prompt: bool = True
    ) -> tuple[list[int], str]:
        """The tokens and the text of a prompt for an assistant's next message, or, without
        `add_generation_prompt`, of the messages alone. DataError where the template does not write
        them."""
        text, spans, _ = self._render(messages, add_generation_prompt, tools)
        ids, _ = self._encode(text, spans)
        return ids, text.replace(BREAK, "")

    def conversation(self, messages: Messages) -> Conversation:
        """A conversation to learn from. DataError where the template does not write it, or gives
        no way to tell what the assistant wrote."""
        text, spans, lost = self._render(messages, add_generation_prompt=False)
        if lost:
            raise DataError(
                "has an answer that cannot be found in what the chat template writes of it; a "
                "template with {% generation %} around answers would work"
            )
        ids, mask = self._encode(text, spans)
        end = self._tokenizer.eos_id
        if not ids or ids[-1] not in self._tokenizer.eos_ids:
            ids.append(end)
            mask.append(bool(mask) and mask[-1])
        return Conversation(ids, mask, list(_segments(text, spans)))

    def _render(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools = None
    ) -> Rendering:
        try:
            protected = [self._protected(message) for message in messages]
            tools = tools and [self._protected(tool, with_nulls=True) for tool in tools]
            text, spans, lost = self._renderer.render(protected, add_generation_prompt, tools)
        except RecursionError:
            raise DataError("the messages are nested too deeply") from None
        return Rendering(text, [self._trimmed(text, span) for span in spans], lost)

    def _protected(self, value: Any, with_nulls: bool = False) -> Any:
        """A message or a tool, or part of it, with its texts of special tokens cut in two. In rows
        of Parquet, which have every field, null stands for one that is not there."""
        if isinstance(value, str):
            return self._cut(value)
        if isinstance(value, Mapping):
            return {
                self._cut(str(key)): self._protected(item, with_nulls)
                for key, item in value.items()
                if with_nulls or item is not None
            }
        if isinstance(value, list | tuple):
            return [self._protected(item, with_nulls) for item in value]
        # Parquet has types that JSON lacks, such as times.
        return value if value is None or isinstance(value, int | float) else str(value)

    def _cut(self, text: str) -> str:
        check_unicode(text)
        if self._allow_special:
            return text
        for name in self._broken:
            if name in text:
                text = text.replace(name, f"{name[0]}{BREAK}{name[1:]}")
        longest = len(self._broken[0]) if self._broken else 0
        # What follows it could complete a special token.
        ends = (text[-length:] for length in range(1, min(longest, len(text) + 1)))
        return text + BREAK if any(end in self._beginnings for end in ends) else text

    def _trimmed(self, text: str, span: Span) -> Span:
        """A span without blanks behind a special token: there, a completion has ended."""
        inside = text[span.start : span.stop].rstrip()
        ended = any(inside.endswith(name) for name in self._names)
        return Span(span.start, span.start + len(inside)) if ended else span

    def _encode(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Ids of a rendering, and for each whether it is of a span."""
        ids, mask = list(self._start), [False] * len(self._start)
        bounds = [*(span.start for span in spans), len(text)]
        ids += self._ids(text[: bounds[0]], continues=False)
        mask += [False] * (len(ids) - len(mask))
        for span, bound in zip(spans, bounds[1:], strict=True):
            continues = span.start > 0
            learnt = self._ids(text[span.start : span.stop], continues)
            rest = self._ids(text[span.start : bound], continues)
            if rest[: len(learnt)] != learnt:
                # The last token would reach beyond the span.
                rest = learnt + self._ids(text[span.stop : bound], continues=True)
            ids += rest
            mask += [True] * len(learnt) + [False] * (len(rest) - len(learnt))
        return ids, mask

    def _ids(self, text: str, continues: bool) -> list[int]:
        ids: list[int] = []
        for part in filter(None, text.split(BREAK)):
            ids += self._tokenizer.encode(part, allow_special=True, continues=continues)
            continues = True
        return ids

    def _probe(self) -> Answers:
        """Finds the bounds of an answer in a short conversation, and fills `notices`."""
        messages = [{"role": "user", "content": "A question."}]
        messages.append({"role": "assistant", "content": ANSWER})
        try:
            text, spans, _ = self._render(messages, add_generation_prompt=False)
        except LimitError as error:
            raise TemplateError(f"{self.template.origin} is no chat template: {error}.") from None
        except DataError:
            return Answers()  # it writes only conversations of another kind
        self.finds_answers = bool(spans)
        before, _, end = text.rpartition(ANSWER)
        lead = before[spans[0].start :] if spans else ""
        lead = "" if lead.strip() else lead
        if not (end := end.strip()):
            return Answers(lead)
        names = [name for name in self._names if end.startswith(name)]
        end = max(names, key=len, default=end)
        ids = self._tokenizer.encode(end, allow_special=True, continues=True)
        if len(ids) == 1:
            return Answers(lead, end_ids=tuple(ids))
        self.notices.append(
            f"{self.template.origin} ends a message with {end!r:.60}, which is {len(ids)} tokens "
            "in this tokenizer: answers end at that text, and a model has to learn all of them; a "
            "tokenizer that has it as one token would work better."
        )
        return Answers(lead, end_texts=(end,))


def template_fields(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that a template sees by name, such as bos_token; empty where there is none."""
    files = tokenizer.files
    fields = {"bos_token": "", "eos_token": ""}
    for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token_id >= 0:
            fields[name] = tokenizer.piece(token_id)
    for name in [name for name in files.settings if name.endswith("_token")]:
        if isinstance(files.settings[name], str | Mapping) and (text := files.token_setting(name)):
            fields[name] = text
    return fields


def _segments(text: str, spans: Sequence[Span]) -> Iterator[Segment]:
    """The parts of a text, in turn outside and inside of spans; empty ones are left out."""
    bounds = [0, *(bound for span in spans for bound in span), len(text)]
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start < stop:
            yield Segment(text[start:stop].replace(BREAK, ""), number % 2 == 1)
