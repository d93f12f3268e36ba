"""Words that a shell completes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from grok.cli.main import main


@pytest.mark.parametrize(
    ("words", "begun", "expected"),
    [
        (["train"], "grok-100", ["grok-100m"]),
        (["batch"], "grok", ["grok-1-v6e"]),
        (["serve"], "decode-v5p", ["decode-v5p-2x2x1-int4", "decode-v5p-2x2x2"]),
        (["train", "grok-1"], "train.grad_acc", ["train.grad_accum_steps="]),
        (["plan", "grok-1"], "model.remat=s", ["model.remat=selective"]),
        (["train", "grok-1"], "data.allow_data_change=", ["true", "false"]),
        (["serve", "run"], "http.max", ["http.max_connections="]),
        (["train", "grok-1"], "no.such", []),
    ],
)
def test_presets_keys_and_values_are_completed(words, begun, expected):
    complete = ShellComplete(main, {}, "grok", "_GROK_COMPLETE")
    items = complete.get_completions(words, begun)
    values = [item.value for item in items if item.type == "plain"]
    assert [value.removeprefix("data.allow_data_change=") for value in values] == expected
    assert any(item.type == "file" for item in items) == (len(words) == 1)


def test_bash_completes_a_line_as_it_is_typed():
    script = """
        compopt() { printf '%s ' "$@"; }
        eval "$(_GROK_COMPLETE=bash_source grok)"
        for line in 'train grok-10' 'train a train.grad_acc' 'plan a model.remat=s'; do
            COMP_LINE="grok $line" COMP_POINT=$((${#line} + 5)) COMPREPLY=()
            _grok_completion grok && echo "${COMPREPLY[@]}"
        done
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "-o default grok-100m grok-10m",
        "-o nospace train.grad_accum_steps=",
        "selective",
    ], done.stderr
