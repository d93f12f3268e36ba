"""The attention of a block: projections, rotary embedding, cache, and the operation itself.

Letters: L layers, B batch, T query length, S key length, D embed, N heads, K kv heads,
H head_dim.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from grok import hardware, sharding
from grok.config import GrokConfig
from grok.model.attend import PagedCache, Places
from grok.model.layers import normal, product, rotate
from grok.ops.attention import ragged
from grok.ops.attention.causal import attention
from grok.ops.attention.flash import flash_attention, supports
from grok.ops.attention.paged import paged_attention, write_pages


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding and soft-capped logits."""

    def __init__(self, key: jax.Array, config: GrokConfig):
        c = config
        L, D, N, K, H = c.num_layers, c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        kv, dtype = sharding.kv_axis(K), c.float_dtype
        q_embed, q_heads = sharding.attention_weight_axes("heads", N, c.param_dtype)
        kv_embed, kv_heads = sharding.attention_weight_axes(kv, K, c.param_dtype)
        q_axes = ("layers", q_embed, q_heads, None)
        kv_axes = ("layers", kv_embed, kv_heads, None)
        keys = jax.random.split(key, 4)
        self.config = c
        self.w_query_DNH = normal(keys[0], (L, D, N, H), q_axes, dtype, fan_in=D)
        self.w_key_DKH = normal(keys[1], (L, D, K, H), kv_axes, dtype, fan_in=D)
        self.w_value_DKH = normal(keys[2], (L, D, K, H), kv_axes, dtype, fan_in=D)
        o_axes = ("layers", q_heads, None, q_embed)
        self.w_out_NHD = normal(keys[3], (L, N, H, D), o_axes, dtype, fan_in=N * H)

    def __call__(self, x_BTD: jax.Array, segment_BT: jax.Array, positions_BT: jax.Array):
        """Attention of the rows over themselves, y_BTD; x and y are split as the stream is."""
        x_BTD = sharding.constrain(x_BTD, "batch", "length", None)
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, positions_BT)
        c = self.config
        kv = sharding.kv_axis(c.num_kv_heads)
        flash = hardware.platform() == "tpu" and supports(x_BTD.shape[1])

        def local(q, k, v, segment):
            if flash:
                k, v = self._own_kv_heads(q, k, v)
                factors = {"scale": c.attn_output_multiplier, "softcap": c.attn_logit_softcap}
                return flash_attention(q, k, v, segment, **factors)
            index = jnp.broadcast_to(jnp.arange(q.shape[1])[None, :], segment.shape)
            return self._attend(q, k, v, index, segment, segment)

        q_axes, kv_axes = ("batch", "length", "heads", None), ("batch", None, kv, None)
        in_axes = (q_axes, kv_axes, kv_axes, ("batch", None))
        form = sharding.shard_map(local, in_axes, q_axes, check_vma=not flash)
        o_BTNH = checkpoint_name(form(q_BTNH, k_BTKH, v_BTKH, segment_BT), "attention")
        return sharding.constrain(
            self._output(o_BTNH), *sharding.sequence_parallel_axes(x_BTD.shape[1])
        )

    def step(self, x_BTD: jax.Array, cache: PagedCache, places: Places, layer: jax.Array):
        """Attention over the cache and the new tokens, whose keys and values are put in it.

        Tokens are in U blocks of Q, as `places` says. Returns y_BTD and the cache.
        """
        Q = x_BTD.shape[1] // places.start_BU.shape[1]
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, places.positions(Q))
        kv = sharding.kv_axis(self.config.num_kv_heads)
        c, group = self.config, self.config.num_heads // self.config.num_kv_heads
        factors = (c.attn_output_multiplier, c.attn_logit_softcap)
        # With all kv heads and fewer query heads than share one, it is the same for all.
        fewer = c.num_heads // sharding.axis_size("heads") < group
        kernel = hardware.platform() == "tpu" and not fewer
        kernel = kernel and ragged.supports(cache.kv_LPSK2H, c.head_dim)

        def local(q, k, v, kv_pages, scales, table_BUM, start_BU, count_BU, layer):
            # Each device has the tokens of one group.
            new = jnp.stack([k, v], axis=3).reshape(-1, Q, *k.shape[2:3], 2, k.shape[3])
            table_UM, start_U = table_BUM[0], start_BU[0]
            shared = sharding.axis_index("heads") * q.shape[2] // group if fewer else None
            kv_pages, scales = write_pages(
                kv_pages, scales, layer, new, table_UM, start_U, count_BU[0]
            )
            q_UQNH, where = q.reshape(-1, Q, *q.shape[2:]), (layer, table_UM, start_U)
            if kernel:
                o_UQNH = ragged.ragged_attention(q_UQNH, kv_pages, *where, *factors)
            else:
                form = functools.partial(paged_attention, kv_head=shared)
                o_UQNH = form(q_UQNH, kv_pages, scales, *where, *factors)
            return o_UQNH.reshape(q.shape), kv_pages, scales

        q_axes, kv_axes = ("batch", "length", "heads", None), ("batch", None, kv, None)
        scale_axes = () if cache.scale_LPSK2 is None else ("layers", "batch", None, kv, None)
        cache_axes = ("layers", "batch", None, kv, None, None)
        rows = ("batch", None)
        form = sharding.shard_map(
            local,
            (q_axes, kv_axes, kv_axes, cache_axes, scale_axes, (*rows, None), rows, rows, ()),
            (q_axes, cache_axes, scale_axes),
            check_vma=not kernel,
        )
        o_BTNH, kv_pages, scales = form(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            cache.kv_LPSK2H,
            cache.scale_LPSK2,
            places.table_BUM,
            places.start_BU,
            places.count_BU,
            layer,
        )
        return self._output(o_BTNH), PagedCache(kv_pages, scales)

    def _project(self, x_BTD, positions_BT):
        kv = sharding.kv_axis(self.config.num_kv_heads)

        def project(subscripts, param, axis, heads):
            kept = (*sharding.attention_weight_axes(axis, heads, self.config.param_dtype), None)
            return product(subscripts, x_BTD, param, kept, ("batch", "length", axis, None))

        q_BTNH = project("btd,dnh->btnh", self.w_query_DNH, "heads", self.config.num_heads)
        k_BTKH = project("btd,dkh->btkh", self.w_key_DKH, kv, self.config.num_kv_heads)
        v_BTKH = project("btd,dkh->btkh", self.w_value_DKH, kv, self.config.num_kv_heads)
        theta = self.config.rope_theta
        return rotate(q_BTNH, positions_BT, theta), rotate(k_BTKH, positions_BT, theta), v_BTKH

    def _attend(self, q_BTNH, k_BSKH, v_BSKH, index_BT, segment_BT, segment_BS):
        """The operation on one device's heads."""
        c = self.config
        k_BSKH, v_BSKH = self._own_kv_heads(q_BTNH, k_BSKH, v_BSKH)
        return attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            index_BT,
            segment_BT,
            segment_BS,
            scale=c.attn_output_multiplier,
            softcap=c.attn_logit_softcap,
        )

    def _own_kv_heads(self, q_BTNH, k_BSKH, v_BSKH):
        """Keys and values of the query heads that this device has."""
        group, heads = self.config.num_heads // self.config.num_kv_heads, q_BTNH.shape[2]
        if heads == k_BSKH.shape[2] * group:
            return k_BSKH, v_BSKH
        # This device has all kv heads and fewer query heads than share one of them.
        first = sharding.axis_index("heads") * heads // group
        return (jax.lax.dynamic_slice_in_dim(a, first, 1, axis=2) for a in (k_BSKH, v_BSKH))

    def _output(self, o_BTNH):
        c = self.config
        embed, heads = sharding.attention_weight_axes("heads", c.num_heads, c.param_dtype)
        axes = ("batch", "length", None)
        return product("btnh,nhd->btd", o_BTNH, self.w_out_NHD, (heads, None, embed), axes)
