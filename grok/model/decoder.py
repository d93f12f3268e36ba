"""The decoder: token table -> scan over blocks -> final norm -> the same table, or one more.

Letters: B batch, T length, D embed, V vocab, C chosen experts, L layers. Parameters of a block have
a leading L axis; `jax.lax.scan` hands each layer its own slice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from grok import hardware, sharding
from grok.config import ModelConfig, check_servable
from grok.model.attend import PackedRows, PagedAttend, PagedBatch, PagedCache
from grok.model.block import Block
from grok.model.embedding import Embedding
from grok.model.moe import RouterStats
from grok.model.norm import RMSNorm
from grok.model.param_spec import ParamSpec, map_params, name_of, prefixed, split_key
from grok.ops.cpu import few_rows
from grok.ops.softcap import apply_softcap
from grok.ops.weights.layer_slice import LayerSlice
from grok.ops.weights.weight import adapter, is_plain, take_layer

REMAT_POLICIES = {
    "selective": jax.checkpoint_policies.save_only_these_names(
        "projections", "attention", "experts"
    ),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "experts": jax.checkpoint_policies.save_only_these_names("experts"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["stream", "attention", "experts"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nnx.Module):
    """The model. Build it with `grok.init`; call it with tokens to get logits."""

    @staticmethod
    def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
        """Every weight of the model by name, layers stacked."""
        specs = prefixed("embed", Embedding.param_specs(config))
        if not config.tie_embeddings:
            specs = {name: dataclasses.replace(s, is_lookup=True) for name, s in specs.items()}
            specs |= prefixed("lm_head", Embedding.param_specs(config))
        specs |= prefixed("final_norm", RMSNorm.param_specs(config))
        for name, spec in prefixed("layers", Block.param_specs(config)).items():
            specs[name] = spec.stacked(config.num_layers)
        return {name: dataclasses.replace(spec, name=name) for name, spec in specs.items()}

    def __init__(self, config: ModelConfig, key: jax.Array | None):
        """With fresh parameters; without a key, their shapes on the ambient mesh."""
        keys = split_key(key, 3)
        self.config = config
        self.embed = Embedding(keys[0], config)
        self.layers = Block(keys[1], config)
        self.final_norm = RMSNorm(key, config)
        self.lm_head = None if config.tie_embeddings else Embedding(keys[2], config)

    @property
    def head(self) -> Embedding:
        """The table that scores tokens."""
        return self.lm_head or self.embed

    def __call__(self, tokens_BT, segment_ids=None, positions=None) -> jax.Array:
        """Returns logits of the next token at every place, logits_BTV, float32.

        `segment_ids` (B, T): tokens see earlier tokens of their own segment only; 0 marks
        padding. Default: each row is one segment. `positions` (B, T): rotary positions, default
        0..T-1. B must be a multiple of the devices that the batch is split over.
        """
        return _logits(self, tokens_BT, segment_ids, positions)

    def hidden(
        self, tokens_BT, segment_ids=None, positions=None, offset_BTD=None
    ) -> tuple[jax.Array, RouterStats | None]:
        """x_BTD after the final norm, in the compute type, and router statistics of L layers; None
        without experts. `offset_BTD` is added to the token embeddings, to be differentiated by."""
        with sharding.use_mesh_of(self.final_norm.scale_D[...]):
            inputs = (*_inputs(tokens_BT, segment_ids, positions), offset_BTD)
            x_BTD, stats = sharding.without_trivial_mesh(Decoder._hidden)(self, *inputs)
            return sharding.constrain(x_BTD, "batch", "length", None), stats

    def _hidden(self, tokens_BT, segment_ids_BT, positions_BT, offset_BTD):
        attend = PackedRows(segment_ids_BT, positions_BT)

        def block(x_BTD, layer):
            x_BTD, _, routing = self._layer(*layer)(x_BTD, attend, None)
            return x_BTD, routing and routing.stats(segment_ids_BT > 0)

        if self.config.remat != "none":
            policy = REMAT_POLICIES[self.config.remat]
            # Inside scan nothing can be merged with the forward pass: the guard is not needed.
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        x_BTD = self._embed(tokens_BT)
        if offset_BTD is not None:
            x_BTD += offset_BTD
        x_BTD = sharding.constrain(x_BTD, *attend.stream_axes(tokens_BT.shape[1]))
        x_BTD, stats = jax.lax.scan(block, x_BTD, self._scan_inputs(in_place=False))
        return self.final_norm(x_BTD), stats

    def unembed(self, x_BTD: jax.Array, is_serving: bool = False) -> jax.Array:
        """Logits of all tokens from x after the final norm, logits_BTV, float32; without gradients
        where the model `is_serving`."""
        with sharding.use_mesh_of(self.final_norm.scale_D[...]):
            logits_BTV = self.head.unembed(x_BTD, self.config.compute_dtype, is_serving)
            logits_BTV *= self.config.logit_multiplier
            return apply_softcap(logits_BTV, self.config.logit_softcap)

    def step(
        self, tokens_BT, cache: PagedCache, batch: PagedBatch
    ) -> tuple[jax.Array, PagedCache, jax.Array | None]:
        """Runs new tokens, of many sequences, against the cache: prefill and decode alike.

        Row b holds the tokens of one group of devices (there are as many rows as parts of the
        batch), in U blocks of Q = T/U tokens. Returns x_BTD after the final norm, for `unembed`,
        the cache with the new tokens in it, and the experts that tokens went to, expert_ids_LBTC;
        None without experts. Raises ConfigError as `check_servable` does.
        """
        check_servable(self.config)
        with sharding.use_mesh_of(self.final_norm.scale_D[...]):
            tokens_BT = sharding.constrain(tokens_BT, "batch", "length")
            batch = jax.tree.map(
                lambda a: sharding.constrain(a, "batch", *(None,) * (a.ndim - 1)), batch
            )
            Q = tokens_BT.shape[1] // batch.start_BU.shape[1]
            token_mask_BT = batch.token_mask(Q)

            def block(carry, layer):
                x_BTD, cache = carry
                pages = PagedAttend(cache, batch, layer[1], Q)
                x_BTD, pages, routing = self._layer(*layer)(x_BTD, pages, token_mask_BT)
                return (x_BTD, pages.cache), routing and routing.expert_ids_BTC

            carry = (few_rows.live_rows(self._embed(tokens_BT), token_mask_BT), cache)
            layers = self._scan_inputs(in_place=hardware.platform() != "tpu")
            (x_BTD, cache), expert_ids_LBTC = jax.lax.scan(block, carry, layers)
            return self.final_norm(x_BTD), cache, expert_ids_LBTC

    def next_logits(self, x_BTD: jax.Array, count_BU) -> jax.Array:
        """Logits after the last real token of each block, logits_BUV, from what `step` returned."""
        with sharding.use_mesh_of(self.final_norm.scale_D[...]):
            B, U = count_BU.shape
            count_BU = sharding.constrain(count_BU, "batch", None)
            x_BUQD = x_BTD.reshape(B, U, -1, x_BTD.shape[-1])
            last_BUQ = jnp.arange(x_BUQD.shape[2])[None, None, :] == count_BU[:, :, None] - 1
            return self.unembed(jnp.where(last_BUQ[..., None], x_BUQD, 0).sum(2), is_serving=True)

    def _scan_inputs(self, in_place: bool):
        """Inputs of `_layer` that a scan slices by layer: parameters, and the layer's number.

        With `in_place`, as for a quantised model, it is the number alone: a layer then reads its
        MLP and the experts that it needs where they lie; sliced by the scan all would be copied.
        Adapters are sliced, with what they adapt: else each layer would add to the gradient of all.
        """
        numbers = jnp.arange(self.config.num_layers)
        in_place = in_place or (self.config.is_quantized and not self._has_adapters())
        return (None if in_place else self.layers), numbers

    def _has_adapters(self) -> bool:
        params = jax.tree.leaves(self.layers, is_leaf=lambda node: isinstance(node, nnx.Param))
        return any(adapter(param.get_value()) is not None for param in params)

    def _layer(self, layer: Block | None, number: jax.Array) -> Block:
        """The block of one layer: `layer` itself, or the one of this number among all."""
        if layer is not None:
            return layer
        specs = Block.param_specs(self.config)

        def one(path, param: nnx.Param) -> nnx.Variable:
            w = param.get_value()
            spec = specs[name_of(path)]
            if is_plain(w) and (spec.is_wide or (spec.is_matmul and few_rows.is_usable())):
                return param.replace(LayerSlice(w, number))
            return param.replace(take_layer(w, number))

        return map_params(one, self.layers)

    def _embed(self, tokens_BT):
        x_BTD = self.embed.embed(tokens_BT, self.config.compute_dtype).astype(jnp.float32)
        return (x_BTD * self.config.embedding_multiplier).astype(self.config.compute_dtype)


@jax.jit
def _logits(model: Decoder, tokens_BT, segment_ids, positions):
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
