"""Cross-entropy in chunks against all logits at once.

Letters: R rows, D embed, V vocab.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok.ops.cross_entropy
import grok.train.loss
from grok.ops.cross_entropy import cross_entropy, cross_entropy_reference
from tests.model import test_meshes

R, D, V = 13, 8, 20  # a number of rows that no chunk divides


def value_and_gradients(cross_entropy_fn, dtype=jnp.float32, softcap=None):
    keys = jax.random.split(jax.random.key(0), 4)
    x, table = (
        jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, [(R, D), (V, D)], strict=False)
    )
    targets = jax.random.randint(keys[2], (R,), 0, V)
    factors = jax.random.normal(keys[3], (2, R))

    def loss(x, table):
        entropy_R, log_z_R = cross_entropy_fn(x, table, targets, 0.7, softcap)
        return jnp.sum(factors[0] * entropy_R + factors[1] * log_z_R**2), (entropy_R, log_z_R)

    return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, table))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(grok.ops.cross_entropy, "MAX_LOGITS", 4 * V)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2**-7)])
def test_values_and_gradients_equal_the_references(small_chunks, dtype, tolerance, softcap):
    actual = value_and_gradients(cross_entropy, dtype, softcap)
    expected = value_and_gradients(cross_entropy_reference, dtype, softcap)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        error = np.abs(np.float32(ours) - np.float32(theirs)).max()
        assert error <= tolerance * np.abs(np.float32(theirs)).max()


def test_a_mesh_has_the_losses_and_gradients_of_one_device(monkeypatch):
    """Rows split over data and expert, the vocabulary over tensor."""
    monkeypatch.setattr(grok.train.loss, "MAX_LOGITS", 0)
    monkeypatch.setattr(grok.ops.cross_entropy, "MAX_LOGITS", 8 * test_meshes.CONFIG.vocab_size)
    find = test_meshes.loss_and_gradients.__wrapped__
    (losses, ours), (right_losses, right) = find((2, 2, 2, 1)), test_meshes.loss_and_gradients(None)
    for name, expected in (right_losses | right).items():
        error = np.abs((losses | ours)[name] - expected).max() / np.abs(expected).max()
        assert error < test_meshes.TOLERANCE, name
