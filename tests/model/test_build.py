"""A model from named arrays: values, types, placement, refusals."""

import jax
import numpy as np
import pytest

import grok
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.errors import CheckpointError, ConfigError
from grok.model.build import from_arrays, to_arrays
from grok.model.decoder import Decoder

CONFIG = ModelConfig(
    vocab_size=32,
    num_layers=2,
    embed_dim=16,
    moe=MoEConfig(dim=24),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    param_dtype="bfloat16",
)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Random float32 arrays of the names and shapes that CONFIG wants."""
    wanted = to_arrays(jax.eval_shape(lambda: Decoder(CONFIG, jax.random.key(0))))
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(w.shape, np.float32) for name, w in wanted.items()}


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 2, 4)])
def test_arrays_come_back_in_the_type_of_the_parameters(arrays, sizes):
    model = from_arrays(CONFIG, arrays, sizes and grok.make_mesh(*sizes))
    assert model.config == CONFIG
    back = to_arrays(model)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == jax.numpy.bfloat16
        np.testing.assert_array_equal(back[name], array.astype(back[name].dtype))
        assert len(back[name].sharding.device_set) == (8 if sizes else 1)


def test_a_device_reads_only_its_own_part(arrays):
    parts = []

    class Spy(np.ndarray):
        def __getitem__(self, index):
            part = np.asarray(self)[index]
            parts.append(part.size)
            return part

    name = "layers/moe/w_gate_EDF"
    from_arrays(CONFIG, arrays | {name: arrays[name].view(Spy)}, grok.make_mesh(2, 2, 2))
    assert set(parts) == {arrays[name].size // 8}


def test_a_missing_tensor_is_refused(arrays):
    rest = {name: array for name, array in arrays.items() if name != "embed/table_VD"}
    with pytest.raises(CheckpointError, match=r"embed/table_VD is missing; .* \(32, 16\)"):
        from_arrays(CONFIG, rest)


def test_a_stranger_is_refused(arrays):
    with pytest.raises(CheckpointError, match=r"lm_head with shape \(2, 3\) is no parameter"):
        from_arrays(CONFIG, arrays | {"lm_head": np.zeros((2, 3), np.float32)})


def test_another_shape_is_refused_with_both(arrays):
    with pytest.raises(CheckpointError, match=r"final_norm/scale_D has shape \(8,\); .* \(16,\)"):
        from_arrays(CONFIG, arrays | {"final_norm/scale_D": np.ones(8, np.float32)})


def test_a_mesh_that_the_model_does_not_fit_is_refused(arrays):
    with pytest.raises(ConfigError, match=r"model.attention.num_heads=4 .* mesh.tensor=8"):
        from_arrays(CONFIG, arrays, grok.make_mesh(1, 1, 8))


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ConfigError, match=r"grok.make_mesh makes one"):
        from_arrays(CONFIG, {}, mesh)
