"""Grok-1 on Hugging Face: two repositories with the release's weights, each with its own names."""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from grok.config import ModelConfig
from grok.config.load import flatten, from_dict, nest, to_dict
from grok.errors import CheckpointError, ConfigError
from grok.weights.huggingface.adapters.adapter import Adapter

HPCAI = "hpcai-tech/grok-1"
KEYFAN = "keyfan/grok-1-hf"


# Our names, and those of each layout, in the order in which exports write them.
NAMES = (
    ("embed/table_VD", "model.embed_tokens.weight", "transformer.in_out_embed.weight"),
    ("layers/pre_attn_norm/scale_D", "pre_attn_norm.scale", "rms_norm.weight"),
    ("layers/attention/w_query_DNH", "attn.q_proj.weight", "multi_head_attention.query.weight"),
    ("layers/attention/w_key_DKH", "attn.k_proj.weight", "multi_head_attention.key.weight"),
    ("layers/attention/w_value_DKH", "attn.v_proj.weight", "multi_head_attention.value.weight"),
    ("layers/attention/w_out_NHD", "attn.o_proj.weight", "multi_head_attention.linear.weight"),
    ("layers/post_attn_norm/scale_D", "post_attn_norm.scale", "rms_norm_1.weight"),
    ("layers/pre_ffn_norm/scale_D", "pre_moe_norm.scale", "rms_norm_2.weight"),
    ("layers/moe/router_DE", "moe_block.gate.weight", "router.weight"),
    *(
        (f"layers/moe/{ours}", f"moe_block.experts.{{expert}}.{theirs}", f"moe.{{expert}}.{theirs}")
        for ours, theirs in (
            ("w_gate_EDF", "linear.weight"),
            ("w_up_EDF", "linear_v.weight"),
            ("w_down_EFD", "linear_1.weight"),
        )
    ),
    ("layers/post_ffn_norm/scale_D", "post_moe_norm.scale", "rms_norm_3.weight"),
    ("final_norm/scale_D", "model.norm.scale", "transformer.rms_norm.weight"),
)
LAYERS = {HPCAI: "model.layers.{layer}.", KEYFAN: "transformer.decoder_layer.{layer}."}
LAYOUTS = {
    layout: {
        names[0]: (prefix if names[0].startswith("layers/") else "") + names[column]
        for names in NAMES
    }
    for column, (layout, prefix) in enumerate(LAYERS.items(), 1)
}
# Names that only one layout has; every layer has some.
DISTINCTIVE_NAMES = {
    HPCAI: re.compile(r"model\.layers\.\d+\.(attn|moe_block)\."),
    KEYFAN: re.compile(r"transformer\.decoder_layer\.\d+\."),
}
CODE_FILES = ("configuration_grok1.py", "modeling_grok1.py", "modeling_grok1_outputs.py")

# Our keys to theirs; the first is the one that exports write, others are other repositories'.
SIZES = {
    # Required.
    "vocab_size": ("vocab_size",),
    "num_layers": ("num_hidden_layers",),
    "embed_dim": ("hidden_size",),
    "moe.dim": ("intermediate_size",),
    "attention.num_heads": ("num_attention_heads",),
    "attention.num_kv_heads": ("num_key_value_heads",),
    # Not required.
    "attention.head_dim": ("head_dim",),
    "moe.num_experts": ("num_experts", "num_local_experts"),
    "moe.num_selected": ("num_experts_per_tok", "num_selected_experts"),
    "context_length": ("max_position_embeddings",),
}
FACTORS = {
    "norm.eps": ("rms_norm_eps",),
    "embedding_multiplier": ("embedding_multiplier_scale",),
    "logit_multiplier": ("output_multiplier_scale",),
    "attention.logit_scale": ("attn_output_multiplier",),
    "attention.logit_softcap": ("max_attn_value",),
    "attention.rope.theta": ("rope_theta",),
}
# Our keys that config.json has none for, with the value that the family's code computes with.
FIXED = {"norm.sandwich": True, "moe.activation": "gelu_tanh"}
REQUIRED = list(SIZES)[:6]
# No model has more of anything, and arithmetic with more could take for ever.
LARGEST_SIZE = 1 << 24


class Grok1(Adapter):
    """Grok-1 in the layouts of hpcai-tech/grok-1, which exports write, and keyfan/grok-1-hf."""

    family = "Grok-1"
    layouts, export_layout, tied_head = LAYOUTS, HPCAI, "lm_head.weight"
    release, release_parameters = "xai-org/grok-1", 315_684_820_992

    def layout_of(self, names: Iterable[str]) -> str | None:
        """The layout that tensors of these names are in; None for those of another family."""
        layouts = (
            layout
            for name in names
            for layout, known in DISTINCTIVE_NAMES.items()
            if known.match(name)
        )
        return next(layouts, None)

    def read_config(self, path: str, data: dict[str, Any]) -> ModelConfig:
        """The model that a config.json describes; without head_dim, hidden_size /
        num_attention_heads is taken, and for other missing keys the defaults of our config."""
        values: dict[str, Any] = {}
        for ours, theirs in (SIZES | FACTORS).items():
            key = next((key for key in theirs if data.get(key) is not None), None)
            if key is not None:
                values[ours] = _checked(path, key, data[key], size=ours in SIZES)
            elif ours in REQUIRED:
                raise CheckpointError(f"{path}: {theirs[0]} is missing, a size of the model.")
        if "attention.head_dim" not in values:
            embed_dim, num_heads = values["embed_dim"], values["attention.num_heads"]
            if embed_dim % num_heads:
                raise CheckpointError(
                    f"{path}: hidden_size={embed_dim} is no multiple of "
                    f"num_attention_heads={num_heads}, so head_dim must be given."
                )
            values["attention.head_dim"] = embed_dim // num_heads
        try:
            return from_dict(nest(values), path, config_type=ModelConfig)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None

    def stated_fields(self, data: dict[str, Any]) -> set[str]:
        """The fields of our config that a config.json has."""
        known = SIZES | FACTORS
        return {ours for ours, theirs in known.items() if any(map(data.get, theirs))} | {*FIXED}

    def config_data(self, config: ModelConfig, dtype: str) -> dict[str, Any]:
        """The content of config.json for a model in the layout of hpcai-tech/grok-1."""
        return {
            "architectures": ["Grok1ModelForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_grok1.Grok1Config",
                "AutoModel": "modeling_grok1.Grok1Model",
                "AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM",
            },
            "model_type": "grok-1",
            **self.config_numbers(config),
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": dtype,
            "use_cache": True,
        }

    def config_numbers(self, config: ModelConfig) -> dict[str, int | float]:
        """The model's sizes and factors under their keys in config.json."""
        values = dict(flatten(to_dict(config)))
        for key in (*SIZES, *FACTORS, *FIXED):
            value = values.get(key)
            if value is None or value != FIXED.get(key, value):
                right = "a number" if key not in FIXED else json.dumps(FIXED[key])
                raise ConfigError(
                    f"model.{key}={json.dumps(value)} has no place in a Hugging Face folder of "
                    f"{self.family}, which needs {right}."
                )
        sizes = {theirs[0]: values[ours] for ours, theirs in SIZES.items()}
        return sizes | {theirs[0]: float(values[ours]) for ours, theirs in FACTORS.items()}

    def reading_notes(self, config: ModelConfig) -> str:
        """Text of the model card on the programs that can read an export."""
        text = (
            "A generic decoder cannot read this folder. Its tensors are named and laid out as in "
            f"[{HPCAI}](https://huggingface.co/{HPCAI}), whose model code it needs: copy "
            f"{', '.join(f'`{file}`' for file in CODE_FILES)} from there to here, read them, since "
            "they will be executed, and load the folder with `trust_remote_code=True`. The code of "
            f"[{KEYFAN}](https://huggingface.co/{KEYFAN}) expects other names. No tokenizer is "
            "here either; Grok-1's is the file `tokenizer.model` of xAI's repository."
        )
        c = config.attention
        if c.num_heads * c.head_dim != config.embed_dim or c.rope.theta != 10000:
            text += (
                "\n\nThat code takes the width of a head to be hidden_size / num_attention_heads "
                "and the base of the rotary embedding to be 10000. This model differs (see "
                "head_dim and rope_theta below), so the code must be changed accordingly."
            )
        return text


def _checked(path: str, key: str, value: Any, size: bool) -> int | float:
    if size and type(value) is int and 0 < value <= LARGEST_SIZE:
        return value
    if not size and type(value) in (int, float) and 0 < value < math.inf:
        return float(value)
    right = f"an integer from 1 to {LARGEST_SIZE}" if size else "a positive number"
    raise CheckpointError(f"{path}: {key} is {value!r:.40}; it should be {right}.")
