"""Configs: what loads, what is refused and in which words, presets, and meshes that fit."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated

import pytest
from click.testing import CliRunner
from pydantic import ConfigDict, Field

from grok.cli.main import main
from grok.config import (
    MESH_AXES,
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RunConfig,
    resolve_mesh,
)
from grok.config.infer import BatchConfig
from grok.config.load import from_dict, load_config, presets, to_dict
from grok.config.paths import new_folder, with_absolute_paths
from grok.config.schema import describe, schema
from grok.config.text import to_yaml
from grok.errors import ConfigError
from grok.model import mesh_fit
from grok.model.mesh_fit import STORED_AS, check_fits, fit_mesh
from grok.model.params import num_active_parameters, num_parameters, param_specs
from grok.sharding.rules import mesh_axes
from tests.fixtures.models import model_config

# Removing or renaming a key breaks the files that users have: change this list on purpose only.
KEYS = """
model model.vocab_size model.num_layers model.embed_dim model.context_length
model.embedding_multiplier model.logit_multiplier model.logit_softcap model.tie_embeddings
model.norm model.norm.eps model.norm.sandwich
model.attention model.attention.num_heads model.attention.num_kv_heads model.attention.head_dim
model.attention.logit_scale model.attention.logit_softcap model.attention.temperature_length
model.attention.window model.attention.rope model.attention.rope.theta model.attention.rope.scaling
model.attention.rope.scaling.factor model.attention.rope.scaling.low_freq_factor
model.attention.rope.scaling.high_freq_factor model.attention.rope.scaling.original_context_length
model.mlp model.mlp.dim model.mlp.activation
model.moe model.moe.dim model.moe.num_experts model.moe.num_selected
model.moe.activation model.moe.normalize model.moe.logit_softcap model.param_dtype
model.embedding_dtype model.compute_dtype model.matmul_dtype model.remat
folder compile_cache
mesh mesh.slice mesh.data mesh.expert mesh.tensor mesh.simulated_devices
data data.train data.validation data.datasets data.mixture_schedule data.validation_dataset
data.domains data.packing data.allow_data_change data.tokenizer data.sequence_length data.batch_size
data.batch_schedule data.seed data.cache_gib data.prefetch
optimizer optimizer.name optimizer.peak_lr optimizer.schedule optimizer.min_lr_ratio
optimizer.warmup_steps optimizer.decay_steps optimizer.beta1 optimizer.beta2 optimizer.epsilon
optimizer.muon_momentum optimizer.moments_dtype optimizer.offload optimizer.weight_decay
optimizer.max_grad_norm optimizer.param_groups optimizer.ema_decay
train train.steps train.seed train.init_from train.z_loss train.router_balance_loss
train.grad_accum_steps train.grad_spike_factor train.max_bad_steps train.rollback_on_divergence
train.sdc_check train.sdc_check_every train.log_every train.eval_every
train.eval_tasks train.eval_tasks_folder train.eval_tasks_limit train.start_timeout_seconds
train.hang_timeout_seconds
train.heartbeat_timeout_seconds train.tensorboard train.wandb train.profile
lora lora.rank lora.alpha lora.targets
checkpoint checkpoint.every checkpoint.keep checkpoint.keep_every checkpoint.keep_best
checkpoint.best_metric
engine engine.max_num_seqs engine.page_size engine.num_pages engine.prefill_chunk_size
engine.cache_dtype
plan plan.program plan.topology plan.batch_size plan.tokens
""".split()

LADDER = ["grok-10m", "grok-100m", "grok-1b", "grok-8b", "grok-33b"]
MODEL = {"vocab_size": 96, "num_layers": 2, "embed_dim": 64, "moe.dim": 176}
MODEL |= {
    "attention.num_heads": 8,
    "attention.num_kv_heads": 4,
    "attention.head_dim": 8,
    "context_length": 1024,
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the current folder, which is empty at first."""
    monkeypatch.chdir(tmp_path)
    return lambda name, text: Path(name).write_text(text, encoding="utf-8")


def load_and_fit(path, overrides):
    """Loads a config, and checks its mesh as commands do before they begin."""
    config = load_config(path, overrides)
    if config.mesh.simulated_devices:
        check_fits(config, config.mesh.simulated_devices)


def refusal(path, *overrides):
    """The sentence that a config is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_and_fit(path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence[-1] in ".?"
    assert caught.value.exit_code == 2
    return sentence


# ---- what loads


def test_the_keys_are_these():
    assert list(schema()) == KEYS


def test_every_key_has_a_meaning_of_one_line():
    for key, setting in schema().items():
        assert setting.meaning, key
        assert "\n" not in setting.meaning, key


def test_every_key_is_read():
    code = "".join(
        path.read_text()
        for path in (Path(__file__).parents[1] / "grok").rglob("*.py")
        if path.parent.name != "config"
    )
    names = set(re.findall(r"\.(\w+)", code)) | set(re.findall(r'"(\w+)"', code))
    unread = [key for key in schema() if key.rpartition(".")[2] not in names]
    assert not unread, "a key that nothing reads"


def test_describe_gives_every_setting_with_value_and_meaning():
    rows = describe(load_config("grok-10m", ["train.steps=500"]))
    sections = {
        "model.norm",
        "model.attention",
        "model.attention.rope",
        "model.moe",
        "plan",
        "model",
        "mesh",
        "data",
        "optimizer",
        "train",
        "lora",
        "checkpoint",
        "engine",
    }
    null = ("model.mlp.", "model.attention.rope.scaling.")  # sections, of which no keys are shown
    expected = [key for key in KEYS if key not in sections and not key.startswith(null)]
    assert [key for key, _, _ in rows] == expected
    assert ("train.steps", 500, "optimizer steps of the whole run") in rows


def test_overrides_beat_the_file_and_the_file_beats_what_it_extends(write):
    write("base.yaml", "extends: grok-10m\ntrain: {steps: 300, log_every: 3}\nfolder: runs/base")
    write("run.yaml", "extends: base.yaml\ntrain:\n  steps: 400\n  seed: 4\n")
    run = load_config("run.yaml", ["train.seed=5", "train.seed=6", "optimizer={peak_lr: 1e-4}"])
    assert (run.train.steps, run.train.log_every, run.train.seed) == (400, 3, 6)
    assert (run.folder, run.optimizer.peak_lr, run.optimizer.beta1) == ("runs/base", 1e-4, 0.9)
    assert run.model == load_config("grok-10m").model


def test_extends_is_relative_to_the_file_that_says_it(write):
    Path("deep").mkdir()
    write("base.yaml", "extends: grok-10m\nfolder: here")
    write("deep/run.yaml", "extends: ../base.yaml")
    assert load_config("deep/run.yaml").folder == "here"


def test_a_replaced_list_is_not_merged(write):
    write("run.yaml", "extends: grok-10m\ndata: {train: [a.txt, b.txt]}")
    assert load_config("run.yaml").data.train == ("a.txt", "b.txt")
    assert load_config("run.yaml", ["data.train=[c.txt]"]).data.train == ("c.txt",)


def test_yaml_1_2(write):
    write(
        "run.yaml", "extends: grok-10m\noptimizer: {peak_lr: 1e-4, max_grad_norm: 2}\nfolder: no\n"
    )
    run = load_config("run.yaml")
    assert (run.optimizer.peak_lr, run.optimizer.max_grad_norm, run.folder) == (1e-4, 2.0, "no")
    assert load_config("run.yaml", ["folder=2024-01-31"]).folder == "2024-01-31"
    assert load_config("run.yaml", ["train.steps=0200"]).train.steps == 200


def test_a_section_may_have_all_its_lines_commented_out(write):
    write("run.yaml", "extends: grok-10m\ntrain:\n#  steps: 5\n")
    assert load_config("run.yaml").train == load_config("grok-10m").train


def test_a_file_called_like_a_preset_is_taken_first(write):
    write("grok-1", "extends: grok-10m")
    assert load_config("grok-1").model.num_layers == 4


def test_plain_data_round_trip():
    run = load_config("grok-10m", ["data.train=[a.txt]", "mesh.tensor=2"])
    data = to_dict(run)
    assert data["data"]["train"] == ["a.txt"]
    assert from_dict(data) == run


def test_shapes_keep_what_a_change_leaves_out():
    changes = "[{from_step: 0, sequence_length: 256}, {from_step: 7, batch_size: 16}]"
    data = load_config("grok-10m", [f"data.batch_schedule={changes}"]).data
    assert data.shapes() == [(0, 8, 1024), (0, 8, 256), (7, 16, 256)]


def test_a_mixture_round_trip(write):
    datasets = "data.datasets=[{path: a, weight: 0.7}, {path: b}]"
    run = load_config(
        "grok-10m", [datasets, "data.mixture_schedule=[{from_step: 9, weights: [1, 0]}]"]
    )
    assert [(each.path, each.weight) for each in run.data.datasets] == [("a", 0.7), ("b", 1.0)]
    assert from_dict(to_dict(run)) == run
    write("run.yaml", to_yaml(run))
    assert load_config("run.yaml") == run


def test_groups_round_trip(write):
    groups = "[{match: '*router*', lr_scale: 0.1}, {match: 'layers/*', frozen: true}]"
    run = load_config("grok-10m", [f"optimizer.param_groups={groups}"])
    assert [(each.lr_scale, each.frozen) for each in run.optimizer.param_groups] == [
        (0.1, False),
        (1, True),
    ]
    assert from_dict(to_dict(run)) == run
    write("run.yaml", to_yaml(run))
    assert load_config("run.yaml") == run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    __pydantic_config__ = ConfigDict(extra="forbid")

    dim: Annotated[int, Field(gt=0), "width"]
    router: Annotated[MeshConfig, "below"] = dataclasses.field(default=MeshConfig())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested:
    __pydantic_config__ = ConfigDict(extra="forbid")

    experts: Annotated[Experts | None, "null: none"] = None
    name: Annotated[str, "a name"] = ""


def test_sections_of_sections_and_sections_that_may_be_null(write):
    assert list(schema(Nested))[:4] == [
        "experts",
        "experts.dim",
        "experts.router",
        "experts.router.slice",
    ]
    for config in (Nested(), Nested(experts=Experts(dim=3, router=MeshConfig(tensor=2)))):
        write("nested.yaml", to_yaml(config))
        assert load_config("nested.yaml", (), Nested) == config
    assert to_yaml(Nested()).split("\n")[0].split() == ["experts:", "null", "#", "null:", "none"]
    with pytest.raises(ConfigError, match=r"did you mean experts\.router\.tensor\?"):
        load_config("nested.yaml", ["experts.router.tenser=2"], Nested)
    with pytest.raises(ConfigError, match=r"experts\.dim must be more than 0, not -1\."):
        load_config("nested.yaml", ["experts.dim=-1"], Nested)


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "train:\n  stpes: 5",
            "run.yaml:3: there is no key train.stpes; did you mean train.steps?",
        ),
        ("steps: 5", "run.yaml:2: there is no key steps; did you mean train.steps?"),
        ("seed: 5", "there is no key seed; did you mean data.seed or train.seed?"),
        ("model: {peak_lr: 5}", "no key model.peak_lr; did you mean optimizer.peak_lr?"),
        ("train.steps: 5", "run.yaml:2: in a file, train.steps is written as steps inside train."),
        (
            "checkpoint: {path: 5}",
            "no key checkpoint.path; checkpoint has every, keep, keep_every, keep_best,",
        ),
        ("model: {peaklr: 5}", "no key model.peaklr; did you mean optimizer.peak_lr?"),
        ("wheels: red", "no key wheels; the top level has model, folder, compile_cache,"),
        ("train:\n  steps: ten", 'run.yaml:3: train.steps must be an integer, not "ten"'),
        ("train:\n  steps: ten", "the default is 1000."),
        ('train: {steps: "50"}', 'an integer, not "50"; did you mean 50?'),
        ("train: {steps: 5e2}", "an integer, not 500.0; did you mean 500?"),
        ("train: {steps: true}", "train.steps must be an integer, not true"),
        ("train: {steps: 2147483648}", "train.steps must be at most 2147483647, not 2147483648"),
        ("train: {steps: 1e20}", "must be an integer, not 1e+20; did you mean 1000"),
        (f"data: {{batch_size: {9**40}}}", "data.batch_size must be at most 2147483647, not 147"),
        ("train: {seed: 4294967296}", "train.seed must be at most 4294967295, not 4294967296"),
        ("train: {steps: 0}", "run.yaml:2: train.steps must be more than 0, not 0"),
        ("train: {steps: {a: 1}}", 'train.steps must be an integer, not {"a": 1}'),
        ("train: 5", "train must be a mapping of keys, not 5; its keys are steps, seed,"),
        (
            "optimizer: {peak_lr: fast}",
            'peak_lr must be a number, not "fast"; the default is 0.0003.',
        ),
        ('optimizer: {peak_lr: "1e-4"}', 'must be a number, not "1e-4"; did you mean 0.0001?'),
        ("optimizer: {peak_lr: .inf}", "optimizer.peak_lr must be a finite number, not Infinity"),
        ("optimizer: {beta1: 1.5}", "optimizer.beta1 must be at most 1, not 1.5"),
        ("optimizer: {beta1: .nan}", "optimizer.beta1 must be at most 1, not NaN"),
        ("optimizer: {beta1: -1}", "optimizer.beta1 must be at least 0, not -1"),
        ("folder: 12", 'run.yaml:2: folder must be text, not 12; did you mean "12"?'),
        ("data: {train: a.txt}", 'data.train must be a list, such as [a.txt, b.txt], not "a.txt"'),
        ("data:\n  train:\n  - a\n  - 3", "run.yaml:5: data.train[1] must be text, not 3"),
        (
            "model: {remat: ful}",
            "must be 'none', 'dots', 'selective', 'attention', 'experts', 'offload' or 'full', "
            'not "ful"; did you mean "full"?',
        ),
        (
            "model: {attention: {\n  num_kv_heads: 5}}",
            "run.yaml:3: model.attention.num_kv_heads=5 does not divide",
        ),
        ("model: {attention: {num_kv_heads: 5}}", "model.attention.num_kv_heads=4 would work."),
        ("model: {attention: {head_dim: 7}}", "model.attention.head_dim=7 is odd"),
        ("model: {attention: {window: 0}}", "model.attention.window must be more than 0, not 0"),
        (
            "model: {attention: {temperature_length: 1}}",
            "model.attention.temperature_length must be more than 1, not 1",
        ),
        (
            "model: {attention: {rope: {scaling: {factor: 8}}}}",
            "model.attention.rope.scaling.high_freq_factor, "
            "model.attention.rope.scaling.original_context_length must be set",
        ),
        (
            "model: {attention: {rope: {scaling: {factor: 8, low_freq_factor: 4,\n"
            "  high_freq_factor: 1, original_context_length: 8192}}}}",
            "run.yaml:3: model.attention.rope.scaling.high_freq_factor=1.0 is not above "
            "model.attention.rope.scaling.low_freq_factor=4; "
            "model.attention.rope.scaling.high_freq_factor=16.0 would work.",
        ),
        (
            "model: {attention: {rope: {scaling: {factor: 0.5, low_freq_factor: 1,\n"
            "  high_freq_factor: 4, original_context_length: 8192}}}}",
            "model.attention.rope.scaling.factor must be at least 1, not 0.5",
        ),
        ("model: {moe: {num_experts: 1}}", "model.moe.num_selected=1 would work."),
        ("data: {sequence_length: 4096}", "data.sequence_length=1024 would work."),
        ("train: {steps: 50}", "run.yaml:2: optimizer.warmup_steps=100 leaves nothing of"),
        ("train: {seed: 1}\ntrain: {seed: 2}", "run.yaml:3: train is set a second time"),
        ("train:\n  seed: 1\n  seed: 2", "run.yaml:4: train.seed is set a second time, after"),
        ("folder: &a x", "run.yaml:2: the anchor &a is not allowed"),
        ("folder: !!python/name:os.system x", "the tag python/name:os.system is not allowed"),
        ("folder: !mine x", "the tag !mine is not allowed"),
        ("? [a, b]\n: 3", "run.yaml:2: a key must be a name"),
        ("folder: [a\ntrain: 5", "run.yaml:3: not valid YAML"),
        ("folder: *x", "run.yaml:2: not valid YAML: found undefined alias 'x'."),
        ("folder: \x07", "run.yaml:1: not valid YAML"),
        ("folder: " + "[" * 1000, "nested too deeply"),
        ("folder: " + "[" * 210 + "]" * 210, "a config cannot be read: "),
        ("folder: " + "9" * 5000, "cannot be read"),
        ("data: {datasets: [a]}", 'data.datasets[0] must be a mapping of keys, not "a"; its keys'),
        ("data: {datasets: [{pth: a}]}", "data.datasets.0.pth; did you mean data.datasets.0.path?"),
        ("data: {datasets: [{path: a, weight: -1}]}", "datasets[0].weight must be at least 0"),
        ("data: {datasets: [{path: a, weight: 0}]}", "data.datasets have no weight above 0"),
        ("data: {datasets: [{path: a}, {path: a}]}", "data.datasets names a twice"),
        ("data: {train: [a], datasets: [{path: a}]}", "data.train and data.datasets are both set"),
        ("data: {validation: [a], validation_dataset: b}", "data.validation=[] would work."),
        (
            "data: {datasets: [{path: a}], mixture_schedule: [{from_step: 5, weights: [1, 2]}]}",
            "data.mixture_schedule has [1.0, 2.0] from step 5, and data.datasets has 1 datasets",
        ),
        (
            "data: {datasets: [{path: a}], mixture_schedule: [{from_step: 5, weights: [1]},"
            " {from_step: 5, weights: [1]}]}",
            "data.mixture_schedule has from_step=5 after 5; steps that increase would work.",
        ),
        (
            "checkpoint: {every: 0, keep_every: 700}",
            "checkpoint.keep_every=700 names steps, and checkpoint.every=0 saves at any; "
            "checkpoint.keep_every=0 would work.",
        ),
        (
            "checkpoint: {keep_every: 700}",
            "checkpoint.keep_every=700 is no multiple of checkpoint.every=500; "
            "checkpoint.keep_every=1000 would work.",
        ),
        ("checkpoint: {keep_best: 2}", "neither data.validation nor data.validation_dataset names"),
        (
            "checkpoint: {keep_best: 2}\ndata: {validation: [a]}\ntrain: {eval_every: 300}",
            "multiples of checkpoint.every=500; train.eval_every=500 would work.",
        ),
        ("optimizer: {name: adam}", 'did you mean "adamw"?'),
        ("optimizer: {name: lion, epsilon: 1e-6}", "optimizer.epsilon=1e-08 would work."),
        ("optimizer: {muon_momentum: 0.9}", "is nothing that optimizer.name=adamw has"),
        ("optimizer: {schedule: wsd}", "optimizer.decay_steps=100 would work."),
        ("optimizer: {decay_steps: 5}", "optimizer.schedule=wsd would work."),
        (
            "optimizer: {schedule: wsd, decay_steps: 950}\ntrain: {steps: 1000}",
            "is more than the 900 steps of train.steps=1000 after optimizer.warmup_steps=100; "
            "optimizer.decay_steps=900 would work.",
        ),
        (
            "optimizer: {schedule: constant, min_lr_ratio: 0.5}",
            "optimizer.schedule=linear would work.",
        ),
        (
            "optimizer: {beta2: 0.999, moments_dtype: bfloat16}",
            "run.yaml:2: optimizer.beta2=0.999 decays by less than bfloat16's 8 bits can hold",
        ),
        ("optimizer: {ema_decay: 1}", "optimizer.ema_decay=0.999 would work."),
        (
            "optimizer: {param_groups: [router]}",
            "optimizer.param_groups[0] must be a mapping of keys",
        ),
        (
            "optimizer: {param_groups: [{match: a, scale: 2}]}",
            "optimizer.param_groups.0.scale; did you mean optimizer.param_groups.0.lr_scale?",
        ),
        (
            "optimizer: {param_groups: [{match: '*', frozen: true, lr_scale: 2}]}",
            "optimizer.param_groups has * frozen and with a learning rate or decay of its own",
        ),
        ("train: {grad_spike_factor: 0.5}", "train.grad_spike_factor=10 would work."),
        (
            "train: {grad_accum_steps: 3}\nmesh: {simulated_devices: 4}",
            "data.batch_size=8 cannot be split into train.grad_accum_steps=3 microbatches over "
            "slice*data*expert=4; data.batch_size=12 would work.",
        ),
        (
            "data: {batch_schedule: [{from_step: 5, batch_size: 8}, "
            "{from_step: 5, batch_size: 9}]}",
            "data.batch_schedule has from_step=5 after 5; steps that increase would work.",
        ),
        (
            "data: {batch_schedule: [{from_step: 5}]}",
            "data.batch_schedule changes nothing from step 5; a batch_size, a sequence_length, or",
        ),
        (
            "data: {batch_schedule: [{from_step: 5, sequence_length: 600}]}",
            "sequence_length=600 from step 5, which does not divide the longest, "
            "data.sequence_length=1024; 512 would work.",
        ),
        (
            "data: {batch_schedule: [{from_step: 0, batch_size: 6, sequence_length: 256}]}",
            "has batches of 6 x 256 tokens from step 0, which are no whole rows of "
            "data.sequence_length=1024; batch_size=8 would work.",
        ),
        (
            "mesh: {simulated_devices: 8}\n"
            "data: {batch_schedule: [{from_step: 5, batch_size: 12}]}",
            "data.batch_schedule has batch_size=12 from step 5, which cannot be split over "
            "slice*data*expert*train.grad_accum_steps=8; 16 would work.",
        ),
        (
            "data: {datasets: [{weight: 1}]}",
            "run.yaml:2: data.datasets[0].path must be set.",
        ),
        (
            "data: {datasets: [{path: a}], mixture_schedule: [{weights: [1]}, {from_step: 9}]}",
            "data.mixture_schedule[0].from_step, data.mixture_schedule[1].weights must be set.",
        ),
        (
            "data: {packing: chop}",
            "data.packing must be 'concat_then_split' or 'best_fit', not \"chop\"",
        ),
    ],
)
def test_refused_with_place_key_and_remedy(write, text, sentence):
    write("run.yaml", "extends: grok-10m\n" + text)
    assert sentence in refusal("run.yaml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.steps", "override `train.steps` is not of the form section.key=value"),
        ("=5", "override `=5` is not of the form section.key=value, such as train.steps=50."),
        (".steps=5", "is not of the form"),
        ("train.steps=[", "override `train.steps=[`: not valid YAML"),
        ("train.stpes=5", "override `train.stpes=5`: there is no key train.stpes; did you mean"),
        ("moe.activation=gelo", "there is no key moe; did you mean model.moe?"),
        ("model.rope.theta=1", "no key model.rope; did you mean model.attention.rope?"),
        ("train.steps=", "train.steps must be an integer, not null; the default is 1000."),
        ("train.steps.more=5", "override `train.steps.more=5`: train.steps must be an integer"),
        ("model.num_heads=4", "did you mean model.attention.num_heads?"),
        ("train=5", "override `train=5`: train must be a mapping of keys"),
        ("extends=grok-1", "extends is a key of config files alone."),
        (
            "model.attention.num_kv_heads=5",
            "override `model.attention.num_kv_heads=5`: model.attention.num_kv_heads=5 does not",
        ),
    ],
)
def test_refused_override(override, sentence):
    assert sentence in refusal("grok-10m", override)


def test_what_is_missing_and_from_which_file(write):
    write(
        "run.yaml",
        "model: {vocab_size: 8, num_layers: 2, moe: {dim: 4}, attention: {num_heads: 4}}",
    )
    assert refusal("run.yaml") == (
        "run.yaml: model.embed_dim, model.attention.num_kv_heads, model.attention.head_dim must be "
        "set, or taken from a preset as in `extends: grok-1`."
    )
    write("empty.yaml", "")
    assert "empty.yaml: model must be set" in refusal("empty.yaml")
    write("list.yaml", "[1]")
    assert "list.yaml:1: a config must be a mapping" in refusal("list.yaml")


def test_a_misspelt_required_key_is_called_misspelt_not_missing(write):
    write("run.yaml", "model: {vocab_sise: 8}")
    assert "did you mean model.vocab_size?" in refusal("run.yaml")


def test_a_missing_file_names_the_presets(write):
    sentence = refusal("nope.yaml")
    assert "there is no config file nope.yaml" in sentence
    assert "grok-1, grok-100m" in sentence
    write("run.yaml", "folder: x\nextends: nope")
    assert "run.yaml:2: there is no config file nope; the presets are" in refusal("run.yaml")
    misspelt = "there is no config file decode-v6e-4x5; did you mean decode-v6e-4x4?"
    assert refusal("decode-v6e-4x5") == misspelt
    write("run.yaml", "extends: [a, b]")
    assert "run.yaml:1: extends must name one file or preset" in refusal("run.yaml")


def test_a_folder_or_a_binary_file_is_no_config(write, tmp_path):
    assert "is a folder without a config.yaml" in refusal(tmp_path)
    Path("run.yaml").write_bytes(b"a: \xff")
    assert "run.yaml cannot be read as UTF-8 text" in refusal("run.yaml")


def test_the_config_of_a_run_goes_on_with_it_from_any_folder(write, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    write("run.yaml", "extends: grok-10m\nfolder: runs/mine\ndata: {train: [a.txt]}\n")
    config = with_absolute_paths(load_config("run.yaml"))
    assert config.data.train == (str(tmp_path / "a.txt"),)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "run.json").write_text("{}")
    monkeypatch.chdir("/")
    assert load_config(run / "config.yaml") == config
    # A run that was moved, or is seen under another path, is where its config is.
    moved = run.rename(tmp_path / "moved")
    assert load_config(moved / "config.yaml").folder == str(moved)
    assert load_config(moved) == load_config(moved / "config.yaml")
    assert load_config(moved / "config.yaml", ["folder=other"]).folder == "other"
    (moved / "run.json").unlink()
    assert load_config(moved / "config.yaml").folder == config.folder


def test_a_run_without_a_folder_gets_a_new_one(write):
    assert load_config("grok-10m").folder == ""
    folder = new_folder("configs/my.run.yaml")
    assert re.fullmatch(r"runs/my\.run-\d{8}-\d{6}", folder)
    for _ in range(2):
        Path(new_folder("grok-10m")).mkdir(parents=True)
    assert len(list(Path("runs").iterdir())) == 2  # in the same second, too


def test_a_cycle_of_extends(write):
    write("a.yaml", "extends: b.yaml")
    write("b.yaml", "folder: x\nextends: a.yaml")
    assert "b.yaml:2: extends a.yaml leads back to itself" in refusal("a.yaml")


def test_an_error_in_an_extended_file_names_that_file(write):
    write("base.yaml", "extends: grok-10m\ntrain:\n  steps: ten")
    write("run.yaml", "extends: base.yaml")
    assert refusal("run.yaml").startswith("base.yaml:3: train.steps")
    assert load_config("run.yaml", ["train.steps=500"]).train.steps == 500


def test_a_broken_rule_points_at_the_users_own_setting_not_at_the_preset():
    assert refusal("grok-1", "data.sequence_length=9000") == (
        "override `data.sequence_length=9000`: data.sequence_length=9000 is longer than "
        "model.context_length=8192; data.sequence_length=8192 would work."
    )


def test_stored_data_is_checked_likewise():
    data = to_dict(load_config("grok-10m"))
    data["train"]["stpes"] = 5
    with pytest.raises(ConfigError, match=r"^ckpt/7: there is no key train.stpes; did you mean"):
        from_dict(data, source="ckpt/7")
    with pytest.raises(ConfigError, match="stored config is not plain data"):
        from_dict({"model": object()})


def test_a_block_without_any_feed_forward_part_is_refused():
    with pytest.raises(ConfigError, match=r"model\.mlp and model\.moe are both null.*would work"):
        load_config("grok-10m", ["model.moe=null"])


def test_a_balance_loss_without_experts_is_refused():
    dense = ["model.moe=null", "model.mlp.dim=256"]
    assert load_config("grok-10m", [*dense, "train.router_balance_loss=0"]).model.moe is None
    with pytest.raises(
        ConfigError, match=r"router_balance_loss=0\.1 .*model\.moe is null.*=0 would"
    ):
        load_config("grok-10m", [*dense, "train.router_balance_loss=0.1"])


# ---- presets


# As published, and as computed from the released files' shapes.
RELEASES = {
    "grok-1": 315_684_820_992,
    "grok-2": 269_515_497_472,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
}


def test_every_preset_of_a_model_is_of_the_ladder_or_a_release():
    models = {name for name, file in presets().items() if file.parent.name == "models"}
    assert models == {*LADDER, *RELEASES}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_has_its_parameters(name):
    assert num_parameters(load_config(name).model) == RELEASES[name]


@pytest.mark.parametrize("name", [*LADDER, *RELEASES])
def test_a_preset_loads_and_its_head_comment_counts_right(name):
    model = load_config(name).model
    head = presets()[name].read_text().split("\nmodel:")[0]
    counts = re.search(r"^# ([\d,]+) parameters, ([\d,]+) active per token\.$", head, re.M)
    assert [int(count.replace(",", "")) for count in counts.groups()] == [
        num_parameters(model),
        num_active_parameters(model),
    ]
    assert all(line.startswith("#") for line in head.strip().splitlines())


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_is_named_by_its_parameters_and_splits_eight_ways(name):
    model = load_config(name).model
    size = int(name[5:-1]) * {"m": 10**6, "b": 10**9}[name[-1]]
    assert abs(num_parameters(model) / size - 1) < 0.1
    assert (model.moe.num_experts, model.moe.num_selected) == (8, 2)
    assert model.moe.dim == -(-(8 * model.embed_dim * 2 // 3) // 8) * 8  # the release's rule
    for tensor in (1, 2, 4, 8):
        for expert in {1, 2, 16 // tensor} - {16}:
            fit_mesh(MeshConfig(data=1, expert=expert, tensor=tensor), expert * tensor, model)


def test_grok_1_is_the_release():
    model = load_config("grok-1").model
    assert num_parameters(model) == 315_684_820_992
    assert num_active_parameters(model) == 83_756_587_008
    assert model == ModelConfig(
        vocab_size=131072,
        num_layers=64,
        embed_dim=6144,
        moe=MoEConfig(dim=32768, num_experts=8, num_selected=2),
        attention=AttentionConfig(
            num_heads=48,
            num_kv_heads=8,
            head_dim=128,
            logit_scale=0.08838834764831845,
            logit_softcap=30.0,
            rope=RopeConfig(theta=10000.0),
        ),
        context_length=8192,
        embedding_multiplier=78.38367176906169,
        logit_multiplier=0.5773502691896257,
    )


def test_multipliers_follow_from_the_widths():
    model = model_config(MODEL)
    assert model.embedding_multiplier == 8.0
    assert model.attention.logit_scale == pytest.approx(8**-0.5)


# ---- meshes


def proposed(sentence):
    """Sizes of the mesh that a refusal says would work."""
    found = re.search(
        r"mesh slice=(\d+) x data=(\d+) x expert=(\d+) x tensor=(\d+) would work\.$", sentence
    )
    return dict(zip(MESH_AXES, map(int, found.groups()), strict=True))


def test_a_mesh_takes_the_devices_that_remain():
    assert resolve_mesh(MeshConfig(tensor=4), 8) == {
        "slice": 1,
        "data": 2,
        "expert": 1,
        "tensor": 4,
    }


def test_a_mesh_that_does_not_multiply_to_the_devices():
    with pytest.raises(ConfigError) as caught:
        resolve_mesh(MeshConfig(data=1, expert=8, tensor=2), 8)
    assert str(caught.value).startswith(
        "mesh slice=1 x data=1 x expert=8 x tensor=2 needs 16 devices, and there are 8; "
    )
    with pytest.raises(ConfigError, match="needs a multiple of 3 devices, and there are 8"):
        resolve_mesh(MeshConfig(tensor=3), 8)


def test_sizes_that_are_none():
    with pytest.raises(ConfigError, match=r"mesh.tensor=0 is no number .* mesh.tensor=1 would"):
        resolve_mesh(MeshConfig(tensor=0), 8)
    with pytest.raises(ConfigError, match=r"mesh.data and mesh.tensor are both -1"):
        resolve_mesh(MeshConfig(tensor=-1), 8)


@pytest.mark.parametrize(
    ("changes", "sizes", "sentence"),
    [
        ({}, (1, 1, 3, 1), "model.moe.dim=176 cannot be split over mesh.expert*mesh.tensor=3"),
        ({}, (1, 1, 1, 16), "model.attention.num_heads=8 cannot be split over mesh.tensor=16"),
        (
            {"moe.dim": 100},
            (1, 1, 2, 4),
            "model.moe.dim=100 cannot be split over mesh.expert*mesh.tensor=8",
        ),
        (
            {"vocab_size": 97},
            (1, 1, 1, 2),
            "model.vocab_size=97 cannot be split over mesh.tensor=2",
        ),
        ({}, (1, 3, 2, 1), "model.embed_dim=64 cannot be split over mesh.data*mesh.expert=6"),
        (
            {"attention.num_heads": 12, "moe.dim": 96},
            (1, 1, 1, 6),
            "model.attention.num_kv_heads=4 can be neither split nor repeated over mesh.tensor=6",
        ),
    ],
)
def test_a_mesh_that_the_model_does_not_fit(changes, sizes, sentence):
    model = model_config(MODEL | changes)
    with pytest.raises(ConfigError) as caught:
        fit_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))), math.prod(sizes), model)
    assert str(caught.value).startswith(sentence + "; mesh slice=")


def test_a_batch_that_cannot_be_split():
    run = RunConfig(model=model_config(MODEL), data=DataConfig(batch_size=12))
    with pytest.raises(ConfigError, match=r"data.batch_size=12 .* data.batch_size=16 would work"):
        check_fits(run, 8)


def test_simulated_devices_are_checked_when_the_config_is_printed():
    overrides = ["mesh.tensor=7", "mesh.simulated_devices=7"]
    result = CliRunner().invoke(main, ["config", "grok-1", *overrides])
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "error: model.attention.num_heads=48 cannot be split over mesh.tensor=7; mesh "
    )
    assert "there are 8" in refusal("grok-10m", "mesh.simulated_devices=8", "mesh.expert=3")


def test_every_axis_that_a_mesh_splits_has_a_key_in_refusals():
    model = model_config(MODEL)
    axes = {axis for spec in param_specs(model).values() for axis in spec.axes if axis}
    assert {axis for axis in axes if mesh_axes(STORED_AS.get(axis, axis))} == set(mesh_fit.KEYS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention.num_heads": 48, "attention.num_kv_heads": 8},
        {"vocab_size": 97, "moe.dim": 100},
    ],
)
def test_what_a_refusal_proposes_really_fits(changes):
    model = model_config(MODEL | changes)
    refused = 0
    for devices in (1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 30, 64, 256):
        for slices, data, expert, tensor in (
            *((1, -1, e, t) for e in (1, 2, 3, 8, 16) for t in (1, 2, 5, 6, 7, 8, 16, 48)),
            *((2, d, 1, t) for d in (1, 4, 64) for t in (1, 4, 12, -1)),
            *((-1, 3, e, 1) for e in (1, 2, 7)),
        ):
            mesh = MeshConfig(slice=slices, data=data, expert=expert, tensor=tensor)
            run = RunConfig(model=model, mesh=mesh, data=DataConfig(batch_size=11))
            sentence = ""
            try:
                check_fits(run, devices)
            except ConfigError as error:
                sentence = str(error)
            if "; mesh " in sentence:
                sizes = proposed(sentence)
                refused += 1
            else:
                sizes = resolve_mesh(mesh, devices)
            assert math.prod(sizes.values()) == devices
            assert fit_mesh(MeshConfig(**sizes), devices, model) == sizes
            rows = sizes["slice"] * sizes["data"] * sizes["expert"]
            batch = re.search(r"data.batch_size=(\d+) would work", sentence)
            if batch:
                assert int(batch[1]) % rows == 0
                assert int(batch[1]) >= 11
    assert refused > 100


def test_a_proposal_keeps_what_it_can_of_the_wish():
    with pytest.raises(ConfigError) as caught:
        resolve_mesh(MeshConfig(slice=2, data=1, expert=2, tensor=4), 32)
    assert proposed(str(caught.value)) == {"slice": 2, "data": 2, "expert": 2, "tensor": 4}


@pytest.mark.parametrize(
    "number", ["9" * 20, "-" + "9" * 20, "0x" + "f" * 100_000, "1" + "0" * 5000, "0o" + "7" * 999]
)
def test_integers_that_are_too_large_are_refused_in_a_sentence(tmp_path, number):
    file = tmp_path / "run.yaml"
    file.write_text(f"extends: quickstart\ntrain: {{steps: {number}}}\n")
    for override in ([], [f"data.batch_schedule=[{{from_step: {number}}}]"]):
        with pytest.raises(
            ConfigError, match=r"must be|is larger than any|cannot be read"
        ) as error:
            load_config(file, override)
        assert len(str(error.value)) < 300


def test_a_tilde_is_the_home_folder_wherever_a_path_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "run.yaml"
    file.write_text("extends: quickstart\nfolder: ~/run\ndata: {tokenizer: ~/t.model}\n")
    config = load_config(file, ["data.train=[~/a.txt, ./~/b.txt, 'c ~ [1].txt']"])
    assert (config.folder, config.data.tokenizer) == ("/home/me/run", "/home/me/t.model")
    assert config.data.train == ("/home/me/a.txt", "./~/b.txt", "c ~ [1].txt")
    job = {"weights": "~/w", "input": ["~/*.jsonl"], "output": "~/out"}
    batch = from_dict(job, "job", (), BatchConfig)
    assert (batch.weights, *batch.input, batch.output) == (
        *("/home/me/w", "/home/me/*.jsonl", "/home/me/out"),
    )
    with pytest.raises(ConfigError, match=r"~nobody-here/run is of no user's home; ./~nobody-here"):
        load_config(file, ["folder=~nobody-here/run"])
