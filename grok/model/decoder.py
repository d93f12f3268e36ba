"""Grok: token table -> scan over blocks -> final norm -> the same table.

Letters: B batch, T length, D embed, V vocab, E experts, C chosen experts, L layers. Parameters
of a block have a leading L axis; `jax.lax.scan` hands each layer its own slice.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from grok import hardware, sharding
from grok.config import GrokConfig, check_model_fits
from grok.errors import ConfigError
from grok.model.attend import PagedCache, Places
from grok.model.attention import Attention
from grok.model.layers import RMSNorm, TokenTable
from grok.model.moe import EXPERTS, MoE, RouterStats
from grok.ops.weights.int8 import QuantizedArray
from grok.ops.weights.layer_slice import LayerSlice

REMAT_POLICIES = {
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "experts": jax.checkpoint_policies.save_only_these_names("experts"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["stream", "experts"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """x += norm(attention(norm(x))); x += norm(moe(norm(x)))."""

    def __init__(self, key: jax.Array, config: GrokConfig):
        keys = jax.random.split(key, 2)
        shape = (config.num_layers, config.embed_dim)
        self.pre_attn_norm = RMSNorm(shape, config.float_dtype)
        self.attention = Attention(keys[0], config)
        self.post_attn_norm = RMSNorm(shape, config.float_dtype)
        self.pre_moe_norm = RMSNorm(shape, config.float_dtype)
        self.moe = MoE(keys[1], config)
        self.post_moe_norm = RMSNorm(shape, config.float_dtype)

    def __call__(self, x_BTD, segment_BT, positions_BT) -> tuple[jax.Array, RouterStats]:
        """The residual stream after this block, and the router's statistics."""
        x_BTD = checkpoint_name(x_BTD, "stream")
        a_BTD = self.attention(self.pre_attn_norm(x_BTD), segment_BT, positions_BT)
        x_BTD = x_BTD + self.post_attn_norm(a_BTD)
        m_BTD, stats = self.moe(self.pre_moe_norm(x_BTD), segment_BT > 0)
        m_BTD = checkpoint_name(m_BTD, "experts")
        return x_BTD + self.post_moe_norm(m_BTD), stats

    def step(self, x_BTD, cache: PagedCache, places: Places, real_BT, layer):
        """The same for new tokens that see what is in the cache: x_BTD, cache, expert_ids_BTC."""
        a_BTD, cache = self.attention.step(self.pre_attn_norm(x_BTD), cache, places, layer)
        x_BTD = x_BTD + self.post_attn_norm(a_BTD)
        m_BTD, expert_ids_BTC = self.moe.step(self.pre_moe_norm(x_BTD), real_BT)
        return x_BTD + self.post_moe_norm(m_BTD), cache, expert_ids_BTC


class Grok(nnx.Module):
    """The model. Build it with `grok.init`; call it with tokens to get logits."""

    def __init__(self, config: GrokConfig, key: jax.Array):
        keys = jax.random.split(key, 2)
        self.config = config
        self.embed = TokenTable(keys[0], config)
        self.layers = Block(keys[1], config)
        self.final_norm = RMSNorm((config.embed_dim,), config.float_dtype)

    def __call__(self, tokens_BT, segment_ids=None, positions=None) -> jax.Array:
        """Logits of the next token at every place, logits_BTV, float32.

        `segment_ids` (B, T): tokens see earlier tokens of their own segment only; 0 marks
        padding. Default: each row is one segment. `positions` (B, T): rotary positions, default
        0..T-1. B must be a multiple of the devices that the batch is split over.
        """
        return _logits(self, tokens_BT, segment_ids, positions)

    def hidden(self, tokens_BT, segment_ids=None, positions=None) -> tuple[jax.Array, RouterStats]:
        """x_BTD after the final norm, in the compute type, and router statistics of L layers."""
        with sharding.use_mesh_of(self.embed.table_VD[...]):
            inputs = _inputs(tokens_BT, segment_ids, positions)
            x_BTD, stats = sharding.without_trivial_mesh(Grok._hidden)(self, *inputs)
            return sharding.constrain(x_BTD, "batch", "length", None), stats

    def _hidden(self, tokens_BT, segment_BT, positions_BT):
        def block(x_BTD, xs):
            return self._layer(*xs)(x_BTD, segment_BT, positions_BT)

        if self.config.remat != "none":
            policy = REMAT_POLICIES[self.config.remat]
            # Inside scan nothing can be merged with the forward pass: the guard is not needed.
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        x_BTD = sharding.constrain(
            self._embed(tokens_BT), *sharding.sequence_parallel_axes(tokens_BT.shape[1])
        )
        x_BTD, stats = jax.lax.scan(block, x_BTD, self._per_layer())
        return self.final_norm(x_BTD), stats

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Logits of all tokens from x after the final norm, logits_BTV, float32."""
        with sharding.use_mesh_of(self.embed.table_VD[...]):
            logits_BTV = self.embed.unembed(x_BTD, self.config.compute_dtype)
            return logits_BTV * self.config.output_multiplier

    def step(
        self, tokens_BT, cache: PagedCache, places: Places
    ) -> tuple[jax.Array, PagedCache, jax.Array]:
        """Runs new tokens, of many sequences, against the cache: prefill and decode alike.

        Row b holds the tokens of one group of devices (there are as many rows as parts of the
        batch), in U blocks of Q = T/U tokens. Returns x_BTD after the final norm, for `unembed`,
        the cache with the new tokens in it, and the experts that tokens went to, expert_ids_LBTC.
        """
        with sharding.use_mesh_of(self.embed.table_VD[...]):
            tokens_BT = sharding.constrain(tokens_BT, "batch", "length")
            places = jax.tree.map(
                lambda a: sharding.constrain(a, "batch", *(None,) * (a.ndim - 1)), places
            )
            real_BT = places.real(tokens_BT.shape[1] // places.start_BU.shape[1])
            tpu = hardware.platform() == "tpu"

            def block(carry, xs):
                x_BTD, cache = carry
                layer = self._layer(*xs)
                x_BTD, cache, expert_ids_BTC = layer.step(x_BTD, cache, places, real_BT, xs[1])
                return (x_BTD, cache), expert_ids_BTC

            carry = (self._embed(tokens_BT), cache)
            each = self._per_layer(in_place=not tpu)
            (x_BTD, cache), expert_ids_LBTC = jax.lax.scan(block, carry, each)
            return self.final_norm(x_BTD), cache, expert_ids_LBTC

    def next_logits(self, x_BTD: jax.Array, count_BU) -> jax.Array:
        """Logits after the last real token of each block, logits_BUV, from what `step` returned."""
        with sharding.use_mesh_of(self.embed.table_VD[...]):
            B, U = count_BU.shape
            count_BU = sharding.constrain(count_BU, "batch", None)
            x_BUQD = x_BTD.reshape(B, U, -1, x_BTD.shape[-1])
            last_BUQ = jnp.arange(x_BUQD.shape[2])[None, None, :] == count_BU[:, :, None] - 1
            return self.unembed(jnp.where(last_BUQ[..., None], x_BUQD, 0).sum(2))

    def _per_layer(self, in_place: bool = False):
        """The inputs of a scan over the layers, for `_layer`: parameters, and the layer's index.

        With `in_place`, and for an int8 model, it is the index alone, so that a layer takes the
        experts that it needs from all layers in place; sliced by the scan, all its experts would
        be copied first.
        """
        numbers = jnp.arange(self.config.num_layers)
        return (None if in_place or self.config.param_dtype == "int8" else self.layers), numbers

    def _layer(self, layer: Block | None, number: jax.Array) -> Block:
        """A block with the parameters of one layer."""
        if layer is not None:
            return layer

        def one(path, param: nnx.Param) -> nnx.Variable:
            w = param.get_value()
            if isinstance(w, QuantizedArray):
                return param.replace(dataclasses.replace(w, layer=number))
            if path[-1].name in EXPERTS and isinstance(w, jax.Array):
                return param.replace(LayerSlice(w, number))
            index = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
            return param.replace(jax.tree.map(lambda a: index(a, number), w))

        def is_param(node) -> bool:
            return isinstance(node, nnx.Param)

        return jax.tree_util.tree_map_with_path(one, self.layers, is_leaf=is_param)

    def _embed(self, tokens_BT):
        x_BTD = self.embed.embed(tokens_BT, self.config.compute_dtype).astype(jnp.float32)
        return (x_BTD * self.config.embedding_multiplier).astype(self.config.compute_dtype)


@jax.jit
def _logits(model: Grok, tokens_BT, segment_ids, positions):
    return model.unembed(model.hidden(tokens_BT, segment_ids, positions)[0])


def _inputs(tokens_BT, segment_ids, positions):
    """Tokens, segments and positions as int32 (B, T), split over the batch."""
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    rows = sharding.axis_size("batch")
    if tokens_BT.shape[0] % rows:
        raise ValueError(
            f"a batch of {tokens_BT.shape[0]} rows cannot be split over the {rows} groups of "
            f"devices of this mesh; {-(-tokens_BT.shape[0] // rows) * rows} rows would work."
        )
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens_BT)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    arrays = (tokens_BT, jnp.asarray(segment_ids, jnp.int32), jnp.asarray(positions, jnp.int32))
    return tuple(sharding.constrain(a, "batch", "length") for a in arrays)


def quick_to_compile() -> dict[str, int]:
    """Options of `jax.jit` for a program that runs once and only draws and fills arrays.

    On CPU, LLVM would take several times as long to optimise it as it runs; no bit depends on it.
    """
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}


@functools.cache
def _init():
    return jax.jit(Grok, static_argnums=0, compiler_options=quick_to_compile())


def init(config: GrokConfig, key: jax.Array, mesh: Mesh | None = None) -> Grok:
    """A model with fresh parameters, each made on the devices of `mesh` that will hold it.

    The values depend on `key` alone, not on the mesh. Raises ConfigError when the model cannot be
    split over the mesh, or should be int8, which is made from trained floats only.
    """
    if config.param_dtype == "int8":
        raise ConfigError(
            "model.param_dtype=int8 is for weights that are loaded, and fresh ones are floats; "
            "model.param_dtype=float32 would work."
        )
    if mesh is None:
        return _init()(config, key)
    check_mesh(config, mesh)
    with jax.set_mesh(mesh):
        return _init()(config, key)


def check_mesh(config: GrokConfig, mesh: Mesh) -> None:
    """Refuse, as ConfigError, a mesh of other axes, of axes that JAX would split arrays over by
    itself, or one that the model cannot be split over."""
    if mesh.axis_names != sharding.MESH_AXES:
        raise ConfigError(
            f"the mesh has axes {mesh.axis_names} and the model needs {sharding.MESH_AXES}; "
            "grok.make_mesh makes one."
        )
    if not mesh.are_all_axes_explicit:
        raise ConfigError(
            "the mesh has axes of JAX's automatic kind and the model needs explicit ones; "
            "grok.make_mesh makes one."
        )
    check_model_fits(config, dict(mesh.shape))
