"""The scripts themselves: their form, and their settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.cloud import LAUNCH, ROOT, Cloud, git, make_checkout
from tests.launch.test_real_training import GROK

SCRIPTS = sorted(str(path) for path in [*LAUNCH.glob("*.sh"), *LAUNCH.glob("runs/*.sh")])
SETTINGS = [str(LAUNCH / name) for name in ("settings.env.example", "prices.env")]


def program(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{name} is not installed; make env installs it")
    return found


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        [program("shellcheck"), *SCRIPTS, *SETTINGS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_shfmt_changes_nothing() -> None:
    done = subprocess.run(
        [program("shfmt"), "--diff", "--indent", "2", "--case-indent", *SCRIPTS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [Path(path).name for path in SCRIPTS])
def test_scripts_that_are_run_stop_at_the_first_error(script: str) -> None:
    [path] = LAUNCH.rglob(script)
    text = path.read_text()
    if os.access(path, os.X_OK) or script == "worker.sh":
        assert text.startswith("#!/usr/bin/env bash\n# ")
        assert "\nset -euo pipefail\n" in text
    else:
        assert text.startswith("# shellcheck shell=bash\n")


def test_only_the_provider_calls_gcloud() -> None:
    for path in SCRIPTS:
        lines = [line.split("#")[0].strip() for line in Path(path).read_text().splitlines()]
        calls = [
            line for line in lines if line.startswith(("gcloud ", "limited gcloud", "ask gcloud"))
        ]
        assert not calls or path.endswith("provider.sh")


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("LAUNCH_PROJECT", "", "LAUNCH_PROJECT is not set"),
        ("LAUNCH_NAME", "My Run", "lower-case letters, digits and inner hyphens"),
        ("LAUNCH_ZONE", "us-east5", "write a zone as us-east5-a"),
        ("LAUNCH_ACCELERATOR", "a100", "set it to v4-N, v5litepod-N (v5e), v5p-N or v6e-N"),
        ("LAUNCH_ACCELERATOR", "v5p-4", "N of v5p counts cores: 8, 16, 32"),
        ("LAUNCH_ACCELERATOR", "v6e-12", "N of v6e counts chips: 1, 4, 8, 16, 32"),
        ("LAUNCH_PROVISIONING", "cheap", "set it to spot, reserved or on-demand"),
        ("LAUNCH_NODE_COUNT", "0", "set it to the number of slices, 1 or more"),
        ("LAUNCH_BUCKET", "bucket", "write a bucket as gs://my-bucket"),
        ("LAUNCH_BUCKET", "gs://b/", "gs://my-bucket, without a slash or a folder after it"),
        ("LAUNCH_MOUNT", "yes", "LAUNCH_MOUNT=yes needs a bucket in LAUNCH_BUCKET"),
        ("LAUNCH_IAP", "true", "set it to yes or no"),
        ("LAUNCH_ENV", "KEY=secret", "list names of variables without values"),
        ("LAUNCH_WAIT_SECONDS", "6h", "LAUNCH_WAIT_SECONDS is '6h'; set it to an integer"),
        ("LAUNCH_POLL_SECONDS", "soon", "set it to a number of seconds"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_called(
    cloud: Cloud, setting: str, value: str, said: str
) -> None:
    done = cloud.launch("up", **{setting: value})
    assert (done.returncode, cloud.calls()) == (2, [])
    assert said in done.stderr


def test_without_settings_the_way_to_get_them_is_said(cloud: Cloud) -> None:
    done = cloud.launch("up", LAUNCH_SETTINGS="/no where/settings.env")
    assert done.returncode == 2
    assert "settings.env.example '/no where/settings.env', then edit the copy" in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("LAUNCH_PROVISION=reserved", "sets LAUNCH_PROVISION, which is not a setting; see "),
        ("LAUNCH_LABELS = team=x", "write each line as NAME=value, without spaces around ="),
        ('LAUNCH_LABELS="team=x', "write each line as NAME=value, without spaces around ="),
    ],
)
def test_a_line_that_sets_nothing_is_refused(cloud: Cloud, line: str, said: str) -> None:
    with cloud.settings_file.open("a") as settings:
        settings.write(line + "\n")
    done = cloud.launch("up")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert said in done.stderr


def test_settings_in_the_folder_of_the_call(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cloud.folder)
    assert cloud.launch("up", "--settings", cloud.settings_file.name).returncode == 0


@pytest.mark.parametrize(
    "verb", ["up", "setup", "status", "logs", "stop", "down", "cost", "doctor"]
)
def test_an_unknown_word_is_refused(cloud: Cloud, verb: str) -> None:
    done = cloud.launch(verb, "--nonsense")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "unknown argument '--nonsense'" in done.stderr


@pytest.mark.parametrize(
    ("accelerator", "hosts", "chips"),
    [
        ("v4-8", "1 worker", "4 chips"), ("v5p-256", "32 workers", "128 chips"),
        ("v5litepod-1", "1 worker", "1 chip"), ("v5litepod-8", "1 worker", "8 chips"),
        ("v5litepod-16", "4 workers", "16 chips"), ("v6e-8", "1 worker", "8 chips"),
        ("v6e-16", "4 workers", "16 chips"), ("v6e-256", "64 workers", "256 chips"),
    ],
)  # fmt: skip
def test_hosts_and_chips_of_an_accelerator(
    cloud: Cloud, accelerator: str, hosts: str, chips: str
) -> None:
    cloud.settings(LAUNCH_ACCELERATOR=accelerator)
    cloud.existing("ACTIVE")
    assert f"{hosts}, {chips}" in cloud.launch("up").stderr


def test_cost_adds_up_the_lives_of_slices(cloud: Cloud) -> None:
    state = cloud.folder / "state" / "t"
    state.mkdir(parents=True)
    (state / "history").write_text(
        "begin 1000 v5litepod-8 1 spot us-east5-a\nbegin 1000 v5litepod-8 1 spot us-east5-a\n"
        "end 4600 v5litepod-8 1 spot us-east5-a\nbegin 10000 v5p-8 2 on-demand us-east5-a\n"
        "end 17200 v5p-8 2 on-demand us-east5-a\n"
    )
    said = cloud.launch("cost").stdout
    # 1 h of 8 chips at 0.25 to 0.60 a chip-hour, and 2 h of twice 4 chips at 4.20.
    assert "so far   24.0 chip-hours, USD 69.20 to 72.00" in said
    assert "a day    USD 48.00 to 115.20" in said
    assert "8 chips, down now" in said
    assert "2026-11-22" in said


def test_cost_takes_prices_of_the_user(cloud: Cloud) -> None:
    prices = cloud.folder / "prices"
    prices.write_text("PRICES_DATE=today\nPRICE_v5e_on_demand_LOW=2 PRICE_v5e_on_demand_HIGH=2\n")
    environment = {"LAUNCH_PRICES": str(prices), "LAUNCH_PROVISIONING": "on-demand"}
    said = cloud.launch("cost", **environment).stdout
    assert "prices   USD 2.00 a chip-hour, today" in said
    missing = cloud.launch("cost", LAUNCH_PRICES=str(prices))
    assert (missing.returncode, "PRICE_v5e_spot_LOW" in missing.stderr) == (2, True)


ANSWERS = {
    "help compute tpus queued-resources ssh": "NAME",
    "auth list": "me@example.com",
    "projects describe p": "ACTIVE",
    "services list": "tpu.googleapis.com",
    "storage buckets describe gs://b": "US-EAST5",
}


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (None, ""),
        ("auth list", "no account is logged in\n       gcloud auth login, then run doctor again"),
        ("projects describe p", "project p is not visible\n       correct LAUNCH_PROJECT"),
        ("services list", "gcloud services enable tpu.googleapis.com --project=p"),
        (
            "storage buckets describe gs://b",
            "gcloud storage buckets create gs://b --location=us-east5",
        ),
        ("help compute tpus queued-resources ssh", "gcloud components update"),
    ],
)
def test_doctor_has_a_remedy_for_each_finding(cloud: Cloud, missing: str | None, said: str) -> None:
    for question, answer in ANSWERS.items():
        if question != missing:
            cloud.answer(question, answer)
    key = cloud.folder / ".ssh" / "google_compute_engine"
    key.parent.mkdir()
    key.touch()
    done = cloud.launch("doctor", LAUNCH_BUCKET="gs://b")
    assert done.returncode == (1 if missing else 0), done.stdout
    assert said in done.stdout
    assert done.stdout.count("FIX") == (1 if missing else 0)
    assert ("1 to fix" if missing else "nothing to fix") in done.stderr
    assert "preemptible v5e chips" in done.stdout


def test_doctor_of_a_worked_run_names_inputs_that_are_not_there_yet(cloud: Cloud) -> None:
    for question, answer in ANSWERS.items():
        cloud.answer(question, answer)
    (cloud.stub / "bucket" / "b" / "data" / "train").mkdir(parents=True)
    done = cloud.launch("runs/pretrain-v5e", "doctor", LAUNCH_BUCKET="gs://b")
    named = [line[5:] for line in done.stdout.splitlines() if line.endswith("not there yet")]
    assert named == [
        f"gs://b/data/{name} is not there yet" for name in ("held-out", "tokenizer.model")
    ]
    assert "not there yet\n       launch/README.md, 3 and 4: data and weights" in done.stdout


@pytest.mark.parametrize("verb", ["setup", "sync", "logs", "run"])
def test_without_a_slice_the_way_to_get_one_is_said(cloud: Cloud, verb: str) -> None:
    command = {"run": ["--", "grok"], "logs": ["--follow"]}.get(verb, [])
    done = cloud.launch(verb, *command)
    assert done.returncode == 1
    assert "NOT_FOUND" not in done.stderr
    assert "there is no slice t in us-east5-a: launch/up.sh creates it" in done.stderr
    assert "retry" not in done.stderr


@pytest.mark.parametrize("verb", ["setup", "sync", "run"])
def test_a_slice_that_is_not_ready_yet_is_named(cloud: Cloud, verb: str) -> None:
    cloud.ready("WAITING_FOR_RESOURCES")
    cloud.script(ssh={"t1v-t-w-0": ["fail"]})
    command = ["--", "grok"] if verb == "run" else []
    done = cloud.launch(verb, *command)
    assert done.returncode == 1
    waits = (
        "t is WAITING_FOR_RESOURCES: launch/up.sh waits until it is ready, launch/down.sh deletes"
    )
    assert waits in done.stderr
    assert "retry" not in done.stderr


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("", "run launch/setup.sh"),
        ("runs/batch-v6e", "run launch/runs/batch-v6e.sh setup"),
    ],
)
def test_without_setup_the_need_of_it_is_said(cloud: Cloud, script: str, said: str) -> None:
    cloud.existing("ACTIVE", name="grok-batch" if script else "t")
    words = [script, "status"] if script else ["status"]
    assert said in cloud.launch(*words, LAUNCH_BUCKET="gs://b").stderr


@pytest.mark.parametrize("words", [["grok", "train"], []])
def test_a_command_without_dashes_is_pointed_to_them(cloud: Cloud, words: list[str]) -> None:
    done = cloud.launch("run", *words)
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "put the command after --, for example: launch/run.sh -- grok train" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "grok", "train"], "'grok' is not KEY=VALUE: this run has its own command"),
        (["train.steps=9"], "keys go after --: launch/runs/pretrain-v5e.sh -- train.steps=9"),
        (["run", "train.steps=9"], "unknown argument 'train.steps=9'; see pretrain-v5e.sh --help"),
        (["status", "--", "train.steps=9"], "only babysit and run take arguments after --"),
    ],
)
def test_a_worked_run_refuses_what_it_would_not_heed(
    cloud: Cloud, words: list[str], said: str
) -> None:
    done = cloud.launch("runs/pretrain-v5e", *words, LAUNCH_BUCKET="gs://b")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert said in done.stderr


def test_a_worked_run_needs_a_bucket(cloud: Cloud) -> None:
    done = cloud.launch("runs/batch-v6e")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "LAUNCH_BUCKET is not set; this run reads from a bucket and writes to it" in done.stderr


def test_a_worked_run_knows_its_verbs(cloud: Cloud) -> None:
    done = cloud.launch("runs/batch-v6e", "fly", LAUNCH_BUCKET="gs://b")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "unknown verb 'fly'" in done.stderr


@pytest.mark.parametrize("verb", ["run", "babysit"])
def test_a_config_that_does_not_hold_is_refused_before_anything_is_called(
    cloud: Cloud, verb: str
) -> None:
    cloud.program(
        "bin/grok", 'echo "$*" >"$STUB/checked"; echo "error: mesh.data=3 is" >&2; exit 2'
    )
    done = cloud.launch(verb, "--", "grok", "train", "grok-1b", "mesh.data=3", "folder=a b")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "nothing was started: grok train grok-1b: mesh.data=3 is" in done.stderr
    words = (cloud.stub / "checked").read_text()
    assert words == "config --of train --devices 8 grok-1b mesh.data=3 folder=a b\n"


@pytest.mark.parametrize(
    ("command", "options"), [("serve", "--devices 8"), ("batch", "--devices 8 --hosts 1")]
)
def test_so_is_one_that_answers(cloud: Cloud, command: str, options: str) -> None:
    cloud.program("bin/grok", 'echo "$*" >"$STUB/checked"; echo "error: mesh 3 needs" >&2; exit 2')
    done = cloud.launch("run", "--", "grok", command, "job.yaml")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert (cloud.stub / "checked").read_text() == f"config --of {command} {options} job.yaml\n"


@pytest.mark.parametrize(
    ("words", "checked"),
    [
        (["lr=1"], "grok-10m lr=1"),
        (["--out", "a=b", "--only=rates", "--cpu-time", "grok-1b", "lr=1"], "grok-1b lr=1"),
    ],
)
def test_so_is_one_that_measures(cloud: Cloud, words: list[str], checked: str) -> None:
    cloud.program("bin/grok", 'echo "$*" >"$STUB/checked"; echo "error: no key lr" >&2; exit 2')
    done = cloud.launch("run", "--", "timeout", "-k", "9", "20m", "grok", "calibrate", *words)
    assert (done.returncode, cloud.calls()) == (2, [])
    assert (cloud.stub / "checked").read_text() == f"config --of train {checked}\n"
    named = " grok-1b" if "grok-1b" in words else ""
    assert f"nothing was started: grok calibrate{named}: no key lr" in done.stderr


def test_so_is_an_unknown_subcommand(cloud: Cloud) -> None:
    cloud.program("bin/grok", """echo "Error: No such command '$1'." >&2; exit 2""")
    done = cloud.launch("babysit", "--", "grok", "trian", "grok-1b")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "grok has no command 'trian'; train, batch, serve, eval and calibrate run" in done.stderr


DATA = ("data.datasets=[{path: gs://b/data, weight: 1}]", "data.tokenizer=gs://b/tokenizer.model")


@pytest.mark.parametrize(
    ("slices", "words", "said"),
    [
        ("1", [DATA[1]], "the command names no data: 'data.datasets=[{path: gs://b/data/train, "),
        ("1", [DATA[0]], "the command names no tokenizer: data.tokenizer=gs://b/data/tokenizer"),
        ("2", [*DATA, "mesh.data=8"], "there are 16; mesh.slice=2, for LAUNCH_NODE_COUNT=2, would"),
        ("2", [*DATA, "mesh.data=3"], "there are 16; mesh slice=2 x data=8 x expert=1 x tensor=1"),
        ("2", DATA, "mesh.slice=1, and the settings request 2 slices; mesh.slice=2, for LAUNCH"),
        ("2", [*DATA, "mesh.data=16"], "2 slices; mesh slice=2 x data=8 x expert=1 x tensor=1 w"),
        ("2", [*DATA, "mesh.slice=4"], "mesh.slice=4, and the settings request 2 slices; mesh.sl"),
        ("2", [*DATA, "mesh.slice=-1", "mesh.data=4"], "mesh.slice=4, and the settings request 2"),
        (
            "2",
            [*DATA, "mesh.data=8", "data.batch_size=20"],
            "there are 16; with mesh.slice=2, for LAUNCH_NODE_COUNT=2: data.batch_size=20 cannot",
        ),
        ("2", ["mesh.slicee=2"], "there is no key mesh.slicee; did you mean mesh.slice?\n"),
    ],
)
def test_what_is_missing_is_named_with_a_value_that_works(
    cloud: Cloud, slices: str, words: list[str], said: str
) -> None:
    cloud.program("bin/grok", GROK)
    settings = {"LAUNCH_NODE_COUNT": slices, "LAUNCH_BUCKET": "gs://b", "PYTHONPATH": str(ROOT)}
    done = cloud.launch("run", "--", "grok", "train", "grok-1b", *words, **settings)
    assert (done.returncode, cloud.calls()) == (2, []), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            "mine.yaml",
            "mine.yaml is not in git, and `sync` sends what git tracks: git add mine.yaml",
        ),
        ("runs/x", "runs/x/config.yaml is not in git"),
        ("sent.yaml", "configs/base.yaml is not in git"),
        ("{root}/mine.yaml", "name it by its path in the repository, mine.yaml"),
        (
            "../mine.yaml",
            "../mine.yaml is not in the repository, and `sync` sends nothing else: copy",
        ),
        ("{root}/../mine.yaml", "mine.yaml is not in the repository"),
        ("configs/loop.yaml", ""),
        ("preset", ""),
        ("gs://b/runs/x", ""),
    ],
)
def test_a_config_that_sync_does_not_send_is_refused_before_anything_is_called(
    cloud: Cloud, config: str, said: str
) -> None:
    cloud.checkout = make_checkout(cloud.folder / "checkout")
    (cloud.checkout / "configs").mkdir()
    (cloud.checkout / "sent.yaml").write_text("extends: 'configs/sent.yaml'  # with the model\n")
    (cloud.checkout / "configs" / "sent.yaml").write_text("extends: base.yaml\n")
    (cloud.checkout / "configs" / "loop.yaml").write_text("extends: ../configs/loop.yaml\n")
    git(cloud.checkout, "add", ".")
    (cloud.checkout / "runs" / "x").mkdir(parents=True)
    for name in ("mine.yaml", "../mine.yaml", "configs/base.yaml", "runs/x/config.yaml"):
        (cloud.checkout / name).write_text("train: {steps: 1}\n")
    command = ["--", "grok", "train", config.format(root=cloud.checkout), "folder=gs://b/x"]
    for verb in (["run"], ["babysit"], ["babysit", "--dry-run"]):
        if said or "--dry-run" in verb:
            done = cloud.launch(*verb, *command)
            assert (done.returncode, cloud.calls()) == (2 if said else 0, []), done.stderr
            assert said in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["calibrate"], "grok calibrate: mesh.slice=1, and the settings request 2 slices; mesh.sl"),
        (["serve", "decode-v6e-4x4", "weights=x"], "2 slices; mesh slice=2 x data=1 x expert=1 x"),
        (["batch", "grok-1-v6e", "weights=x"], "2 slices; mesh slice=2 x data=1 x expert=1 x"),
        # Each host has a mesh of its own, of one slice.
        (["batch", "grok-1-v6e", "weights=x", "replica=host"], "; mesh slice=1 x data=1 x expert"),
    ],
)
def test_so_is_a_mesh_without_the_slices_of_the_settings(
    cloud: Cloud, words: list[str], said: str
) -> None:
    cloud.program("bin/grok", GROK)
    settings = {"LAUNCH_NODE_COUNT": "2", "PYTHONPATH": str(ROOT)}
    done = cloud.launch("run", "--", "grok", *words, **settings)
    assert (done.returncode, cloud.calls()) == (2, []), done.stderr
    assert said in done.stderr


def test_a_mesh_that_suits_no_slices_is_not_advised(cloud: Cloud) -> None:
    program = 'echo "error: $# words; mesh slice=16 x data=1 x expert=1 would work." >&2; exit 2'
    cloud.program("bin/grok", program)
    done = cloud.launch("run", "--", "grok", "train", "x", LAUNCH_NODE_COUNT="2")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert done.stderr.endswith("no mesh of 2 slices (LAUNCH_NODE_COUNT) fits.\n")


MISSING_BUCKET = "ERROR: (gcloud.storage.buckets.describe) gs://nowhere not found: 404."
MY_COMMAND = ["--", "grok", "train", "x", "data.train=[gs://nowhere/text]"]


@pytest.mark.parametrize(
    ("verb", "words", "bucket"),
    [
        ("run", MY_COMMAND, ""),
        ("babysit", [*MY_COMMAND, "folder=gs://b/runs/x"], ""),
        ("babysit", ["--", "grok", "train", "of-a-file"], ""),
        ("run", ["--", "grok", "train", "x"], "gs://nowhere"),
        ("runs/pretrain-v5e", [], "gs://nowhere"),
        ("runs/calibrate", ["run"], "gs://nowhere"),
    ],
)
def test_a_bucket_that_does_not_exist_is_refused_before_anything_is_created(
    cloud: Cloud, verb: str, words: list[str], bucket: str
) -> None:
    config = "case $* in *of-a-file) echo 'folder: gs://nowhere/runs  # of checkpoints' ;; esac"
    cloud.program("bin/grok", config)
    cloud.answer("storage buckets describe gs://nowhere", MISSING_BUCKET, code=1)
    settings = {"LAUNCH_BUCKET": bucket, "LAUNCH_MOUNT": "yes" if bucket else "no"}
    done = cloud.launch(verb, *words, **settings)
    assert done.returncode == 2, done.stderr
    assert all(call[:3] == ["storage", "buckets", "describe"] for call in cloud.calls())
    creation = "gcloud storage buckets create gs://nowhere --location=us-east5 --project=p creates"
    assert f"nothing was started: bucket gs://nowhere does not exist: {creation}" in done.stderr


@pytest.mark.parametrize("error", ["HTTPError 403: no storage.buckets.get access", "no network"])
def test_a_bucket_that_cannot_be_described_is_not_refused(cloud: Cloud, error: str) -> None:
    cloud.ready()
    cloud.answer("storage buckets describe gs://404", f"ERROR: {error}", code=1)
    assert cloud.launch("run", "--", "grok", "train", "gs://404/run").returncode == 0


def test_a_run_that_could_not_resume_is_refused(cloud: Cloud) -> None:
    cloud.program("bin/grok", 'echo "$*" >"$STUB/checked"; echo \'folder: ""  # of checkpoints\'')
    done = cloud.launch("babysit", "--", "grok", "train", "grok-1b", "--resume")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "the command names no folder, where a restart resumes: folder=" in done.stderr
    # An option of `grok train` that `grok config` does not have.
    assert (cloud.stub / "checked").read_text() == "config --of train --devices 8 grok-1b\n"


@pytest.mark.parametrize(
    ("command", "key", "value", "right"),
    [
        ("train", "folder", "runs/x", "gs://b/runs/x"),
        ("batch", "output", "answers", "gs://b/answers"),
        ("train", "folder", "bucket/runs/x", "gs://b/runs/x"),
    ],
)
def test_a_folder_that_goes_with_the_slice_is_refused(
    cloud: Cloud, command: str, key: str, value: str, right: str
) -> None:
    words = ["--", "grok", command, "x", f"{key}={value}"]
    done = cloud.launch("babysit", *words, LAUNCH_BUCKET="gs://b")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert f"{key}={value} is on the worker's disk, which is deleted with a slice" in done.stderr
    assert f"{key}={right} would work" in done.stderr


@pytest.mark.parametrize("folder", ["gs://b/x", "/mnt/disk/x", "bucket/x"])
def test_a_folder_that_outlives_the_slice_is_not(cloud: Cloud, folder: str) -> None:
    words = ["--dry-run", "--", "grok", "train", "x", f"folder={folder}"]
    done = cloud.launch("babysit", *words, LAUNCH_BUCKET="gs://b", LAUNCH_MOUNT="yes")
    assert done.returncode == 0, done.stderr


def test_the_settings_of_the_example_are_refused(cloud: Cloud) -> None:
    example = str(LAUNCH / "settings.env.example")
    for verb, words in (("up", []), ("babysit", ["--", "grok", "train", "grok-1b"])):
        done = cloud.launch(verb, "--settings", example, *words)
        assert (done.returncode, cloud.calls()) == (2, [])
        assert "LAUNCH_PROJECT is my-project, as in the example: edit" in done.stderr
    done = cloud.launch("doctor", "--settings", example)
    assert done.returncode == 1
    for name in ("LAUNCH_PROJECT is my-project", "LAUNCH_BUCKET is gs://my-bucket"):
        assert f"FIX  {name}, as in the example" in done.stdout


def test_a_worked_run_names_its_own_doctor(cloud: Cloud) -> None:
    done = cloud.launch("runs/pretrain-v5e", LAUNCH_BUCKET="gs://my-bucket")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "then run launch/runs/pretrain-v5e.sh doctor" in done.stderr


def test_what_a_slice_costs_is_said_before_it_is_requested(cloud: Cloud) -> None:
    done = cloud.launch("up")
    price = "1 x v5litepod-8 spot costs USD 2.00 to 4.80 an hour, 48.00 to 115.20 a day, until down"
    assert price in done.stderr
