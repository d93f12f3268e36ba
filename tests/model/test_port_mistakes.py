"""What ports of Grok-1 got wrong, each built here on purpose: the golden comparison must see it.

Letters: B rows, T tokens, E experts, C chosen experts, N heads, K kv heads, H head_dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grok.model.attend
import grok.model.attention
import grok.model.moe
import grok.ops.attention.causal
import grok.ops.moe.experts_xla
from grok.model.moe import MoE
from tests.model import golden

NAME = "pub_a"  # grouped queries
right_run, right_attention = grok.model.moe.run_on_group, grok.model.attend.attention


def renormalised(works, tokens, *args):
    """Gates divided by their sum."""
    x_BTD, topk_weights_BTC, expert_ids_BTC = tokens
    topk_weights_BTC /= topk_weights_BTC.sum(-1, keepdims=True)
    return right_run(works, (x_BTD, topk_weights_BTC, expert_ids_BTC), *args)


def softmax_after_top_k(works, tokens, *args):
    """The softmax over the chosen experts' logits only."""
    x_BTD, topk_weights_BTC, expert_ids_BTC = tokens
    # The logarithm of a probability is the logit less a constant, which a softmax ignores.
    topk_weights_BTC = jax.nn.softmax(jnp.log(topk_weights_BTC), axis=-1)
    return right_run(works, (x_BTD, topk_weights_BTC, expert_ids_BTC), *args)


def softcapped_router(self, x_BTD, axes):
    """Router logits capped at 30 as attention's are."""
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD, self.router_DE[...])
    return jax.nn.softmax(30 * jnp.tanh(logits_BTE / 30), axis=-1)


def silu(x, activation):
    """SiLU, as of Mixtral."""
    return jax.nn.silu(x)


def exact_gelu(x, activation):
    """GELU by the error function."""
    return jax.nn.gelu(x, approximate=False)


def hard_clamp(logits, cap):
    """Logits cut at the cap."""
    return jnp.clip(logits, -cap, cap)


def interleaved_rotary(x_BTNH, positions_BT, rope):
    """Rotary embedding that turns neighbours instead of halves."""
    H = x_BTNH.shape[-1]
    phase = (
        positions_BT.astype(jnp.float32)[:, :, None, None]
        * (rope.theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H))[None, None, None]
    )
    even, odd = x_BTNH[..., ::2], x_BTNH[..., 1::2]
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x_BTNH.shape)


def heads_dealt_out(q_BTNH, k_BSKH, v_BSKH, *args, **options):
    """Query head n uses kv head n % K, as if heads were dealt out instead of grouped."""
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]
    kv_head = np.arange(N) % K
    return right_attention(q_BTNH, k_BSKH[:, :, kv_head], v_BSKH[:, :, kv_head], *args, **options)


# What replaces what, where the mistake shows first, and by how many times the tolerance at least.
MISTAKES = {
    renormalised: (grok.model.moe, "run_on_group", "moe_exact", 1000),
    softmax_after_top_k: (grok.model.moe, "run_on_group", "moe_exact", 1000),
    softcapped_router: (MoE, "route", "router_probs_exact", 100),
    silu: (grok.ops.moe.experts_xla, "activate", "moe_exact", 1000),
    exact_gelu: (grok.ops.moe.experts_xla, "activate", "moe_exact", 10),
    hard_clamp: (grok.ops.attention.causal, "apply_softcap", "attention_exact", 1000),
    heads_dealt_out: (grok.model.attend, "attention", "attention_exact", 1000),
    interleaved_rotary: (grok.model.attention, "apply_rope", "attention_exact", 1000),
}


@functools.cache
def errors_with(mistake) -> dict[str, float]:
    """Errors of a model with the mistake, by array of `exact.npz`."""
    owner, attribute, _, _ = MISTAKES[mistake]
    tokens = golden.arrays(NAME)["tokens"]
    # A new function each time, for jax.jit not to reuse what it traced without the mistake.
    run = jax.jit(lambda *inputs: golden.trace(*inputs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, attribute, mistake)
        found = run(golden.model(NAME, "float32", on_mesh=False), tokens, tokens > 0)
    return {array: golden.relative_error(NAME, array, found[array]) for array in found}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(mistake):
    _, _, array, times = MISTAKES[mistake]
    excess = errors_with(mistake)[array] / golden.TOLERANCE[array]
    print(f"\n{mistake.__name__}: {excess:.0f} times the tolerance of {array}")
    assert excess > times


def test_renormalised_gates_hide_behind_the_norm_that_follows():
    """Why the block is compared before that norm: it cancels a factor common to the experts."""
    errors = errors_with(renormalised)
    assert errors["logits_exact"] < errors["moe_exact"] / 1000
