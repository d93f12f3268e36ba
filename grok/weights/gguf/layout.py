"""A model as llama.cpp has it: which of its architectures can hold it, the names and shapes of the
tensors there, and the keys of the file's metadata."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from grok.config import ModelConfig
from grok.errors import ConfigError
from grok.model.params import param_specs
from grok.model.rope import rope_frequencies
from grok.weights.huggingface.adapters import adapter_for_export
from grok.weights.huggingface.adapters.adapter import Adapter, HuggingFaceTensor

# Our names, and theirs without the number of the block.
OUTSIDE = {
    "embed/table_VD": "token_embd.weight",
    "final_norm/scale_D": "output_norm.weight",
    "lm_head/table_VD": "output.weight",
}
IN_BLOCK = {
    "layers/pre_attn_norm/scale_D": "attn_norm.weight",
    "layers/attention/w_query_DNH": "attn_q.weight",
    "layers/attention/w_key_DKH": "attn_k.weight",
    "layers/attention/w_value_DKH": "attn_v.weight",
    "layers/attention/w_out_NHD": "attn_output.weight",
    "layers/post_attn_norm/scale_D": "attn_output_norm.weight",
    "layers/pre_ffn_norm/scale_D": "ffn_norm.weight",
    "layers/mlp/w_gate_DF": "ffn_gate.weight",
    "layers/mlp/w_up_DF": "ffn_up.weight",
    "layers/mlp/w_down_FD": "ffn_down.weight",
    "layers/moe/router_DE": "ffn_gate_inp.weight",
    "layers/moe/w_gate_EDF": "ffn_gate_exps.weight",
    "layers/moe/w_up_EDF": "ffn_up_exps.weight",
    "layers/moe/w_down_EFD": "ffn_down_exps.weight",
    "layers/post_ffn_norm/scale_D": "layer_output_norm.weight",
}
ROPE_FREQS = "rope_freqs.weight"
# By the name of the family's adapter.
ARCHITECTURES = {"grok-1": "grok", "llama": "llama", "mistral": "llama", "mixtral": "llama"}
# Architectures whose rotary embedding turns neighbours, where ours turns halves of a head.
TURNS_NEIGHBOURS = ("llama",)


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor there: `parts` are our matrices in it, one for each expert or a single one; `shape`
    is [out, in], of experts [experts, out, in]. A `small` one is always float32. `order` is that of
    the places in a head. `values` are those of a tensor that is none of our weights."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[HuggingFaceTensor, ...]
    small: bool
    order: np.ndarray | None = None
    values: np.ndarray | None = None


def architecture(config: ModelConfig, family: str | None = None) -> tuple[Adapter, str]:
    """The family that holds the model, and llama.cpp's architecture for it. Raises ConfigError,
    with the key, for a model that llama.cpp computes in another way or not at all."""
    adapter = adapter_for_export(config, family)
    if adapter.name not in ARCHITECTURES:
        raise ConfigError(
            f"llama.cpp has no {adapter.family} as it was released: it makes the weights of the "
            "chosen experts sum to 1 beside the dense MLP, and has no temperature by position; "
            "`grok export hf` writes it for sglang."
        )
    name = ARCHITECTURES[adapter.name]
    a = config.attention
    if name == "grok" and a.num_heads * a.head_dim != config.embed_dim:
        raise ConfigError(
            f"model.attention.head_dim={a.head_dim} has no place in llama.cpp's form of Grok-1, "
            f"whose {a.num_heads} heads take model.embed_dim={config.embed_dim} together; "
            "`grok export hf` writes any width."
        )
    return adapter, name


def stated_context(config: ModelConfig) -> int:
    """The context length that a file states: llama.cpp has no sliding window in these
    architectures, and up to its length there is none to see."""
    return min(config.context_length, config.attention.window or config.context_length)


def metadata(config: ModelConfig, arch: str) -> dict[str, Any]:
    """Sizes and factors under their keys without the architecture's prefix; integers are unsigned
    numbers of 32 bits there, floats have 32 bits."""
    a, width = config.attention, config.moe or config.mlp
    assert width is not None
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": stated_context(config),
        "embedding_length": config.embed_dim,
        "feed_forward_length": width.dim,
        "attention.head_count": a.num_heads,
        "attention.head_count_kv": a.num_kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm.eps),
        "rope.dimension_count": a.head_dim,
        "rope.freq_base": float(a.rope.theta),
        "vocab_size": config.vocab_size,
    }
    if config.moe is not None:
        values["expert_count"] = config.moe.num_experts
        values["expert_used_count"] = config.moe.num_selected
    if arch == "grok":
        values |= {
            "expert_feed_forward_length": width.dim,
            "embedding_scale": float(config.embedding_multiplier),
            "logit_scale": float(config.logit_multiplier),
            "attention.output_scale": float(a.logit_scale),
            "attn_logit_softcapping": float(a.logit_softcap or 0),
        }
    return values


def tensors(config: ModelConfig, arch: str) -> Iterator[GGUFTensor]:
    """All tensors in the order of the file; a tied output layer is the token table there, too."""
    specs = param_specs(config)
    yield _tensor(config, arch, "embed/table_VD", OUTSIDE["embed/table_VD"], ())
    if config.attention.rope.scaling is not None:
        divisors = rope_divisors(config)
        yield GGUFTensor(ROPE_FREQS, divisors.shape, (), small=True, values=divisors)
    for layer in range(config.num_layers):
        for name, theirs in IN_BLOCK.items():
            if name in specs:
                yield _tensor(config, arch, name, f"blk.{layer}.{theirs}", (layer,))
    for name in ("final_norm/scale_D", "lm_head/table_VD"):
        if name in specs:
            yield _tensor(config, arch, name, OUTSIDE[name], ())


def _tensor(
    config: ModelConfig, arch: str, name: str, theirs: str, lead: tuple[int, ...]
) -> GGUFTensor:
    param = param_specs(config)[name]
    leads = [lead]
    if param.is_per_expert:
        leads = [(*lead, expert) for expert in range(param.shape[1])]
    parts = tuple(HuggingFaceTensor(theirs, param, one) for one in leads)
    shape = (len(parts), *parts[0].shape) if param.is_per_expert else parts[0].shape
    order = None
    if arch in TURNS_NEIGHBOURS and param.short_name in ("query", "key"):
        # Place i of the first half and of the second become neighbours.
        order = np.arange(param.shape[-1]).reshape(2, -1).T.reshape(-1)
    return GGUFTensor(theirs, shape, parts, param.use in ("norm", "router"), order)


def rope_divisors(config: ModelConfig) -> np.ndarray:
    """Divisors that make the frequencies of a scaled rotary embedding of plain ones in llama.cpp,
    float32 (head_dim/2,)."""
    rope, head_dim = config.attention.rope, config.attention.head_dim
    plain = dataclasses.replace(rope, scaling=None)
    return np.asarray(rope_frequencies(head_dim, plain) / rope_frequencies(head_dim, rope))
