"""Completion by the shell: presets, files, keys of configs, and values where they are listed."""

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def complete_config(kind: str) -> Complete:
    """Completes the name of a preset, or of a file; `kind` is `train`, `batch` or `serve`."""

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
        from grok.config.load import presets

        # A server's presets are configs of runs, to which weights are added.
        names = presets(_config_type("train" if kind == "serve" else kind))
        items = [CompletionItem(name) for name in names if name.startswith(begun)]
        return [*items, CompletionItem(begun, type="file")]

    return complete


def overrides_argument(kind: str) -> Callable[[Callable], Callable]:
    """The argument [KEY=VALUE]... of a command."""
    complete = _complete_overrides(kind)
    return click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete)


def _complete_overrides(kind: str) -> Complete:

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
        from grok.config.schema import schema

        settings = schema(_config_type(kind))
        key, equals, value = begun.partition("=")
        if not equals:
            keys = {name: s for name, s in settings.items() if s.section is None}
            return [
                CompletionItem(f"{name}=", help=setting.meaning)
                for name, setting in keys.items()
                if name.startswith(begun)
            ]
        setting = settings.get(key)
        choices = () if setting is None else setting.choices
        if setting is not None and setting.type is bool:
            choices = ("true", "false")
        return [CompletionItem(f"{key}={choice}") for choice in choices if choice.startswith(value)]

    return complete


def _config_type(kind: str) -> type:
    from grok.config import RunConfig
    from grok.config.infer import BatchConfig, ServeConfig

    return {"train": RunConfig, "batch": BatchConfig, "serve": ServeConfig}[kind]
