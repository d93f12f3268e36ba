"""Completion by the shell: presets, files, keys of configs, and values where they are listed."""

import os
from collections.abc import Callable

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

# No space follows a key's `=`. For bash, `=` separates words: what follows it is completed alone.
BASH = r"""
%(complete_func)s() {
    local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT} completion type value
    local begun=${line##*[[:space:]]}
    for completion in $(env COMP_LINE="$line" %(complete_var)s=bash_complete $1); do
        IFS=',' read -r type value <<<"$completion"
        case $type in
            file) compopt -o default ;;
            plain)
                [[ $value != *= ]] || compopt -o nospace
                [[ $begun != *=* || $COMP_WORDBREAKS != *=* ]] || value=${value#*=}
                COMPREPLY+=("$value")
                ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""
ZSH = r"""
#compdef %(prog_name)s
%(complete_func)s() {
    local -a words_only described keys response
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
        %(complete_var)s=zsh_complete %(prog_name)s)}")
    for type word meaning in ${response}; do
        if [[ $type == file ]]; then _path_files -f
        elif [[ $word == *= ]]; then keys+=("$word:$meaning")
        elif [[ $meaning == _ ]]; then words_only+=("$word")
        else described+=("$word:$meaning"); fi
    done
    (( ! $#keys )) || _describe -V unsorted keys -U -S ''
    (( ! $#described )) || _describe -V unsorted described -U
    (( ! $#words_only )) || compadd -U -V unsorted -a words_only
}
compdef %(complete_func)s %(prog_name)s
"""

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


@add_completion_class
class Bash(BashComplete):
    """Completion by bash, of the words of the line as it was typed."""

    source_template = BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """Words between the command and the cursor, and the one that is begun."""
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)[1:]
        return (words, "") if line[-1:].isspace() else (words[:-1], words[-1])


@add_completion_class
class Zsh(ZshComplete):
    """Completion by zsh."""

    source_template = ZSH


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
