"""Words that a shell completes."""

import pytest
from click.shell_completion import ShellComplete

from grok.cli.main import main


@pytest.mark.parametrize(
    ("words", "begun", "expected"),
    [
        (["train"], "grok-100", ["grok-100m"]),
        (["batch"], "grok", ["grok-1-v6e"]),
        (["serve"], "decode-v5p", ["decode-v5p-2x2x2"]),
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
