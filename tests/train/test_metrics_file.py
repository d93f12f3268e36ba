"""Metrics as they are written, read, and sent elsewhere."""

import json
import math
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from grok.config import AttentionConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from grok.errors import ConfigError
from grok.train.telemetry.metrics_file import MetricsFile, read_metrics, to_plain
from grok.train.telemetry.trackers import open_trackers, scalars


def small_run(**train) -> RunConfig:
    model = ModelConfig(
        vocab_size=8,
        num_layers=1,
        embed_dim=4,
        moe=MoEConfig(dim=4),
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=4),
    )
    return RunConfig(model=model, train=TrainConfig(**train), folder="runs/mine")


def test_numbers_are_short_and_exact():
    loss = jnp.float32(0.1) + jnp.float32(2)
    values = to_plain({"loss": loss, "load": jnp.float32([1 / 3, 0.25]), "skipped": jnp.int32(3)})
    assert json.dumps(values["loss"]) == "2.1"
    assert np.float32(values["loss"]) == loss
    assert np.float32(values["load"][0]) == np.float32(1 / 3)
    assert values["skipped"] == 3
    loads = to_plain({"expert_load_layers": jnp.float32([[1 / 3, 2 / 3]])})
    assert loads == {"expert_load_layers": [[0.3333, 0.6667]]}


def test_lines_are_json_even_of_what_is_no_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as file:
        file.write(1, loss=math.nan, grad_norm=math.inf, load=[-math.inf, 1.0], note="fine")

    def refuse(text: str):
        raise AssertionError(f"{text} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (line,) = read_metrics(path)
    assert math.isnan(line["loss"])
    assert (line["grad_norm"], line["load"]) == (math.inf, [-math.inf, 1.0])


def test_curves_are_made_of_numbers_and_lists_of_them():
    values = {
        "loss": 1.5,
        "tokens_seen": {"text": 7},
        "expert_load": [0.25, 0.75],
        "expert_load_layers": [[0.25, 0.75]],
        "tokens_per_second": None,
        "note": "text",
    }
    assert dict(scalars(values)) == {
        "loss": 1.5,
        "tokens_seen/text": 7,
        "expert_load/0": 0.25,
        "expert_load/1": 0.75,
    }


@pytest.mark.parametrize(
    ("train", "package", "sentence"),
    [
        ({"tensorboard": True}, "tensorboardX", r"train\.tensorboard=true needs tensorboardX.*"),
        (
            {"wandb": "mine"},
            "wandb",
            r"train\.wandb=mine needs wandb.* 'grok-jax\[wandb\]'` elsewhere",
        ),
    ],
)
def test_a_missing_extra_is_said_before_anything_starts(
    train, package, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == package else object()
    )
    with pytest.raises(ConfigError, match=sentence):
        open_trackers(small_run(**train), tmp_path, "0123abcd", 0)


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path: Path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options["project"], options["id"], options["resume"]))
        return Run()

    class Refused(Exception):
        pass

    fake = types.SimpleNamespace(
        init=init,
        Settings=lambda **options: options,
        errors=types.SimpleNamespace(Error=Refused),
        __spec__=object(),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (writer,) = open_trackers(small_run(wandb="mine"), tmp_path, "0123abcd", 5)
    writer.write(6, {"loss": 2.0, "expert_load": [0.5]})
    writer.close()
    assert calls == [
        ("init", "mine", "0123abcd", "allow"),
        ("log", 6, {"loss": 2.0, "expert_load/0": 0.5}),
        ("finish",),
    ]

    def refuse(**_):
        raise Refused("no API key")

    fake.init = refuse
    with pytest.raises(ConfigError, match=r"train\.wandb=mine cannot be used: no API key; .*offl"):
        open_trackers(small_run(wandb="mine"), tmp_path, "0123abcd", 5)


@pytest.mark.parametrize("profile", [(5,), (6, 5), (900, 1200), (1, 2, 3)])
def test_a_profile_of_no_steps_of_the_run_is_refused(profile):
    with pytest.raises(ConfigError, match=r"train\.profile=\[20, 22\] would work"):
        TrainConfig(steps=1000, profile=profile)
