"""Messages and tools of a body, as chat templates read them, and the prompt that one makes."""

import json
from collections.abc import Mapping
from typing import Any

from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.renderer import TemplateError
from grok.errors import DataError, RequestError

MAX_TOOL_CHARACTERS = 100_000  # of JSON


def chat_prompt(
    chat: ChatEncoder | None, fields: Mapping[str, Any], add_generation_prompt: bool = True
) -> tuple[tuple[int, ...], str]:
    """Tokens and text of the messages and tools in a body's fields, by their chat template. Raises
    RequestError where there is none, or it does not write them."""
    if chat is None:
        problem = "chat needs a template, and there is none beside the tokenizer"
        right = "`prompt`, or chat_template in the config, would work"
        raise RequestError("messages", f"{problem}; {right}.")
    messages = [_message(message) for message in fields["messages"]]
    tools = _tools(chat, fields)
    try:
        ids, text = chat.prompt(messages, tools, add_generation_prompt)
    except TemplateError as error:
        start = "" if error.refused else "the chat template cannot write these messages: "
        raise RequestError("messages", f"{start}{str(error).rstrip('.')}.") from None
    except DataError as error:
        raise RequestError("messages", f"{str(error).rstrip('.')}.") from None
    return tuple(ids), text


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its content as one text, and the arguments of calls as objects, which is what
    templates write."""
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None and not calls:
        raise RequestError("messages", "the content of a message should be text.")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    result = {**message, "content": content or ""}
    if calls:
        result["tool_calls"] = [{**call, "function": _call(call["function"])} for call in calls]
    return result


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            name = f"{function['name']!r:.60}"
            message = f"the arguments of {name} in tool_calls should be the JSON of an object."
            raise RequestError("messages", message)
    return {**function, "arguments": arguments}


def _tools(chat: ChatEncoder, fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that a template is to write; None for none."""
    tools = fields.get("tools")
    if not tools or fields.get("tool_choice") == "none":
        return None
    if not chat.reads_tools:
        problem = "the chat template of this model writes no tools"
        raise RequestError("tools", f'{problem}; none, or tool_choice="none", would work.')
    try:
        length = len(json.dumps(tools, allow_nan=False))
    except (ValueError, RecursionError):
        message = "tools should be JSON, without NaN and Infinity, and not nested deeply."
        raise RequestError("tools", message) from None
    if length > MAX_TOOL_CHARACTERS:
        problem = f"tools are {length:,} characters of JSON"
        raise RequestError("tools", f"{problem}; {MAX_TOOL_CHARACTERS:,} at most would work.")
    return tools
