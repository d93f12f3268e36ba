"""What a finished run leaves behind, and a part of it done again."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from grok.cli.main import main
from grok.config import RunConfig
from grok.config.load import to_dict
from grok.errors import DONE, CheckpointError
from grok.train.loop import run_training
from grok.train.replay import Comparison, Segment, find_segment, replay
from grok.train.telemetry.event_log import measure_goodput, read_events
from grok.train.telemetry.metrics_file import read_metrics


@pytest.fixture(scope="module")
def finished(tiny_run: RunConfig, tmp_path_factory) -> RunConfig:
    """Six steps in one go, with everything told that can be."""
    config = dataclasses.replace(
        tiny_run,
        folder=str(tmp_path_factory.mktemp("finished") / "run"),
        train=dataclasses.replace(tiny_run.train, steps=6, tensorboard=True, profile=(3, 4)),
        checkpoint=dataclasses.replace(tiny_run.checkpoint, every=2, keep=2),
    )
    assert run_training(config) == DONE
    return config


@pytest.fixture
def copied(finished: RunConfig, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be changed."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def test_the_event_log_accounts_for_the_time(finished: RunConfig):
    events = read_events(Path(finished.folder) / "events.jsonl")
    names = [event["event"] for event in events]
    assert names[0] == "began"
    assert {"start", "compile", "steps", "save", "validate", "profile"} <= set(names)
    assert names[-1] == "ended"
    assert (events[-1]["step"], events[-1]["code"]) == (6, DONE)
    spans = [(event["first"], event["last"]) for event in events if event["event"] == "steps"]
    assert {2, 4, 6} <= {last for _, last in spans}
    assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
    measured = measure_goodput(events)
    assert 0 < measured.share < 1
    assert measured.seconds["lost"] == measured.seconds["down"] == 0


def test_run_json_is_enough_for_an_audit(finished: RunConfig):
    folder = Path(finished.folder)
    record = json.loads((folder / "run.json").read_text())
    assert record["config"] == to_dict(finished)
    (start,) = record["starts"]
    assert (start["first_step"], start["last_step"], start["exit_code"]) == (0, 6, DONE)
    assert start["began"] <= start["ended"]
    assert start["devices"] == {"kind": "cpu", "platform": "cpu", "count": 8, "processes": 1}
    assert start["mesh"] == {"slice": 1, "data": 2, "expert": 2, "tensor": 2}
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= start["packages"].keys()
    assert {source["file"] for source in record["data"]} == {
        *finished.data.train,
        *finished.data.validation,
        finished.data.tokenizer,
    }
    # The first was deleted again, and stays on record.
    assert list(record["checkpoints"]) == ["2", "4", "6"]
    for step in ("4", "6"):
        files = [path for path in (folder / "checkpoints" / step).rglob("*") if path.is_file()]
        assert record["checkpoints"][step]["files"] == len(files)
        assert record["checkpoints"][step]["bytes"] == sum(path.stat().st_size for path in files)


def tensorboard_values(file: Path) -> dict[str, dict[int, float]]:
    """The curves in an event file: value by step, by name; framing as TFRecord has it."""
    data, curves = file.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        assert masked_crc32c(data[:8]) == int.from_bytes(data[8:12], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            curves.setdefault(value.tag, {})[event.step] = value.simple_value
        data = data[16 + length :]
    return curves


def test_tensorboard_has_the_numbers_of_the_log(finished: RunConfig):
    folder = Path(finished.folder)
    (file,) = (folder / "tensorboard").iterdir()
    curves = tensorboard_values(file)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert curves["loss"] == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert curves["expert_load/7"][6] == pytest.approx(lines[-1]["expert_load"][7])
    assert "validation_loss" in curves


def test_a_profile_of_the_steps_is_there(finished: RunConfig):
    assert list(Path(finished.folder, "profile").glob("plugins/profile/*/*.xplane.pb"))


def test_a_part_done_again_is_equal_to_the_last_bit(finished: RunConfig, copied: Path):
    comparisons = replay(find_segment(copied, 4, None))
    assert {comparison.step for comparison in comparisons} == {5, 6}
    assert {"loss", "grad_norm"} <= {comparison.name for comparison in comparisons}
    assert all(comparison.equal for comparison in comparisons)
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.parametrize(("flip", "code"), [(False, 0), (True, 1)])
def test_the_verdict_is_an_exit_code(finished: RunConfig, monkeypatch, flip, code):
    def repeated(segment: Segment) -> list[Comparison]:
        norm = segment.logged[0]["grad_norm"]
        again = norm * (1 + 2**-22) if flip else norm
        return [Comparison(5, "loss", 2.0, 2.0), Comparison(5, "grad_norm", norm, again)]

    monkeypatch.setattr("grok.train.replay.replay", repeated)
    result = CliRunner().invoke(main, ["replay", finished.folder, "--from", "4", "--steps", "1"])
    assert result.exit_code == code
    if flip:
        assert "different: 1 of 2 numbers, first grad_norm of step 5" in result.stdout
    else:
        assert "equal: 2 numbers of 1 logged steps, 5 to 5," in result.stdout


def test_numbers_are_compared_as_bits():
    assert Comparison(1, "loss", math.nan, math.nan).equal
    assert not Comparison(1, "loss", 1.0, math.nan).equal
    assert Comparison(1, "loss", 0.1, float(np.float32(0.1))).equal
    assert not Comparison(1, "loss", 1.0, 1.0 + 2**-23).equal


@pytest.mark.parametrize(
    ("first", "steps", "problem"),
    [
        (3, None, r"no checkpoint of step 3; there are 4, 6, and 0"),
        (4, 3, r"no logged steps .* from 5 to 7; --steps from 1 to 2 would work"),
        (6, None, r"an earlier checkpoint would work"),
    ],
)
def test_a_part_that_is_not_there_is_refused(finished: RunConfig, first, steps, problem):
    with pytest.raises(CheckpointError, match=problem):
        find_segment(Path(finished.folder), first, steps)


def test_a_part_ends_where_another_config_or_other_devices_took_over(copied: Path):
    path = copied / "run.json"
    record = json.loads(path.read_text())
    longer = dict(record["starts"][0], first_step=4, config_before=record["config"])
    record["config"] = {**record["config"], "folder": "elsewhere"}
    record["starts"].append(longer)
    path.write_text(json.dumps(record))
    segment = find_segment(copied, 0, None)
    assert (segment.last, segment.config.folder) == (
        4,
        record["starts"][1]["config_before"]["folder"],
    )
    assert find_segment(copied, 4, None).config.folder == "elsewhere"
    with pytest.raises(CheckpointError, match=r"one config and devices from 1 to 5"):
        find_segment(copied, 0, 5)


def test_other_devices_and_other_text_are_refused(copied: Path):
    path = copied / "run.json"
    record = json.loads(path.read_text())
    text = record["data"][0]
    text["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"is not the text that"):
        replay(find_segment(copied, 4, None))
    record["starts"][0]["devices"]["count"] = 4
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"ran on 4 x cpu .*, and here are 8 x cpu"):
        replay(find_segment(copied, 4, None))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no folder of a run on this machine"):
        find_segment(tmp_path, None, None)


def test_the_report_of_the_run_is_one_page_and_a_picture(copied: Path):
    result = CliRunner().invoke(main, ["report", str(copied)])
    assert (result.exit_code, result.stderr) == (0, "")
    page = (copied / "report.html").read_text()
    for text in ("finished, step 6 of 6", "Goodput", "Load of the experts", "8 x cpu"):
        assert text in page
    assert (copied / "report.png").read_bytes().startswith(b"\x89PNG")
