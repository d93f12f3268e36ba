"""From the messages of a conversation to one prompt, by a template."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grok.data.tokenizers import Tokenizer
from grok.errors import ConfigError, RequestError

Render = Callable[[Sequence[Mapping[str, Any]]], str]


def make_renderer(template: str, tokenizer: Tokenizer) -> Render:
    """The function that makes a prompt of messages, each with `role` and `content`.

    `template` is Jinja as Hugging Face tokenizers have it: it sees `messages`, `bos_token`,
    `eos_token`, `add_generation_prompt` (true) and `raise_exception(text)`. Raises ConfigError
    where it is no template; what it refuses of messages is a RequestError.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(text: str) -> None:
        raise RequestError("messages", str(text))

    special = {
        "bos_token": _piece(tokenizer, tokenizer.bos_id),
        "eos_token": _piece(tokenizer, tokenizer.eos_id),
        "add_generation_prompt": True,
        "raise_exception": refuse,
    }
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"chat_template is no Jinja template: {error}.") from None

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return compiled.render(messages=messages, **special)
        except RequestError:
            raise
        # Whatever a template runs into with these messages: undefined names, types, the sandbox.
        except Exception as error:
            raise RequestError(
                "messages", f"the chat template cannot write these messages: {error}."
            ) from None

    return render


def _piece(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.piece(token) if token >= 0 else ""
