"""The fields of bodies: one table for each route, by which bodies are checked and the interface is
described. Types are what pydantic reads, strictly; null stands for a field that is not there."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pydantic

from grok.config.sampling import MAX_LOGPROBS, SamplingParams, Texts
from grok.errors import RequestError

OPEN = pydantic.with_config(pydantic.ConfigDict(extra="allow"))
CLOSED = pydantic.with_config(pydantic.ConfigDict(extra="forbid"))
MAX_TOOLS = 128  # as in OpenAI's interface

FailFast = pydantic.Field(fail_fast=True)
Text = pydantic.InstanceOf[str]  # a lone surrogate is refused in words of its own, where it matters
Tokens = Annotated[list[int], FailFast]
Prompt = Text | Tokens | Annotated[list[Text | Tokens], FailFast]


@OPEN
class TextPart(TypedDict):
    """A part of a message's content."""

    text: Text


@OPEN
class FunctionCall(TypedDict):
    """A function and its arguments: JSON as text, or the object itself."""

    name: Text
    arguments: Text | dict[str, Any]


@OPEN
class ToolCall(TypedDict):
    """A call that an assistant made earlier."""

    function: FunctionCall


@OPEN
class Message(TypedDict):
    """A message of a conversation. Other fields are passed on to the chat template."""

    role: Any
    content: NotRequired[Text | Annotated[list[TextPart], FailFast] | None]
    tool_calls: NotRequired[Annotated[list[ToolCall], FailFast] | None]


@OPEN
class Function(TypedDict):
    """A function that a model may ask for; `parameters` is a JSON schema."""

    name: Text
    description: NotRequired[Text | None]
    parameters: NotRequired[dict[str, Any] | None]


@OPEN
class Tool(TypedDict):
    """A tool that a template writes into the prompt."""

    type: Literal["function"]
    function: Function


@CLOSED
class StreamOptions(TypedDict):
    """Options of a stream."""

    include_usage: NotRequired[bool]


@dataclasses.dataclass(frozen=True)
class Field:
    """A field's type, its meaning, and what it should be, in words; parameters of sampling have
    none, since SamplingParams refuses them in its own. `inner` has words for what is inside."""

    type: Any
    meaning: str
    expected: str = ""
    required: bool = False
    inner: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def adapter(self) -> pydantic.TypeAdapter:
        """The validator of its type."""
        return pydantic.TypeAdapter(self.type)

    def check(self, name: str, value: Any) -> None:
        """Raises RequestError for a value of another type."""
        if not self.expected:
            return
        try:
            self.adapter.validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            places = error.errors(include_url=False, include_input=False)[0]["loc"]
            words = (self.inner[str(place)] for place in places if str(place) in self.inner)
            sentence = next(words, f"{name} should be {self.expected}.")
            raise RequestError(name, sentence) from None


def _sampling_fields() -> dict[str, Field]:
    """The parameters of sampling that a body may set: all but the one that `echo` stands for."""
    fields = {}
    hints = typing.get_type_hints(SamplingParams, include_extras=True)
    for name in [field.name for field in dataclasses.fields(SamplingParams)]:
        meaning = next(note for note in typing.get_args(hints[name]) if isinstance(note, str))
        fields[name] = Field(hints[name], meaning)
    del fields["prompt_logprobs"]
    return fields | {"stop": Field(Texts | Text, fields["stop"].meaning)}


FLAG = "true or false"
MODEL = Field(Text, "the model's name; none: the one that is served", "text")
SAMPLING = _sampling_fields()
# Allowed in both kinds of body; `user` and `metadata` are the client's own notes.
COMMON = SAMPLING | {
    "model": MODEL,
    "stream": Field(bool, "send the answer as it grows, as server-sent events", FLAG),
    "stream_options": Field(
        StreamOptions,
        "include_usage: counts of tokens in the last event",
        "an object that may have include_usage, true or false, alone",
    ),
    "user": Field(Any, "a note of the client's, which nothing reads"),
    "metadata": Field(Any, "a note of the client's, which nothing reads"),
}
MESSAGES = Field(
    Annotated[list[Message], pydantic.Field(min_length=1, fail_fast=True)],
    "the conversation, as the chat template writes it; of content, its texts",
    "a list of objects with role and content, one at least",
    required=True,
    inner={
        "content": "the content of a message should be text.",
        "tool_calls": "tool_calls of a message should be a list of objects with a function, its "
        "name and arguments.",
    },
)
TOOLS = Field(
    Annotated[list[Tool], pydantic.Field(max_length=MAX_TOOLS, fail_fast=True)],
    "functions that the chat template writes into the prompt; a call is text of the answer",
    f'a list of {MAX_TOOLS} objects at most, each with type "function" and a function with a name',
)
TOOL_CHOICE = Field(
    Literal["none", "auto"],
    "auto: tools are written into the prompt; none: they are left out",
    '"auto" or "none": no model is made to call a tool here',
)
COMPLETION = COMMON | {
    "prompt": Field(
        Prompt,
        "text or tokens to continue, or several of them",
        "a text, a list of tokens, or a list of these",
        required=True,
    ),
    "echo": Field(bool, "return the prompt before the answer, with its log-probabilities", FLAG),
}
CHAT = {name: field for name, field in COMMON.items() if name != "best_of"} | {
    "messages": MESSAGES,
    "tools": TOOLS,
    "tool_choice": TOOL_CHOICE,
    "max_completion_tokens": Field(
        SAMPLING["max_tokens"].type, "another name of max_tokens", "an integer, at least 0"
    ),
    "logprobs": Field(bool, "return the log-probability of each token", FLAG),
    "top_logprobs": Field(
        SAMPLING["logprobs"].type,
        "the same of the k likeliest tokens",
        f"an integer from 0 to {MAX_LOGPROBS}",
    ),
}


def known_fields(body: Mapping[str, Any], table: Mapping[str, Field]) -> dict[str, Any]:
    """The fields that are set (clients send null for others). Raises RequestError for a name that
    the table lacks, a type that is another, and a field that must be there and is not."""
    fields = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in fields if name not in table]:
        near = difflib.get_close_matches(name, table, 1, cutoff=0.8)
        right = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(table))}."
        raise RequestError(f"{name:.60}", f"there is no parameter {name!r:.60} here; {right}")
    for name, field in table.items():
        if name in fields:
            field.check(name, fields[name])
        elif field.required:
            raise RequestError(name, f"{name} should be {field.expected}.")
    return fields
