"""Chat templates: the one that a model ships, one of the user's, or one of those built in."""

import dataclasses
import functools
import os
from importlib import resources

from grok import storage
from grok.data.tokenizers import Tokenizer
from grok.data.tokenizers.files import (
    TEMPLATE_FILE,
    TEMPLATE_JSON,
    TOK_JSON,
    read_template,
)
from grok.errors import ConfigError, DataError

BUILT_IN = ("grok-1", "grok-2")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja `text` that makes a prompt of messages, and its `origin`, for messages."""

    text: str
    origin: str

    @property
    def is_built_in(self) -> bool:
        """True for one of ours, which write no token that begins a text."""
        return any(self.text.strip() == built_in(name).text.strip() for name in BUILT_IN)


@functools.cache
def built_in(name: str) -> ChatTemplate:
    """The template of xAI's models that is called "grok-1" or "grok-2"."""
    file = resources.files("grok.data.chat") / f"{name}.jinja"
    return ChatTemplate(file.read_text(encoding="utf-8"), name)


def find_template(setting: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that `setting` names: one built in, a file (Jinja, or JSON that has it), a
    folder or a name on the hub, or Jinja text itself. Without it, the one beside the tokenizer, or
    for a tokenizer of Grok-2's kind "grok-2"; None where there is none. ConfigError where the
    setting is nothing of these."""
    if not setting:
        files = tokenizer.files
        if text := files.chat_template():
            return ChatTemplate(text, f"the template beside {files.path}")
        return built_in("grok-2") if files.name == TOK_JSON else None
    if setting in BUILT_IN:
        return built_in(setting)
    if "{{" in setting or "{%" in setting:
        return ChatTemplate(setting, "chat_template")
    try:
        return ChatTemplate(_read(setting), setting)
    except DataError as error:
        names = " or ".join(BUILT_IN)
        right = f"a file, {names}, or Jinja text would work"
        raise ConfigError(
            f"chat_template={setting:.100} is no template ({error}); {right}."
        ) from None


def _read(path: str) -> str:
    names = (TEMPLATE_FILE, TEMPLATE_JSON, "tokenizer_config.json")
    is_file = path.endswith((".jinja", ".json", ".txt"))
    if os.path.isfile(path) or is_file:
        return read_template(path)
    file = next((f for n in names if storage.exists(f := storage.join(path, n), DataError)), None)
    if file is None:
        raise DataError(f"{path} has none of {', '.join(names)}")
    return read_template(file)
