"""Grok-1 on Hugging Face: two repositories with the release's weights, each with its own names."""

import re

from grok.config import ModelConfig
from grok.weights.huggingface.adapters.adapter import Adapter, Layout
from grok.weights.huggingface.adapters.config_json import (
    ANY,
    FACTOR,
    OURS,
    SIZE,
    ConfigJson,
    Field,
    head_dim_of_width,
)

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
# Names that only one layout has; every layer has some.
DISTINCTIVE_NAMES = {
    HPCAI: re.compile(r"model\.layers\.\d+\.(attn|moe_block)\."),
    KEYFAN: re.compile(r"transformer\.decoder_layer\.\d+\."),
}
LAYOUTS = {
    layout: Layout(
        {
            names[0]: (prefix if names[0].startswith("layers/") else "") + names[column]
            for names in NAMES
        },
        DISTINCTIVE_NAMES[layout],
    )
    for column, (layout, prefix) in enumerate(LAYERS.items(), 1)
}
CODE_FILES = ("configuration_grok1.py", "modeling_grok1.py", "modeling_grok1_outputs.py")

CONFIG = ConfigJson(
    head={
        "architectures": ["Grok1ModelForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_grok1.Grok1Config",
            "AutoModel": "modeling_grok1.Grok1Model",
            "AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM",
        },
        "model_type": "grok-1",
    },
    # Other repositories' keys behind those that exports write.
    fields=(
        Field("vocab_size", ("vocab_size",), SIZE),
        Field("num_layers", ("num_hidden_layers",), SIZE),
        Field("embed_dim", ("hidden_size",), SIZE),
        Field("moe.dim", ("intermediate_size",), SIZE),
        Field("attention.num_heads", ("num_attention_heads",), SIZE),
        Field("attention.num_kv_heads", ("num_key_value_heads",), SIZE),
        Field("attention.head_dim", ("head_dim",), SIZE, head_dim_of_width),
        Field("moe.num_experts", ("num_experts", "num_local_experts"), SIZE, OURS),
        Field("moe.num_selected", ("num_experts_per_tok", "num_selected_experts"), SIZE, OURS),
        Field("context_length", ("max_position_embeddings",), SIZE, OURS),
        Field("norm.eps", ("rms_norm_eps",), FACTOR, OURS),
        Field("embedding_multiplier", ("embedding_multiplier_scale",), FACTOR, OURS),
        Field("logit_multiplier", ("output_multiplier_scale",), FACTOR, OURS),
        Field("attention.logit_scale", ("attn_output_multiplier",), FACTOR, OURS),
        Field(
            "attention.logit_softcap", ("max_attn_value", "attn_logit_softcapping"), FACTOR, OURS
        ),
        Field("attention.rope.theta", ("rope_theta",), FACTOR, OURS),
    ),
    fixed={
        "norm.sandwich": True,
        "tie_embeddings": True,
        "logit_softcap": None,
        "attention.temperature_length": None,
        "attention.window": None,
        "attention.rope.scaling": None,
        "mlp": None,
        "moe.activation": "gelu_tanh",
        "moe.normalize": False,
        "moe.logit_softcap": None,
    },
    harmless={
        "auto_map": ANY,
        "router_logit_softcapping": (0,),
        "moe_router_renormalize": (False,),
        "router_aux_loss_coef": ANY,
        "output_router_logits": ANY,
        "tie_word_embeddings": (True,),
        "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
        "attention_dropout": (0,),
        "attn_dropout": (0,),
        "resid_dropout": (0,),
    },
    written={
        # What vLLM would take to be otherwise.
        "attn_logit_softcapping": lambda config: config.attention.logit_softcap,
        "router_logit_softcapping": 0.0,
        "moe_router_renormalize": False,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    },
)


def reading_notes(config: ModelConfig) -> str:
    """Text of the model card on the programs that can read an export."""
    text = (
        f"Tensors are named and laid out as in [{HPCAI}](https://huggingface.co/{HPCAI}). "
        "transformers has no code of the architecture: copy "
        f"{', '.join(f'`{file}`' for file in CODE_FILES)} from there to here, read them, since "
        "they will be executed, and load the folder with `trust_remote_code=True`. vLLM has code "
        f"of its own up to release 0.24, and needs `{CODE_FILES[0]}` alone; it takes GELU by the "
        "error function, where this model has the tanh form. The code of "
        f"[{KEYFAN}](https://huggingface.co/{KEYFAN}), and sglang's, expect other names. "
        "llama.cpp reads the file that `grok export gguf` writes of a model whose heads make up "
        "its width."
    )
    c = config.attention
    if c.num_heads * c.head_dim != config.embed_dim or c.rope.theta != 10000:
        text += (
            "\n\nAll that code takes the width of a head to be hidden_size / num_attention_heads "
            "and the base of the rotary embedding to be 10000. This model differs (see "
            "head_dim and rope_theta below), so the code must be changed accordingly."
        )
    return text


GROK_1 = Adapter(
    name="grok-1",
    family="Grok-1",
    model_types=("grok-1", "grok_1", "grok1", "grok"),
    layouts=LAYOUTS,
    export_layout=HPCAI,
    config_json=CONFIG,
    reading_notes=reading_notes,
    tokenizer_note="None is here; Grok-1's is the file `tokenizer.model` of xAI's repository.",
    copies_tied_head=True,
)
