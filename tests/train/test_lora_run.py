"""A run that trains adapters on open weights: what it changes, what it saves, what comes out."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from grok.checkpoint import file_list
from grok.checkpoint.manager import Checkpoints
from grok.cli.main import main
from grok.config import CheckpointConfig, LoraConfig, RunConfig, check_trainable
from grok.errors import DONE, CheckpointError, ConfigError
from grok.infer.loader import config_of
from grok.model.params import num_adapter_parameters, num_parameters, tensor_specs
from grok.train.init_from import initial_weights
from grok.train.loop import run_training
from grok.train.telemetry.metrics_file import read_metrics
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.huggingface.export import export_huggingface
from grok.weights.huggingface.peft import export_peft
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_writer import write_release
from tests.train.test_init_from import RELEASE, golden_run, validation_loss

STEPS = 6
LORA = LoraConfig(rank=4, alpha=8, targets=("query", "value", "out", "gate", "down"))
ADAPTED = {
    "layers/attention/w_query_DNH",
    "layers/attention/w_value_DKH",
    "layers/attention/w_out_NHD",
    "layers/moe/w_gate_EDF",
    "layers/moe/w_down_EFD",
}


@pytest.fixture(scope="module")
def tuned(tiny_run: RunConfig, tmp_path_factory) -> RunConfig:
    """Six steps without a stop, checkpoints at 3 and 6."""
    config = golden_run(tiny_run, tmp_path_factory.mktemp("lora") / "run", RELEASE)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=STEPS),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=3e-2),
        lora=LORA,
        checkpoint=CheckpointConfig(every=3),
    )
    assert run_training(config) == DONE
    return config


def lines_of(config: RunConfig) -> list[dict]:
    return [
        {key: line[key] for key in line if key in ("step", "loss", "grad_norm", "validation_loss")}
        for line in read_metrics(Path(config.folder) / "metrics.jsonl")
        if "event" not in line
    ]


def logged_loss(config: RunConfig) -> float:
    (loss,) = [line["validation_loss"] for line in lines_of(config) if "validation_loss" in line]
    return loss


def test_the_loss_falls_by_adapters_alone(tuned: RunConfig):
    losses = [line["loss"] for line in lines_of(tuned) if "loss" in line]
    print(f"\nlosses {losses}")
    assert losses[-1] < losses[0] - 0.5
    release, merged = (open_source(path, tuned.model) for path in (RELEASE, tuned.folder))
    for name, spec in merged.tensors.items():
        before, after = release.read(name, spec.full_part), merged.read(name, spec.full_part)
        if release.tensors[name].groups is None:
            np.testing.assert_array_equal(after, before.astype(np.float32))


def test_checkpoints_hold_adapters_and_their_moments_alone(tuned: RunConfig):
    step = Path(tuned.folder) / "checkpoints" / str(STEPS)
    assert not (step / "model").exists()
    tree = json.loads((step / "lora" / "_METADATA").read_text())["tree_metadata"]
    names = {"/".join(key["key"] for key in entry["key_metadata"]) for entry in tree.values()}
    assert names == {f"{name}/{part}" for name in ADAPTED for part in "ab"}
    whole = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    # A quarter of what the weights alone would take.
    assert whole < num_parameters(tuned.model)


def test_a_run_says_what_it_trains(tuned: RunConfig, capsys):
    assert run_training(tuned) == DONE  # it is at its end
    count = num_adapter_parameters(tuned.model, LORA)
    facts = f"{count:,} trainable parameters ("
    rank = "rank 4 (alpha 8) on query, value, out, gate, down; base "
    said = capsys.readouterr().out
    assert f"LoRA: {facts}" in said and rank in said
    text = CliRunner().invoke(main, ["inspect", tuned.folder]).stdout
    assert f"step        {STEPS}\n" in text
    assert f"origin      a run of {STEPS} steps from the weights at {RELEASE} (xai), on " in text
    assert f"LoRA        {facts}" in text and rank in text
    assert facts in json.loads((Path(tuned.folder) / "run.json").read_text())["adapters"]
    specs = tensor_specs(tuned.model, LORA).values()
    assert count == sum(spec.size for spec in specs if spec.use == "adapter")


def test_resumed_every_bit_is_the_same(tuned: RunConfig, tmp_path):
    shutil.copytree(tuned.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    again = dataclasses.replace(tuned, folder=str(tmp_path / "run"))
    assert run_training(again) == DONE
    assert lines_of(again) == lines_of(tuned)


@pytest.mark.prove
def test_a_run_over_int4(tuned: RunConfig, tmp_path):
    """QLoRA: resumed it has every bit, and merged weights have its loss, in floats by default."""
    model = dataclasses.replace(tuned.model, param_dtype="int4")
    run = dataclasses.replace(tuned, model=model, folder=str(tmp_path / "run"))
    assert run_training(run) == DONE
    losses = [line["loss"] for line in lines_of(run) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert config_of(run.folder, None, ()).model.param_dtype == run.model.compute_dtype
    merged = open_source(run.folder)
    assert (merged.dtype, merged.config.param_dtype) == ("float32", "int4")
    assert validation_loss(Path(run.folder), tuned) == pytest.approx(logged_loss(run), rel=1e-5)
    again = dataclasses.replace(run, folder=str(tmp_path / "again"))
    shutil.copytree(run.folder, again.folder)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(STEPS))
    assert run_training(again) == DONE
    assert lines_of(again) == lines_of(run)


def test_merged_weights_have_the_loss_of_the_adapters(tuned: RunConfig, tmp_path):
    merged = validation_loss(Path(tuned.folder), tuned)
    print(f"\nadapters {logged_loss(tuned):.7f}, merged {merged:.7f}")
    assert merged == pytest.approx(logged_loss(tuned), rel=1e-6)
    commands = (
        ("export", "params", tuned.folder, tmp_path / "params"),
        ("export", "hf", tuned.folder, tmp_path / "hf", "--dtype", "float32"),
        ("import", "hf", tmp_path / "hf", tmp_path / "back", "--dtype", "float32"),
    )
    for command in commands:
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 0, done.output
    assert validation_loss(tmp_path / "back", tuned) == merged
    assert validation_loss(tmp_path / "params", tuned) == merged


def test_adapters_alone_as_the_peft_library_has_them(tuned: RunConfig, tmp_path):
    words = ("export", "peft", tuned.folder, tmp_path / "peft", "--base-weights", "xai-org/grok-1")
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "xai-org/grok-1")
    assert (config["r"], config["lora_alpha"]) == (LORA.rank, LORA.alpha)
    assert config["target_modules"] == ["q_proj", "v_proj", "o_proj", "linear", "linear_1"]
    adapters = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    base, merged = open_source(RELEASE, tuned.model), open_source(tuned.folder)
    export_huggingface(converted(base, "float32"), tmp_path / "base", "float32")
    export_huggingface(merged, tmp_path / "merged", "float32")
    before, after = (
        load_file(tmp_path / name / "model-00001-of-00001.safetensors")
        for name in ("base", "merged")
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapters}
    assert {f"{module}.weight" for module in modules} == changed
    for module in modules:
        a, b = (adapters[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        product = config["lora_alpha"] / config["r"] * (b @ a)
        weight = before[f"{module}.weight"] + product
        np.testing.assert_allclose(weight, after[f"{module}.weight"], atol=1e-6)

    card = (tmp_path / "merged" / "README.md").read_text()
    count = sum(array.size for array in adapters.values())
    assert f"LoRA adapters: {count:,} trainable parameters" in card
    assert "rank 4 (alpha 8) on query, value, out, gate, down. They are added" in card
    assert re.search(
        r"`ckpt-0`, a folder in .*checksum of a sample of its values `[0-9a-f]{32}`", card
    )
    assert f"{STEPS} steps by the grok codebase." in card
    full = CliRunner().invoke(main, ["export", "params", tuned.folder, str(tmp_path / "full")])
    assert full.exit_code == 0, full.output
    with pytest.raises(CheckpointError, match=r"no adapters on others; `grok export hf` writes"):
        export_peft(tmp_path / "full", tmp_path / "none")


def test_adapters_of_other_weights_are_refused(tuned: RunConfig, tmp_path):
    shutil.copytree(tuned.folder, tmp_path / "run")
    shutil.copytree(RELEASE, tmp_path / "ckpt-0")
    moved = dataclasses.replace(
        tuned,
        folder=str(tmp_path / "run"),
        train=dataclasses.replace(tuned.train, init_from=str(tmp_path / "ckpt-0")),
    )
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert initial_weights(moved, checkpoints).identity["path"] == str(tmp_path / "ckpt-0")
    shutil.rmtree(tmp_path / "ckpt-0")
    write_release(RandomSource(tuned.model), tmp_path / "ckpt-0")
    with pytest.raises(CheckpointError, match=r"adapters of the weights that were at .*holds othe"):
        initial_weights(moved, checkpoints)
    meta = tmp_path / "run" / "checkpoints" / str(STEPS) / "meta" / "metadata"
    meta.write_text(meta.read_text().replace(str(RELEASE), str(tmp_path / "ckpt-0")))
    file_list.commit(meta.parents[1], STEPS)
    with pytest.raises(CheckpointError, match=r"and others are there now"):
        open_source(tmp_path / "run")
    shutil.rmtree(tmp_path / "ckpt-0")
    with pytest.raises(CheckpointError, match=r"the weights that they belong to cannot be opened"):
        open_source(tmp_path / "run")


def test_other_adapters_are_refused_by_name(tuned: RunConfig):
    other = dataclasses.replace(tuned, lora=dataclasses.replace(LORA, rank=8))
    with pytest.raises(CheckpointError, match=r"lora\.(rank=4|alpha=8\.0) and the config says"):
        run_training(other)


def test_adapters_of_nothing_are_refused(tuned: RunConfig):
    with pytest.raises(ConfigError, match=r"train\.init_from names none"):
        dataclasses.replace(tuned, train=dataclasses.replace(tuned.train, init_from=""))
    int4 = dataclasses.replace(tuned.model, param_dtype="int4")
    with pytest.raises(ConfigError, match=r"param_dtype=int4 is for inference or below adapters"):
        check_trainable(dataclasses.replace(tuned, model=int4, lora=LoraConfig()))
    with pytest.raises(ConfigError, match=r"should name matrices, each once"):
        LoraConfig(rank=4, targets=("query", "query"))
