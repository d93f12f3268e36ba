"""Sizes of an engine's cache and programs, from the configs of its model and its options. Letters
as in `slot_state`."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from grok import hardware, sharding
from grok.config import EngineConfig, ModelConfig
from grok.config.sampling import MAX_LOGIT_BIAS
from grok.config.section import round_up
from grok.infer.page_pool import PageLayout
from grok.infer.slot_state import NUM_WORDS, DecodeInputs, PrefillInputs, SlotState
from grok.model.attend import PagedCache, init_cache

# Prompt tokens of a step on chips that are not known, and the fewest on others.
MIN_PREFILL_CHUNK_SIZE = 256


def prefill_chunk_size(config: ModelConfig, options: EngineConfig) -> int:
    """Prompt tokens of one step on each group of the ambient mesh: where the options leave it open,
    as many as the chip multiplies by a weight in the time of reading it (roofline, Williams et al.
    2009), so that a longer prompt reads no weight more often than it has to, and no step is much
    longer than a decode, which reads them all as well. An expert gets but a share of the tokens,
    those of all groups that share it."""
    if options.prefill_chunk_size:
        return options.prefill_chunk_size
    tokens = 0.0
    if (chip := hardware.chip_of(hardware.device_kind())) is not None:
        weight_bytes = jax.dtypes.itemsize_bits(jnp.dtype(config.mlp_dtype)) / 8
        rate = chip.flops_8bit.get(config.matmul_dtype, chip.flops)
        tokens = rate / chip.bandwidth * weight_bytes / 2
        if (moe := config.moe) is not None:
            per_token = sharding.axis_size("expert_group") * moe.num_selected / moe.num_experts
            tokens = max(tokens, tokens / per_token)
    tokens = max(MIN_PREFILL_CHUNK_SIZE, min(math.ceil(tokens), config.context_length))
    return round_up(tokens, options.page_size)


@dataclasses.dataclass(frozen=True)
class EngineShapes:
    """Sizes for one of `groups` groups of devices; totals of the options are rounded up to a
    multiple of the groups."""

    config: ModelConfig
    groups: int
    slots: int
    pages: int
    layout: PageLayout
    cache_dtype: str

    @classmethod
    def of(cls, config: ModelConfig, options: EngineConfig) -> "EngineShapes":
        """The sizes on the ambient mesh."""
        size, groups = options.page_size, sharding.axis_size("batch")
        slots = -(-options.max_num_seqs // groups)
        chunks = prefill_chunk_size(config, options) // size
        layout = PageLayout(size, chunks, config.attention.window)
        max_pages = layout.max_pages(config.context_length)
        pages = -(-options.num_pages // groups) or slots * max_pages
        dtype = config.compute_dtype if options.cache_dtype == "compute" else options.cache_dtype
        return cls(config, groups, slots, pages, layout, dtype)

    @property
    def page_size(self) -> int:
        """Tokens of a page, and of a chunk of a prefill."""
        return self.layout.page_size

    @property
    def table_length(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.config.context_length // self.page_size)

    def init_cache(self) -> PagedCache:
        """The empty cache of all groups."""
        pages = self.groups * self.pages
        return init_cache(self.config, pages, self.page_size, self.cache_dtype)

    def init_slots(self, unused_W: jax.Array) -> SlotState:
        """Empty slots, in which the tokens of these bits are banned."""
        shape = self.groups, self.slots

        def zeros(*dims: int) -> jax.Array:
            array = jnp.zeros((*shape, *dims), jnp.int32)
            return sharding.constrain(array, "batch", *(None,) * (array.ndim - 1))

        banned_BSW = jnp.broadcast_to(unused_W, (*shape, *unused_W.shape))
        return SlotState(
            zeros(),
            zeros(self.table_length),
            zeros(NUM_WORDS),
            zeros(self.config.context_length),
            sharding.constrain(banned_BSW, "batch", None, None),
            zeros(2 * MAX_LOGIT_BIAS),
        )

    def abstract_decode(self) -> DecodeInputs:
        """The inputs of a decode: one token of each slot."""
        return DecodeInputs(jax.ShapeDtypeStruct((self.groups, self.slots, 5), jnp.int32))

    def abstract_prefill(self, chunks: int | None = None) -> PrefillInputs:
        """The inputs of a prefill of so many chunks, by default the most that a step takes."""
        words = 3 + NUM_WORDS + self.table_length + self.page_size
        shape = self.groups, chunks or self.layout.max_chunks, words
        return PrefillInputs(jax.ShapeDtypeStruct(shape, jnp.int32))
