"""The TPU form of attention, interpreted, against the plain reference.

Letters: B rows, T length, N heads, K kv heads, H head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok.ops.attention.causal import attention_reference
from grok.ops.attention.flash import flash_attention, supports

B, T, N, K, H = 1, 384, 4, 2, 128  # three blocks of a row
OPTIONS = {"scale": 0.3, "softcap": 5.0}  # logits of several units: the softcap matters

# Sums of at most 384 products and a softmax in two orders: some units of 2^-24 = 6e-8.
TOLERANCE = 5e-6


def make_inputs(
    N: int = N, K: int = K, H: int = H, T: int = T, dtype=jnp.float32
) -> tuple[jax.Array, ...]:
    """q, k, v, factors of the result, segments and positions: three documents, then padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (N, K, K, N)
    arrays = [jax.random.normal(k, (B, T, n, H), dtype) for k, n in zip(keys, heads, strict=True)]
    starts = jnp.asarray([0, 190, 230, 340])
    document_T = jnp.searchsorted(starts, jnp.arange(T), side="right") - 1
    positions_T = jnp.arange(T) - starts[document_T]
    segment_T = (document_T + 1) % 4
    return *arrays, segment_T[None], positions_T[None]


def reference(q, k, v, segment, positions_BT, **terms) -> jax.Array:
    index = jnp.arange(q.shape[1])[None, :]
    return attention_reference(q, k, v, index, segment, segment, positions_BT, **terms)


def flash(q, k, v, segment, positions_BT, **terms) -> jax.Array:
    return flash_attention(q, k, v, segment, positions_BT=positions_BT, interpret=True, **terms)


def value_and_gradients(attend, q, k, v, factor, *rows, **terms) -> dict[str, jax.Array]:
    """The result o, and the gradients of its sum weighted by `factor`, in float32."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def gradients(q, k, v):
        o = attend(q, k, v, *rows, **terms)
        return jnp.sum((o * factor).astype(jnp.float32)), o

    (dq, dk, dv), o = gradients(q, k, v)
    return {n: x.astype(jnp.float32) for n, x in {"o": o, "dq": dq, "dk": dk, "dv": dv}.items()}


def assert_equal(inputs, tolerance: float = TOLERANCE, **terms) -> None:
    actual = value_and_gradients(flash, *inputs, **terms)
    for name, expected in value_and_gradients(reference, *inputs, **terms).items():
        error = np.abs(actual[name] - expected).max() / np.abs(expected).max()
        assert error < tolerance, name


@pytest.mark.parametrize("temperature_length", [None, 12])
@pytest.mark.parametrize("window", [None, 2, 129, 1000])
def test_values_and_gradients_equal_the_references(window, temperature_length):
    assert_equal(make_inputs(), window=window, temperature_length=temperature_length, **OPTIONS)


@pytest.mark.parametrize("temperature_length", [None, 12])
def test_heads_that_are_no_whole_lanes(temperature_length):
    assert_equal(make_inputs(H=48), temperature_length=temperature_length, **OPTIONS)


@pytest.mark.parametrize(("heads", "softcap"), [((1, 1), None), ((8, 1), 5.0), ((6, 3), None)])
def test_a_temperature_with_other_groups_of_heads_and_without_a_cap(heads, softcap):
    """Blocks of 512 keys, and of 512 or 128 queries."""
    inputs = make_inputs(*heads, T=1024)
    assert_equal(inputs, scale=0.1, softcap=softcap, window=300, temperature_length=12)


def test_a_temperature_in_bfloat16():
    """Rounded to 8 bits: weights and their gradients before they are multiplied, and results."""
    inputs = make_inputs(dtype=jnp.bfloat16)
    assert_equal(inputs, tolerance=2**-6, temperature_length=12, **OPTIONS)


@pytest.mark.parametrize(("names", "forward_passes"), [(["attention"], 1), ([], 2)])
def test_a_remat_policy_that_keeps_attention_computes_it_once(names, forward_passes):
    q, k, v, _, *rows = make_inputs()
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    @functools.partial(jax.checkpoint, policy=policy)
    def loss(q):
        return jnp.sum(flash(jnp.sin(q), k, v, *rows, temperature_length=12, **OPTIONS))

    program = str(jax.make_jaxpr(jax.grad(loss))(q))
    assert program.count("name=forward_flash_attention") == forward_passes


def test_which_lengths_it_takes():
    assert supports(8192) and supports(128) and not supports(100)
