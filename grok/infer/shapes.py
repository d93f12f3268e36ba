"""Sizes of an engine's cache and programs, from the configs of its model and its options. Letters
as in `slot_state`."""

import dataclasses

import jax
import jax.numpy as jnp

from grok import sharding
from grok.config import EngineConfig, ModelConfig
from grok.infer.page_pool import PageLayout
from grok.infer.slot_state import NUM_WORDS, DecodeInputs, PrefillInputs, SlotState
from grok.model.attend import PagedCache, init_cache


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
        chunks = options.prefill_chunk_size // size
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
        )

    def abstract_decode(self) -> DecodeInputs:
        """The inputs of a decode: one token of each slot."""
        return DecodeInputs(jax.ShapeDtypeStruct((self.groups, self.slots, 5), jnp.int32))

    def abstract_prefill(self) -> PrefillInputs:
        """The inputs of a prefill: the most chunks that a step takes."""
        words = 3 + NUM_WORDS + self.table_length + self.page_size
        shape = self.groups, self.layout.max_chunks, words
        return PrefillInputs(jax.ShapeDtypeStruct(shape, jnp.int32))
