"""`grok plan` as its user sees it, as far as nothing must be compiled; tests/prove compiles."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from grok.cli.main import main
from grok.plan.estimate import make_plan
from tests.plan.test_estimate import MEASURED, RATES


def run(*args):
    return CliRunner().invoke(main, ["plan", *args])


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["grok-10m"], "grok-10m names no slice in plan.topology; --topology v5p:4x4x8 would"),
        (["grok-10m", "--topology", "v9:4x4"], "topology v9:4x4 is of no generation known here"),
        (["grok-10m", "--topology", "v5p:4x4"], "topology v5p:4x4 should have 3 sides"),
        (["grok-10m", "plan.topology=v5p:4x4"], "topology v5p:4x4 should have 3 sides"),
        (["grok-10m", "plan.batch_size=4"], "data.batch_size=4 would work"),
        (["grok-10m", "plan.program=decode"], "model.context_length=1024; plan.tokens=1024 would"),
        (
            ["grok-10m", "--topology", "v5e:2x2", "--dump", "nowhere/program.txt"],
            "nowhere/program.txt cannot be written: there is no folder nowhere.",
        ),
        (
            ["grok-10m", "--topology", "v5e:2x2", "--prices", "nowhere.env"],
            "nowhere.env cannot be read as prices",
        ),
        (
            ["grok-10m", "--topology", "v5e:2x2", "--price", "1", "--prices", "prices.env"],
            "--price and --prices are given; leave out one of them.",
        ),
        (
            ["grok-10m", "--topology", "v5e:2x2", "--search", "3", "--json"],
            "--search prints a ranking of several programs; leave out --dump, --save, --json",
        ),
    ],
)
def test_refusals(args, problem):
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and problem in result.stderr
    assert result.stderr.count("\n") == 1


def test_libtpu_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("grok-10m", "--topology", "v5e:2x2")
    assert result.exit_code == 2
    assert "`pip install 'grok-jax[tpu]'` elsewhere, installs it" in result.stderr


@pytest.fixture
def compiled(monkeypatch):
    """Nothing is compiled: every config is found to do the same."""

    def compile_plan(config, slice_, price, on_phase, dump=None, save=None, calibration=None):
        on_phase("compiling")
        return make_plan(config, slice_, RATES, MEASURED, price)

    monkeypatch.setattr("grok.plan.compile.compile_plan", compile_plan)


def test_the_answer_is_text_or_json_and_progress_goes_elsewhere(compiled):
    text = run("grok-10m", "--topology", "v5p:4x4x4", "--price", "1.5")
    assert text.exit_code == 0
    assert text.stdout.startswith("program")
    assert "a chip-hour costs 1.5 USD (--price)" in text.stdout
    assert text.stderr == "train step for v5p:4x4x4  compiling\n"
    answer = json.loads(run("grok-10m", "--topology", "v5p:4x4x4", "--json").stdout)
    assert answer["fits"] is True


def test_a_plan_points_at_the_preset_for_its_slice(compiled):
    mine = ("grok-1b", "--topology", "v5e:2x4", "data.batch_size=8", "data.sequence_length=1024")
    text = run(*mine).stdout
    made = "train-1b-v5e-2x4 has a mesh and 32 x 4096 tokens for this slice"
    assert f"preset        {made}: grok plan train-1b-v5e-2x4" in text
    own = run("train-1b-v5e-2x4").stdout
    assert "\npreset" not in own
    named = run("grok-1b")
    assert named.exit_code == 2
    assert "v5p:4x4x8 would work, and so would train-1b-v5e-2x4 (v5e:2x4)." in named.stderr


def test_slices_are_counted_by_the_option_or_the_config(compiled):
    option = run("grok-10m", "--topology", "v5p:4x4x4", "--slices", "2")
    config = run("grok-10m", "--topology", "v5p:4x4x4", "mesh.slice=2")
    assert "2 slices of v5p:4x4x4, 128 chips" in option.stdout
    assert option.stdout == config.stdout


def test_a_search_compiles_so_many_and_prints_overrides_of_the_best(compiled):
    result = run("grok-10m", "--topology", "v5e:2x2", "--search", "2")
    assert result.exit_code == 0
    assert result.stderr.count("compiling") == 2
    assert "the best, as overrides:\nmesh.slice=1\nmesh.data=" in result.stdout


needs_libtpu = pytest.mark.skipif(
    sys.platform != "linux", reason="libtpu is there for Linux on x86-64 alone"
)


@needs_libtpu
def test_a_slice_too_small_is_told_from_the_state_alone():
    command = [sys.executable, "-m", "grok", "plan", "grok-1", "--topology", "v5p:2x2x2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert answer["fits"] is False
    # 12 bytes a parameter, over eight chips.
    assert answer["hbm_gib_per_chip"]["state"] == pytest.approx(315.7e9 * 12 / 8 / 2**30, rel=1e-3)
    assert answer["seconds"] is None


@needs_libtpu
def test_a_mesh_that_cannot_be_is_refused_before_anything_compiles():
    result = run("grok-10m", "--topology", "v5e:2x2", "mesh.expert=3")
    assert result.exit_code == 2
    assert "mesh.expert=3" in result.stderr or "expert=3" in result.stderr
    assert "would work." in result.stderr
