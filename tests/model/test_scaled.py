"""Products in 8 bits, to train and to serve: losses, gradients and logits near those in floats,
alike on every mesh, and refused where they cannot be.

Letters: B rows, T tokens, V vocab.
"""

import dataclasses

import jax
import numpy as np
import pytest

import grok
from grok.config import LoraConfig, RunConfig, TrainConfig, check_trainable
from grok.errors import ConfigError
from grok.hardware import CHIPS
from grok.model.mesh_fit import check_matmul_dtype
from grok.ops import scaled
from grok.weights.cast import converted
from grok.weights.load import put_on_mesh
from tests.fixtures.models import replace_keys
from tests.fixtures.prove import in_suite
from tests.fixtures.random_weights import RandomSource
from tests.model.test_meshes import ARCHITECTURES, CONFIG, loss_and_gradients

# Every token goes to both experts: rounding sends none to another.
WIDE = replace_keys(
    CONFIG, {"moe.dim": 512, "moe.num_experts": 2, "embed_dim": 64, "num_layers": 1}
)
MODELS = {
    "experts": WIDE,
    "mlp": replace_keys(WIDE, ARCHITECTURES["mlp"] | {"mlp.dim": 512}),
    "mlp and experts": replace_keys(WIDE, ARCHITECTURES["mlp and experts"] | {"mlp.dim": 512}),
}
# Norm of the difference over the norm, of a gradient: the 6 to 7 bits of int8 and the 3 of float8,
# 2 in gradients, of each of some ten operands in a row.
ERRORS = {"int8": 0.05, "float8": 0.2}


@pytest.fixture(scope="module", autouse=True)
def groups_of_lanes():
    """Hidden rows with a scale for each 128 columns, so that a slice of 512 has whole groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaled, "MAX_GROUP_COLUMNS", 128)
        yield


def errors(actual, expected) -> dict[str, float]:
    """Norm of each gradient's difference, relative; and the loss's."""
    (losses, grads), (right_losses, right) = actual, expected
    found = {
        name: float(np.linalg.norm(grads[name] - g) / np.linalg.norm(g))
        for name, g in right.items()
    }
    return found | {"loss": abs(float(losses["loss"] / right_losses["loss"]) - 1)}


def worst(found: dict[str, float]) -> str:
    """The loss's error, and the largest of the others."""
    name = max(found, key=found.__getitem__)
    return f"loss {found['loss']:.1e}, gradient of {name} {found[name]:.1e}"


@pytest.mark.parametrize("matmul_dtype", in_suite(ERRORS, "int8"))
@pytest.mark.parametrize("name", in_suite(MODELS, "experts"))
def test_losses_and_gradients_are_near_those_in_floats(name, matmul_dtype):
    config = dataclasses.replace(MODELS[name], matmul_dtype=matmul_dtype)
    found = errors(loss_and_gradients(None, config), loss_and_gradients(None, MODELS[name]))
    print(f"\n{name}, {matmul_dtype}: {worst(found)}")
    assert found.pop("loss") < 0.005
    assert 0.001 < max(found.values()) < ERRORS[matmul_dtype]


@pytest.mark.parametrize("sizes", in_suite([(2, 2, 2, 1), (2, 1, 2, 2)], (2, 2, 2, 1)), ids=str)
@pytest.mark.parametrize("name", in_suite(MODELS, "experts"))
def test_a_mesh_rounds_as_one_device_does(name, sizes):
    """But for gradients of matrices, whose tiles and columns are of the tokens of a device."""
    config = dataclasses.replace(MODELS[name], matmul_dtype="int8")
    found = errors(loss_and_gradients(sizes, config), loss_and_gradients(None, config))
    print(f"\n{name}, {sizes}: {worst(found)}")
    assert found.pop("loss") < 1e-4
    assert max(found.values()) < 0.05


def served_logits(name: str, dtype: str, matmul_dtype: str, sizes=None) -> np.ndarray:
    """logits_BTV of weights in int8 or int4."""
    config = dataclasses.replace(MODELS[name], matmul_dtype=matmul_dtype)
    weights = converted(RandomSource(config, dtype="float32"), dtype)
    model = put_on_mesh(weights, sizes and grok.make_mesh(*sizes))
    assert model.config.matmul_dtype == matmul_dtype
    return np.asarray(model(np.random.default_rng(0).integers(0, 96, (8, 16))))


@pytest.mark.parametrize("sizes", in_suite([None, (2, 2, 2, 1), (1, 2, 4, 1)], (2, 2, 2, 1)))
@pytest.mark.parametrize("dtype", in_suite(["int8", "int4", "int4_all"], "int4_all"))
@pytest.mark.parametrize("name", in_suite(MODELS, "mlp and experts"))
def test_weights_in_8_and_4_bits_are_served_in_int8(name, dtype, sizes):
    """As floats give, but for the rounding of activations; as one device gives, but for the order
    of sums."""
    one_device = served_logits(name, dtype, "int8")
    expected = one_device if sizes else served_logits(name, dtype, "compute")
    actual = served_logits(name, dtype, "int8", sizes)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    print(f"\n{name}, {dtype}, {sizes}: {error:.1e}")
    assert error < 1e-3 if sizes else 1e-3 < error < ERRORS["int8"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"param_dtype=int8; model.matmul_dtype=int8 would"):
        dataclasses.replace(CONFIG, param_dtype="int8", matmul_dtype="float8")
    model = dataclasses.replace(CONFIG, matmul_dtype="int8")
    run = RunConfig(model=model, lora=LoraConfig(rank=4), train=TrainConfig(init_from="weights"))
    with pytest.raises(ConfigError, match=r"lora.rank=4; model.matmul_dtype=compute would work"):
        check_trainable(run)
    with pytest.raises(ConfigError, match=r"to serve; param_dtype=int8 beside it would work"):
        grok.init(model, jax.random.key(0)).step(None, None, None)


@pytest.mark.parametrize(("chip", "right"), [("v4", "compute"), ("v6e", "int8"), ("7x", "float8")])
def test_chips_have_the_type_that_is_faster_there(chip, right):
    kind = CHIPS[chip].kinds[0]
    served = dataclasses.replace(CONFIG, param_dtype="int4", matmul_dtype="int8")
    if right == "int8":
        check_matmul_dtype(served, kind)
    else:
        with pytest.raises(ConfigError, match=rf"on {chip}; model.matmul_dtype=compute would"):
            check_matmul_dtype(served, kind)
    check_matmul_dtype(dataclasses.replace(CONFIG, matmul_dtype=right), kind)
    for dtype in {"int8", "float8"} - {right}:
        model = dataclasses.replace(CONFIG, matmul_dtype=dtype)
        with pytest.raises(ConfigError, match=rf"on {chip}; model.matmul_dtype={right} would"):
            check_matmul_dtype(model, kind)
        check_matmul_dtype(model, "cpu")
