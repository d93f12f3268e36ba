"""The model's shape and arithmetic."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from grok.config.numbers import Count, Positive, largest_divisor
from grok.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrokConfig:
    """Shape and arithmetic of a Grok-1 model. Defaults are the release's where it has one value."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    vocab_size: Annotated[Count, Field(description="entries of the token table (V)")]
    num_layers: Annotated[Count, Field(description="blocks (L)")]
    embed_dim: Annotated[Count, Field(description="width of the residual stream (D)")]
    mlp_dim: Annotated[Count, Field(description="hidden width of one expert (F)")]
    num_heads: Annotated[Count, Field(description="query heads (N)")]
    num_kv_heads: Annotated[Count, Field(description="key/value heads (K); N/K queries share one")]
    head_dim: Annotated[Count, Field(description="width of one head (H); even, for rotary pairs")]
    num_experts: Annotated[Count, Field(description="experts of a block (E)")] = 8
    num_selected_experts: Annotated[
        Count, Field(description="experts that each token goes to (C)")
    ] = 2
    context_length: Annotated[Count, Field(description="longest sequence, in tokens")] = 8192
    embedding_multiplier: Annotated[
        Positive, Field(description="factor on the embedding; default sqrt(embed_dim)")
    ] = None  # type: ignore[assignment]  # filled in __post_init__
    output_multiplier: Annotated[Positive, Field(description="factor on the final logits")] = (
        0.5773502691896257
    )
    attn_output_multiplier: Annotated[
        Positive, Field(description="factor on attention logits; default 1/sqrt(head_dim)")
    ] = None  # type: ignore[assignment]  # filled in __post_init__
    attn_logit_softcap: Annotated[
        Positive, Field(description="c of c*tanh(x/c), applied to attention logits")
    ] = 30.0
    rope_theta: Annotated[Positive, Field(description="base of the rotary wavelengths")] = 10000.0
    param_dtype: Annotated[
        Literal["float32", "bfloat16", "int8"],
        Field(description="type that parameters are kept in; int8: matrices, to infer only"),
    ] = "float32"
    compute_dtype: Annotated[
        Literal["float32", "bfloat16"], Field(description="type of activations and products")
    ] = "bfloat16"
    remat: Annotated[
        Literal["none", "dots", "attention", "experts", "offload", "full"],
        Field(
            description="recompute in backward: nothing, all but matrix products, all but what "
            "attention gave, all but what the experts gave, the same with all that is kept in the "
            "hosts' memory, whole blocks"
        ),
    ] = "full"

    def __post_init__(self) -> None:
        if self.embedding_multiplier is None:
            object.__setattr__(self, "embedding_multiplier", math.sqrt(self.embed_dim))
        if self.attn_output_multiplier is None:
            object.__setattr__(self, "attn_output_multiplier", 1 / math.sqrt(self.head_dim))
        if self.num_heads % self.num_kv_heads:
            near = largest_divisor(self.num_heads, self.num_kv_heads)
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_heads={self.num_heads}; model.num_kv_heads={near} would work."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim={self.head_dim} is odd, and rotary embedding turns pairs; "
                f"model.head_dim={self.head_dim + 1} would work."
            )
        if self.num_selected_experts > self.num_experts:
            raise ConfigError(
                f"model.num_selected_experts={self.num_selected_experts} is more than "
                f"model.num_experts={self.num_experts}; "
                f"model.num_selected_experts={self.num_experts} would work."
            )

    @property
    def float_dtype(self) -> str:
        """Type of the parameters that are not int8, and of those that int8 ones are made from."""
        return "float32" if self.param_dtype == "int8" else self.param_dtype

    @property
    def keeps_experts(self) -> bool:
        """Whether what the experts gave is kept for the backward pass."""
        return self.remat in ("experts", "offload")

    def num_parameters(self) -> int:
        """All parameters of the model: table, blocks, final norm."""
        return self._count(self.num_experts)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: all but the experts it was not sent to."""
        return self._count(self.num_selected_experts)

    def _count(self, experts: int) -> int:
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        router = self.embed_dim * self.num_experts
        moe = 3 * experts * self.embed_dim * self.mlp_dim
        block = attention + router + moe + 4 * self.embed_dim
        return self.vocab_size * self.embed_dim + self.num_layers * block + self.embed_dim
