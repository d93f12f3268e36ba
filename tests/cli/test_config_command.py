"""`grok config`: what it prints is the whole config, and a config file itself."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from grok.cli.main import main
from grok.config import RunConfig
from grok.config.infer import BatchConfig, ServeConfig
from grok.config.load import load_config, presets
from grok.config.schema import describe, schema
from grok.config.serve import load_serve_config


def grok_config(*args, **kwargs):
    return CliRunner().invoke(main, ["config", *args], **kwargs)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.steps=500", "optimizer.peak_lr=1e-4"],
        ["folder=runs/é # x", 'data.train=["a b.txt", "c: d", "#e"]', "data.tokenizer=''"],
        ["folder='no'", "data.train=['true', 'null', '1e5', '~', '-', \"tab\\t\"]"],
        ["folder='null'", "data.tokenizer='1.5'"],
        ["folder='True'", f"data.tokenizer={'x' * 100}"],
    ],
)
def test_the_output_is_a_config_that_says_the_same(overrides, tmp_path):
    result = grok_config("grok-10m", *overrides)
    assert result.exit_code == 0
    saved = tmp_path / "saved.yaml"
    saved.write_text(result.stdout, encoding="utf-8")
    assert load_config(saved) == load_config("grok-10m", overrides)


@pytest.mark.parametrize(
    ("command", "kind"), [("batch", BatchConfig), ("serve", ServeConfig)], ids=["batch", "serve"]
)
def test_configs_of_other_commands(command, kind, tmp_path):
    file, saved = tmp_path / "job.yaml", tmp_path / "saved.yaml"
    file.write_text("weights: w\n" + ("input: [a]\noutput: b\n" if command == "batch" else ""))
    overrides = ["sampling.temperature=0", "chat_template='{{ a }}\n'"]
    result = grok_config("--of", command, str(file), *overrides)
    assert result.exit_code == 0, result.output
    saved.write_text(result.stdout, encoding="utf-8")
    assert load_config(saved, (), kind) == load_config(file, overrides, kind)


SERVED = [name for name, file in presets().items() if file.parent.name == "serve"]


@pytest.mark.parametrize("name", SERVED)
def test_what_is_planned_for_decoding_can_be_served(name):
    served, planned = load_serve_config(name, ["weights=w", "port=9000"]), load_config(name)
    assert (served.model, served.mesh, served.engine) == (name, planned.mesh, planned.engine)
    assert (served.weights, served.port) == ("w", 9000)
    result = grok_config("--of", "serve", name)
    assert result.exit_code == 2
    assert "weights must be set" in result.output


def test_every_setting_is_printed_with_its_meaning():
    lines = grok_config("grok-10m").stdout.splitlines()
    for key, _, meaning in describe(load_config("grok-10m")):
        name = key.rpartition(".")[2]
        assert any(line.lstrip().startswith(f"{name}: ") and meaning in line for line in lines)


def test_comments_are_aligned():
    lines = grok_config("grok-10m").stdout.splitlines()[:-1]
    assert len({line.index("#") for line in lines}) == 1


def test_the_last_line_counts_parameters():
    last = grok_config("grok-1").stdout.splitlines()[-1]
    assert last == "# 315,684,820,992 parameters, 83,756,587,008 active per token"


def test_colour_on_a_terminal_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in grok_config("grok-10m").stdout
    assert "\x1b[" in grok_config("grok-10m", color=True).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in grok_config("grok-10m", color=True).stdout


def test_a_wrong_config_exits_with_2_and_one_sentence():
    result = grok_config("grok-10m", "train.stpes=50")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: override `train.stpes=50`: there is no key train.stpes; did you mean train.steps?\n"
    )


def test_the_reference_page_is_what_the_command_prints():
    result = grok_config("--reference")
    assert result.exit_code == 0
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == result.stdout, (
        "run `grok config --reference > docs/configuration.md`"
    )
    for config_type in (RunConfig, BatchConfig, ServeConfig):
        for key, setting in schema(config_type).items():
            assert setting.section or f"| `{key}` | " in result.stdout, key


def test_a_mesh_that_does_not_fit_the_devices_of_a_slice_is_refused():
    fits = grok_config("grok-1b", "mesh.data=8", "--devices", "8")
    assert fits.exit_code == 0
    result = grok_config("grok-1b", "model.param_dtype=int8", "--devices", "8")
    assert "model.param_dtype=float32 would work" in result.output
    result = grok_config("grok-1b", "mesh.data=3", "--devices", "8")
    assert result.exit_code == 2
    assert "would work" in result.stderr


@pytest.mark.parametrize(
    ("command", "mesh", "options", "problem"),
    [
        ("serve", "mesh.tensor=8", "--devices 16", ""),
        ("serve", "mesh.tensor=3", "--devices 16", "needs a multiple of 3 devices, and there are"),
        ("batch", "mesh={data: 1, expert: 2, tensor: 2}", "--devices 16 --hosts 4", ""),
        ("batch", "mesh={data: 1, tensor: 2}", "--devices 16 --hosts 4", ""),
        (
            "batch",
            "mesh={data: 1, tensor: 8}",
            "--devices 16 --hosts 4",
            "needs 8 devices, and the",
        ),
        ("batch", "mesh={data: 1, tensor: 5}", "--devices 16 --hosts 2 replica=all", "needs 5 dev"),
    ],
)
def test_so_are_those_of_jobs_that_answer(command, mesh, options, problem, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("weights: w\n" + ("input: [a]\noutput: b\n" if command == "batch" else ""))
    result = grok_config("--of", command, str(file), mesh, *options.split())
    assert (result.exit_code, problem in result.stderr) == (2 if problem else 0, True)
    modelled = grok_config(
        "--of", command, str(file), "mesh.tensor=16", "model=grok-10m", "--devices", "16"
    )
    assert "model.attention.num_heads=8 cannot be split over mesh.tensor=16" in modelled.stderr
