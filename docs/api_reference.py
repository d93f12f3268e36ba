"""Writes docs/api.md, the reference of the public names of `grok`, from signatures and docstrings:

python docs/api_reference.py > docs/api.md
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import grok
from grok.config.sampling import SamplingParams
from grok.config.schema import schema

HEAD = """# Python reference

Every public name of `import grok`; [python.md](python.md) has examples. This page is generated from
docstrings: `python docs/api_reference.py > docs/api.md`.
"""

SECTIONS = {
    "Answers": (
        *("LLM", "SamplingParams", "CompletionOutput", "TokenLogprobs", "TextScore"),
        *("Tokenizer", "load_tokenizer"),
    ),
    "Configs": ("load_config", "RunConfig", "ModelConfig"),
    "Models": ("make_mesh", "init", "load", "Grok"),
    "Training": (
        *("mesh_for", "make_optimizer", "init_state", "TrainState", "batches", "train_step"),
        *("jit", "save_checkpoint"),
    ),
    "Errors": ("GrokError",),
}
# Methods of a class that has more than a user needs; of others all are listed.
METHODS = {"Grok": ("__call__", "hidden", "unembed")}
KEYS = "Its keys: [configuration.md](configuration.md)."


def page() -> str:
    """The page as Markdown."""
    lines = [HEAD]
    for title, names in SECTIONS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += entry(name, getattr(grok, name))
    return "\n".join(lines).rstrip() + "\n"


def entry(name: str, value: Any) -> Iterator[str]:
    """The lines of one public name."""
    yield from (f"### {name}", "")
    if not inspect.isclass(value):
        yield from (f"`grok.{name}{signature(value)}`", "", prose(value), "")
        return
    yield from (prose(value), "")
    if name.endswith("Config"):
        yield from (KEYS, "")
    elif value is SamplingParams:
        yield from ("| field | default | meaning |", "|---|---|---|")
        for key, setting in schema(value).items():
            yield f"| `{key}` | `{setting.default}` | {setting.meaning} |"
        yield ""
    else:
        fields = [f"`{field}`" for field in inspect.get_annotations(value)]
        if fields and name not in METHODS:
            yield from (f"Fields: {', '.join(fields)}.", "")
        yield from members(name, value)


def members(name: str, value: type) -> Iterator[str]:
    """The lines of a class's public methods and properties, its constructor first."""
    names = [member for member in vars(value) if not member.startswith("_")]
    if "Raises" in (value.__init__.__doc__ or ""):
        names = ["__init__", *names]
    for member in METHODS.get(name, names):
        function = inspect.getattr_static(value, member)
        called = {"__init__": f"grok.{name}", "__call__": "model"}.get(member, f".{member}")
        if isinstance(function, property):
            yield from (f"`{called}`", "", prose(function), "")
        elif inspect.isfunction(function):
            yield from (f"`{called}{signature(function)}`", "", prose(function), "")


def signature(function: Any) -> str:
    """Parameters with their defaults, and the type that is returned, as the source has them."""
    source = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(source, ast.FunctionDef)
    arguments = source.args
    for argument in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.args = [argument for argument in arguments.args if argument.arg != "self"]
    returns = "None" if source.returns is None else ast.unparse(source.returns).strip("'")
    is_told = returns not in ("None", "Any") and not returns.startswith("_")
    arrow = f" -> {returns}" if is_told else ""
    return f"({ast.unparse(arguments)}){arrow}"


def prose(value: Any) -> str:
    """The docstring, of which asterisks outside of code are no emphasis."""
    text = inspect.cleandoc(value.__doc__ or "")
    return re.sub(r"(`[^`]*`)|\*", lambda match: match[1] or r"\*", text)


if __name__ == "__main__":
    print(page(), end="")
