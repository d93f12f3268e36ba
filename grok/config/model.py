"""The model's shape and arithmetic, nested by module; what a model lacks is null."""

import dataclasses
import math
from typing import Annotated, Literal

from pydantic import Field

from grok.config.section import Count, Positive, Section, largest_divisor
from grok.errors import ConfigError, bad_value

QUANTIZED_DTYPES = ("int8", "int4", "int4_all")  # of matrices, with scales
# Keys that say how a model runs, and not what it computes.
HOW_IT_RUNS = ("param_dtype", "embedding_dtype", "compute_dtype", "matmul_dtype", "remat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig(Section):
    """Root-mean-square norms, and where a block has them."""

    eps: Annotated[Positive, "added to the mean square"] = 1e-5
    sandwich: Annotated[bool, "a norm behind attention and feed-forward, as well as before"] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig(Section):
    """Rotary wavelengths stretched for a longer context, by how often they turn in the original
    one."""

    factor: Annotated[
        Annotated[float, Field(ge=1, allow_inf_nan=False)],
        "stretch of the wavelengths that turn rarely",
    ]
    low_freq_factor: Annotated[
        Positive, "turns in original_context_length up to which the stretch is whole"
    ]
    high_freq_factor: Annotated[
        Positive, "turns in original_context_length from which there is none"
    ]
    original_context_length: Annotated[Count, "context of the training before the stretch"]

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            name = "model.attention.rope.scaling.low_freq_factor"
            problem = f"is not above {name}={self.low_freq_factor:g}"
            better = 4 * self.low_freq_factor
            key = "model.attention.rope.scaling.high_freq_factor"
            raise bad_value(key, self.high_freq_factor, problem, better)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig(Section):
    """Rotary position embedding."""

    theta: Annotated[Positive, "base of the rotary wavelengths"] = 10000.0
    scaling: Annotated[RopeScalingConfig | None, "stretch of the long wavelengths; null: none"] = (
        None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(Section):
    """Grouped-query attention."""

    num_heads: Annotated[Count, "query heads (N)"]
    num_kv_heads: Annotated[Count, "key/value heads (K); N/K queries share one"]
    head_dim: Annotated[Count, "width of one head (H); even, for rotary pairs"]
    logit_scale: Annotated[Positive, "factor on attention logits; default 1/sqrt(head_dim)"] = None  # type: ignore[assignment]  # filled in __post_init__
    logit_softcap: Annotated[Positive | None, "c of c*tanh(x/c) on the logits; null: none"] = 30.0
    temperature_length: Annotated[
        Annotated[int, Field(gt=1)] | None,
        "position from which the capped logits of a query at i grow, by log(i) / log(this); null: "
        "never",
    ] = None
    window: Annotated[
        Count | None, "keys that a query sees, its own among them; null: all before it"
    ] = None
    rope: Annotated[RopeConfig, "rotary position embedding"] = RopeConfig()

    def __post_init__(self) -> None:
        if self.logit_scale is None:
            object.__setattr__(self, "logit_scale", 1 / math.sqrt(self.head_dim))
        if self.num_heads % self.num_kv_heads:
            near = largest_divisor(self.num_heads, self.num_kv_heads)
            problem = f"does not divide model.attention.num_heads={self.num_heads}"
            raise bad_value("model.attention.num_kv_heads", self.num_kv_heads, problem, near)
        if self.head_dim % 2:
            problem = "is odd, and rotary embedding turns pairs"
            raise bad_value("model.attention.head_dim", self.head_dim, problem, self.head_dim + 1)


Activation = Annotated[
    Literal["gelu_tanh", "gelu", "silu"],
    "of the gate: GELU by its tanh approximation or the error function, or SiLU",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(Section):
    """The dense gated MLP of a block, which every token uses."""

    dim: Annotated[Count, "hidden width (F)"]
    activation: Activation = "silu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(Section):
    """The routed experts of a block: gated MLPs of which each token uses a few."""

    dim: Annotated[Count, "hidden width of one expert (F)"]
    num_experts: Annotated[Count, "experts of a block (E)"] = 8
    num_selected: Annotated[Count, "experts that each token goes to (C)"] = 2
    activation: Activation = "gelu_tanh"
    normalize: Annotated[bool, "weights of the selected experts are made to sum to one"] = False
    logit_softcap: Annotated[
        Positive | None, "c of c*tanh(x/c) on the router's logits; null: none"
    ] = None

    def __post_init__(self) -> None:
        if self.num_selected > self.num_experts:
            problem = f"is more than model.moe.num_experts={self.num_experts}"
            raise bad_value("model.moe.num_selected", self.num_selected, problem, self.num_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A decoder: its width and depth, one section for each module, and the types it runs in."""

    vocab_size: Annotated[Count, "entries of the token table (V)"]
    num_layers: Annotated[Count, "blocks (L)"]
    embed_dim: Annotated[Count, "width of the residual stream (D)"]
    context_length: Annotated[Count, "longest sequence, in tokens"] = 8192
    embedding_multiplier: Annotated[
        Positive, "factor on the embedding; default sqrt(embed_dim)"
    ] = None  # type: ignore[assignment]  # filled in __post_init__
    logit_multiplier: Annotated[Positive, "factor on the final logits"] = 0.5773502691896257
    logit_softcap: Annotated[
        Positive | None, "c of c*tanh(x/c) on the final logits, after the factor; null: none"
    ] = None
    tie_embeddings: Annotated[
        bool, "one table embeds tokens and scores them; false: one for each"
    ] = True
    norm: Annotated[NormConfig, "norms of blocks, and the final one"] = NormConfig()
    attention: Annotated[AttentionConfig, "attention of every block"]
    mlp: Annotated[
        MLPConfig | None, "dense MLP of every block; with experts too, (mlp + moe) / sqrt(2)"
    ] = None
    moe: Annotated[MoEConfig | None, "experts of every block; null: none"] = None
    param_dtype: Annotated[
        Literal["float32", "bfloat16", "int8", "int4", "int4_all"],
        "type of parameters; int8: matrices, to infer or below adapters; int4: those of MLP and "
        "experts, and attention's in int8; int4_all: attention's in int4 too",
    ] = "float32"
    embedding_dtype: Annotated[
        Literal["float", "int8"],
        "type of the token tables beside quantised matrices, to infer; int8: with a scale for each "
        "token; float: float32",
    ] = "float"
    compute_dtype: Annotated[Literal["float32", "bfloat16"], "type of activations"] = "bfloat16"
    matmul_dtype: Annotated[
        Literal["compute", "int8", "float8"],
        "type that attention's projections, MLP and experts are multiplied in: of float "
        "parameters to train, forward and backward; int8 of int8 and int4 ones to serve, but for "
        "attention's in int4; compute: compute_dtype",
    ] = "compute"
    remat: Annotated[
        Literal["none", "dots", "selective", "attention", "experts", "offload", "full"],
        "recompute in the backward pass: nothing; all but matrix products; the hidden layer of "
        "MLP and experts; all but attention's output; all but the experts' output; all but both, "
        "saved in host memory; everything in a block",
    ] = "full"

    def __post_init__(self) -> None:
        if self.embedding_multiplier is None:
            object.__setattr__(self, "embedding_multiplier", math.sqrt(self.embed_dim))
        if self.mlp is None and self.moe is None:
            raise ConfigError(
                "model.mlp and model.moe are both null, and a block needs one of them, or both; "
                f"model.mlp.dim={4 * self.embed_dim} or model.moe.dim={4 * self.embed_dim} would "
                "work."
            )
        if self.is_quantized and self.matmul_dtype == "float8":
            problem = f"is for parameters in floats, not model.param_dtype={self.param_dtype}"
            raise bad_value("model.matmul_dtype", self.matmul_dtype, problem, "int8")
        if self.embedding_dtype == "int8" and not self.is_quantized:
            raise ConfigError(
                "embedding_dtype=int8 is for token tables beside quantised matrices, not "
                f"param_dtype={self.param_dtype}; param_dtype=int8 beside it would work."
            )

    @property
    def float_dtype(self) -> str:
        """Type of parameters that are not quantised, and of those that quantised ones are made
        from."""
        return "float32" if self.is_quantized else self.param_dtype

    @property
    def mlp_dtype(self) -> str:
        """Type that the matrices of MLP and experts are stored in."""
        return self.param_dtype.removesuffix("_all")

    @property
    def is_quantized(self) -> bool:
        """True where matrices are int8 or int4."""
        return self.param_dtype in QUANTIZED_DTYPES

    @property
    def saves_experts(self) -> bool:
        """True where the backward pass finds the experts' output saved."""
        return self.remat in ("selective", "experts", "offload")
