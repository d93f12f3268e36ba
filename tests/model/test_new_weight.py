"""A weight that one module declares is known everywhere, with no other edit."""

import jax
import numpy as np
import pytest

import grok
from grok.checkpoint.manager import MODEL, Checkpoints
from grok.config import LoraConfig, OptimizerConfig, RunConfig, TrainConfig
from grok.config.load import to_dict
from grok.errors import CheckpointError
from grok.model.attention import Attention
from grok.model.build import abstract, to_arrays
from grok.model.decoder import Decoder
from grok.model.flops import flops_per_token
from grok.model.lora import adapted
from grok.model.param_spec import ParamSpec
from grok.model.params import num_active_parameters, num_parameters, param_specs
from grok.optim.optimizer import make_optimizer
from grok.train.state import abstract_state
from grok.weights.huggingface.export import export_huggingface
from grok.weights.orbax.source import OrbaxSource
from tests.fixtures.models import model_config

NAME = "layers/attention/w_extra_DNH"
CONFIG = model_config(
    {
        "vocab_size": 32,
        "num_layers": 2,
        "embed_dim": 16,
        "attention.num_heads": 4,
        "attention.num_kv_heads": 2,
        "attention.head_dim": 8,
        "moe.dim": 24,
        "compute_dtype": "float32",
    }
)
SIZE = 2 * 16 * 4 * 8


@pytest.fixture
def extra_weight(monkeypatch):
    """Attention with one line more in its table of weights."""
    declared = Attention.param_specs

    def param_specs_with_one_more(config):
        spec = ParamSpec.matmul((16, 4, 8), ("embed", "heads", "head_dim"), 1, 2)
        return declared(config) | {"w_extra_DNH": spec}

    monkeypatch.setattr(Attention, "param_specs", staticmethod(param_specs_with_one_more))
    param_specs.cache_clear()
    # Programs that were traced without the weight.
    jax.clear_caches()
    yield
    param_specs.cache_clear()
    jax.clear_caches()


def test_a_weight_is_declared_once(extra_weight, tmp_path):
    before = {"all": num_parameters(CONFIG) - SIZE, "active": num_active_parameters(CONFIG) - SIZE}
    assert before["all"] > before["active"] > 0
    assert NAME in param_specs(CONFIG)
    # FLOPs: two forward and four backward for each of the token's parameters.
    specs = param_specs(CONFIG)
    without = sum(s.size for s in specs.values()) - specs[NAME].size
    assert num_parameters(CONFIG) == without + SIZE
    assert flops_per_token(CONFIG, 8) > 6 * SIZE

    mesh = grok.make_mesh(2, 2, 2)
    leaf = to_arrays(abstract(CONFIG, mesh))[NAME]
    assert leaf.shape == (2, 16, 4, 8)
    # Embed over data, heads over expert and tensor.
    assert leaf.sharding.shard_shape(leaf.shape) == (2, 8, 1, 8)
    int8 = to_arrays(abstract(CONFIG, mesh, {NAME: 1}))
    assert int8[f"{NAME}/values"].dtype == np.int8
    assert int8[f"{NAME}/scales"].shape == (2, 1, 4, 8)


def test_adapters_and_optimizers_know_it(extra_weight):
    lora = LoraConfig(rank=2, targets=("extra",))
    model = jax.eval_shape(lambda key: adapted(Decoder(CONFIG, key), lora, key), jax.random.key(0))
    assert to_arrays(model)[f"{NAME}/a"].shape == (2, 16, 2)
    assert to_arrays(model)[f"{NAME}/b"].shape == (2, 2, 4, 8)
    for name in ("adamw", "adafactor", "lion", "muon"):
        run = RunConfig(
            model=CONFIG,
            optimizer=OptimizerConfig(name=name, warmup_steps=1),
            train=TrainConfig(steps=4),
        )
        moments = abstract_state(run, make_optimizer(run), grok.make_mesh(2, 2, 2)).opt_state
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(moments)]
        assert any("w_extra_DNH" in path for path in paths), name


def test_checkpoints_hold_it_and_an_export_refuses_it(extra_weight, tmp_path):
    model = grok.init(CONFIG, jax.random.key(0))
    run = RunConfig(model=CONFIG)
    checkpoints = Checkpoints(str(tmp_path / "run" / "checkpoints"))
    meta = {"config": to_dict(run)}
    checkpoints.save(1, {MODEL: model}, meta, specs=param_specs(CONFIG))
    checkpoints.close()
    source = OrbaxSource(tmp_path / "run")
    stored = source.read(NAME, source.tensors[NAME].full_part)
    np.testing.assert_array_equal(stored, to_arrays(model)[NAME])
    with pytest.raises(CheckpointError, match=NAME):
        export_huggingface(source, tmp_path / "hf", "float32")
