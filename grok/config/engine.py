"""The engine of inference: concurrent sequences, and their KV cache."""

import dataclasses
from typing import Annotated, Literal

from grok.config.section import Count, CountOrZero, Section, round_up
from grok.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """Concurrent sequences, and the paged KV cache; both totals over the mesh's batch groups."""

    max_num_seqs: Annotated[Count, "sequences that are decoded at a time"] = 8
    page_size: Annotated[Count, "tokens of a page of the cache"] = 32
    num_pages: Annotated[CountOrZero, "pages of the cache; 0: as max_num_seqs full rows need"] = 0
    prefill_chunk_size: Annotated[Count, "prompt tokens of one step, on each data replica"] = 256
    cache_dtype: Annotated[
        Literal["compute", "float32", "bfloat16", "int8"], "type of the cache; compute: model's"
    ] = "compute"

    def __post_init__(self) -> None:
        if self.prefill_chunk_size % self.page_size:
            near = round_up(self.prefill_chunk_size, self.page_size)
            raise ConfigError(
                f"engine.prefill_chunk_size={self.prefill_chunk_size} is no multiple of engine."
                f"page_size={self.page_size}; engine.prefill_chunk_size={near} would work."
            )
