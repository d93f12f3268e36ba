"""Arguments and variables arrive as they were, and secrets show nowhere."""

import os
from pathlib import Path

import pytest

from tests.launch.cloud import Cloud

AWKWARD = [
    "two words",
    "  edges  ",
    "it's",
    'a "quoted" word',
    "$HOME",
    "$(touch /tmp/never)",
    "`date`",
    "back\\slash",
    "*",
    "[{path: code, weight: 0.7}]",
    "a;b&c|d>e",
    "line\nbreak",
    "",
    "--",
    "~",
    "!history",
    "größer",
]


def test_arguments_arrive_intact(cloud: Cloud) -> None:
    cloud.ready()
    assert cloud.launch("run", "--", "grok", "train", *AWKWARD).returncode == 0
    [home] = cloud.homes()
    cloud.wait_for(home / "grok-launch" / "run" / "exit")
    arrived = (cloud.stub / "arguments-0").read_text().split("\0")
    assert arrived == ["train", *AWKWARD, ""]


def test_variables_arrive_intact_and_only_those_that_are_listed(cloud: Cloud) -> None:
    cloud.ready()
    names = {f"AWKWARD_{i}": value for i, value in enumerate(AWKWARD)}
    done = cloud.launch(
        "run", "--", "grok", "train", LAUNCH_ENV=" ".join(names), STAYS="here", **names
    )
    assert done.returncode == 0, done.stderr
    [home] = cloud.homes()
    cloud.wait_for(home / "grok-launch" / "run" / "exit")
    pairs = (cloud.stub / "environment-0").read_text().split("\0")
    arrived = dict(pair.split("=", 1) for pair in pairs if pair)
    assert {name: arrived[name] for name in names} == names
    assert "STAYS" not in arrived
    assert arrived["JAX_PLATFORMS"] == "tpu,cpu"


def test_a_listed_variable_that_is_not_set_is_refused(cloud: Cloud) -> None:
    done = cloud.launch("run", "--", "grok", LAUNCH_ENV="HF_TOKEN")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "LAUNCH_ENV names HF_TOKEN, which is not set here" in done.stderr


def test_a_folder_with_spaces_and_dollars(cloud: Cloud) -> None:
    cloud.ready()
    folder = cloud.folder / "a $HOME 'run'"
    cloud.launch("run", "--", "grok", "train", f"folder={folder}")
    [home] = cloud.homes()
    cloud.wait_for(home / "grok-launch" / "run" / "exit")
    assert (folder / "metrics.jsonl").exists()
    assert f"step 1, loss 0.1, in {folder}" in cloud.launch("status").stdout


def test_a_checkout_and_settings_in_a_path_with_spaces(cloud: Cloud) -> None:
    from tests.launch.cloud import make_checkout

    cloud.checkout = make_checkout(cloud.folder / "my $code isn't here")
    state = str(cloud.folder / "some state")
    settings = cloud.folder / "my settings.env"
    settings.write_text(cloud.settings_file.read_text())
    options = ("--settings", str(settings))
    for verb in ("up", "setup", "sync"):
        done = cloud.launch(verb, *options, LAUNCH_STATE=state)
        assert done.returncode == 0, done.stderr
    assert cloud.launch("run", *options, "--", "grok", LAUNCH_STATE=state).returncode == 0


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): path.read_bytes().decode(errors="replace") for path in files}


@pytest.mark.parametrize("babysat", [False, True])
def test_secrets_are_in_no_argument_and_no_log(cloud: Cloud, babysat: bool) -> None:
    secrets = {"WANDB_API_KEY": "s3cret-wandb", "HF_TOKEN": "s3cret $huggingface"}
    environment = {"LAUNCH_ENV": " ".join(secrets), **secrets}
    cloud.existing("ACTIVE")
    verbs = [["babysit", "--", "grok"], ["logs"]]
    if not babysat:
        verbs = [["setup"], ["sync"], ["run", "--", "grok"], ["status"], ["logs"], ["stop"]]
    for words in [*verbs, ["run", "--dry-run", "--", "grok"]]:
        done = cloud.launch(*words, **environment)
        assert done.returncode == 0, done.stderr
        assert "s3cret" not in done.stdout + done.stderr
    holders = {name for name, text in contents(cloud.folder).items() if "s3cret" in text}
    [home] = cloud.homes()
    sent = home / "grok-launch" / "run" / "env"
    assert holders == {str(sent), str(cloud.stub / "environment-0")}
    assert os.stat(sent).st_mode & 0o777 == 0o600
