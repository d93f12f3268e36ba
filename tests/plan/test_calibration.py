"""A file of `grok calibrate` as a plan uses it."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

import grok.plan.local
from grok.calibrate.verdict import describe_rates
from grok.cli.main import main
from grok.config.load import load_config
from grok.errors import ConfigError
from grok.plan.calibration import Calibration, read_calibration, with_ratio, write_calibration
from grok.plan.estimate import make_plan
from grok.plan.format import format_plan
from grok.plan.rates import transfer_seconds
from tests.emulator import bucket
from tests.plan.test_estimate import CONFIG, MEASURED, SLICE

WIRES = {"links": 2.0, "hops": 1.0, "slices": False, "shared": 1}


def once(value: float) -> dict[str, float]:
    return {"median": value, "best": value}


CALIBRATION = Calibration(
    version=1,
    date="2027-01-02 03:04 UTC",
    code={"grok": "1", "jax": "1", "jaxlib": "1"},
    device={"platform": "tpu", "kind": "TPU v5", "count": 64, "processes": 16, "cores": 208},
    clock="wall",
    mesh=MEASURED["mesh_sizes"],
    kernels=[],
    matmul_flops_per_second={"bfloat16": once(400e12), "float32": once(100e12)},
    memory_bytes_per_second={"read": once(2500e9), "copy": once(2000e9)},
    collectives={
        "data": {
            "wiring": WIRES,
            "bytes_per_second": {"all-gather": once(150e9), "reduce-scatter": once(100e9)},
            "planned_bytes_per_second": {"all-gather": 171e9, "reduce-scatter": 171e9},
        }
    },
    host_link_bytes_per_second={"to_device": once(14e9), "to_host": once(12e9)},
    dispatch_seconds=once(1e-4),
    steps={
        "train": {
            "config": "grok-1b, 64 x 2048 tokens",
            "seconds": once(1.5),
            "planned_seconds": {"scheduled": 1.25},
            "counted": "of the compiled program",
            "ratio": 1.2,
        }
    },
    verdict=[],
)


@pytest.fixture
def written(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "measured.json"
        write_calibration(dataclasses.replace(CALIBRATION, **changes), path)
        return str(path)

    return write


def test_a_plan_takes_the_rates_of_the_file_and_names_it(written):
    calibration = read_calibration(written())
    calibration.check_slice(SLICE)
    rates = calibration.rates(CONFIG)
    assert (rates.flops, rates.hbm, rates.host) == (400e12, 2000e9, 12e9)
    # As many bytes as a device sent in a second take a second.
    assert transfer_seconds(rates, WIRES, "all-gather", 150e9) == pytest.approx(1)
    assert transfer_seconds(rates, WIRES, "reduce-scatter", 100e9) == pytest.approx(1)
    plan = with_ratio(make_plan(CONFIG, SLICE, rates, MEASURED, None), calibration)
    assert plan.step_seconds()["calibrated"] == pytest.approx(1.2 * 12.5)
    # Of the peak, not of the 400 TFLOP/s that were measured.
    assert plan.mfu()["scheduled"] == pytest.approx(plan.model_flops / 12.5 / 459e12)
    text = format_plan(plan)
    assert "the calibration's own step took x 1.2 its schedule, of grok-1b, 64 x 2048" in text
    assert "measured.json of 2027-01-02 03:04 UTC, measured on 64 x TPU v5" in text
    assert "network were not, and are as published" in text


def test_a_plan_takes_a_file_of_a_bucket():
    with bucket():
        file = "gs://bucket/measured.json"
        write_calibration(CALIBRATION, file)
        result = CliRunner().invoke(
            main, ["plan", "grok-10m", "--topology", "v6e:2x2", "--calibration", file]
        )
    assert f"{file} was measured on TPU v5, and v6e:2x2 has TPU v6 lite" in result.output


def test_a_decode_step_reads_and_has_no_ratio_of_training(written):
    calibration = read_calibration(written())
    config = load_config("grok-1", ["plan.program=decode"])
    assert calibration.rates(config).hbm == 2500e9
    plan = make_plan(config, SLICE, calibration.rates(config), MEASURED, None)
    assert "calibrated" not in with_ratio(plan, calibration).step_seconds()


def test_the_verdict_says_what_is_slower_than_planned():
    lines = describe_rates(CALIBRATION)
    assert "products in bfloat16: 400 TFLOP/s, planned 459 TFLOP/s" in lines
    slower = next(line for line in lines if line.startswith("slower than planned: "))
    assert slower.startswith("slower than planned: reduce-scatter over data 1.71 x, memory, copy ")
    assert "train step 1.20 x" in slower and "dispatch" not in slower


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("no JSON", "is not JSON, and so no file of `grok calibrate`"),
        ("{}", "is no file that this version of `grok calibrate` wrote"),
        (None, "measured.json"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path, content, problem):
    path = tmp_path / "measured.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        read_calibration(path)


def plan(*arguments: str):
    return CliRunner().invoke(main, ["plan", "grok-10m", *arguments])


def test_a_file_of_another_kind_of_chip_is_refused(written):
    file = written()
    result = plan("--topology", "v6e:2x2", "--calibration", file)
    assert result.exit_code == 2
    problem = f"error: {file} was measured on TPU v5, and v6e:2x2 has TPU v6 lite; a file measured "
    assert result.stderr.startswith(problem) and result.stderr.count("\n") == 1


def test_a_file_without_rates_is_refused(written):
    result = plan("--topology", "v5p:2x2x1", "--calibration", written(matmul_flops_per_second={}))
    assert result.exit_code == 2
    assert "`grok calibrate` without --only writes all rates" in result.stderr


CPU = {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1, "cores": 2}
TINY = (
    "model.num_layers=1 model.embed_dim=32 model.vocab_size=64 model.moe.dim=32 model.remat=none "
    "model.attention.num_heads=2 model.attention.num_kv_heads=2 model.compute_dtype=float32 "
    "data.sequence_length=16 data.batch_size=8 mesh.data=8"
).split()


def test_a_file_of_a_cpu_plans_the_step_here(written):
    wires = {"links": 1.0, "hops": 1.0, "slices": False, "shared": 1}
    collectives = {"data": CALIBRATION.collectives["data"] | {"wiring": wires}}
    result = plan(*TINY, "--json", "--calibration", written(device=CPU, collectives=collectives))
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    flops = answer["flops_per_chip_per_step"]
    assert 1 <= flops["compiled"] / flops["model"] < 4  # of tiles that are not full, at such sizes
    assert answer["collective_bytes_per_chip_per_step"]["data"]
    assert answer["seconds"]["calibrated"] == pytest.approx(1.2 * answer["seconds"]["scheduled"])
    assert "measured on 8 x cpu" in answer["rates"]


def test_a_step_that_devices_here_have_no_room_for_does_not_fit(written, monkeypatch):
    monkeypatch.setattr(grok.plan.local, "_device_bytes", lambda devices: 1000)
    result = plan(*TINY, "--calibration", written(device=CPU, collectives={}))
    assert result.exit_code == 1
    assert "does not fit: state " in result.stdout
    assert "model.remat=full: fewer temporaries" in result.stdout


def test_a_decode_step_that_the_text_hides_is_counted_from_the_model(written):
    arguments = [*TINY, "plan.program=decode", "plan.tokens=64", "engine.page_size=32"]
    result = plan(*arguments, "--calibration", written(device=CPU, collectives={}))
    assert result.exit_code == 0, result.output
    assert "FLOPs are the model's and HBM bytes the state's, read once" in result.stdout


def test_a_file_of_other_devices_than_those_here_is_refused(written):
    device = CPU | {"platform": "gpu", "kind": "NVIDIA H200", "count": 1}
    result = plan("--calibration", written(device=device))
    assert result.exit_code == 2
    assert "was measured on 1 x NVIDIA H200, and here are 8 x cpu; `grok calibrate` here" in (
        result.stderr
    )


@pytest.mark.parametrize("option", ["--prices", "--dump", "--storage-bandwidth"])
def test_options_of_slices_are_refused_where_the_plan_is_of_devices_here(written, option):
    result = plan(option, "1", "--calibration", written(device=CPU))
    assert result.exit_code == 2
    assert "are of TPU slices; --topology names one" in result.stderr


def test_a_file_of_a_cpu_is_not_for_a_slice(written):
    result = plan("--topology", "v5p:2x2x1", "--calibration", written(device=CPU))
    assert "measured on cpu, and v5p:2x2x1 has TPU v5; a file measured on TPU v5" in result.stderr
