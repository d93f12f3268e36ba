"""The pages of a server, each one file of HTML that loads nothing: one to try the model, and one
that describes the interface."""

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from grok.serve.openapi import body_schemas, words

FILES = resources.files("grok.serve") / "page"
LOADED = re.compile(
    r'<link rel="stylesheet" href="(?P<style>.+?)">|<script src="(?P<script>.+?)"></script>'
)


def model_page() -> str:
    """The page to try the model, with its style and scripts in it."""

    def inline(reference: re.Match[str]) -> str:
        tag = reference.lastgroup
        text = (FILES / reference[tag or 0]).read_text(encoding="utf-8")
        return f"<{tag}>\n{text}</{tag}>"

    return LOADED.sub(inline, (FILES / "page.html").read_text(encoding="utf-8"))


def interface_page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as a page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"words": words, "bodies": body_schemas}
    template = environment.from_string((FILES / "docs.html").read_text(encoding="utf-8"))
    return template.render(document=document, schemas=document["components"]["schemas"])
