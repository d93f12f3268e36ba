"""Grok-2 as xAI released it (xai-org/grok-2), and merged copies: a dense MLP beside the experts,
whose parts for eight tensor-parallel ranks have the same names in every rank's file."""

import re

from grok.config import ModelConfig
from grok.weights.huggingface.adapters import decoder_names as names
from grok.weights.huggingface.adapters.adapter import Adapter, Layout
from grok.weights.huggingface.adapters.config_json import (
    ANY,
    FACTOR,
    SIZE,
    ConfigJson,
    Field,
    default_logit_scale,
    head_dim_of_width,
)

RELEASE = "xai-org/grok-2"
# In the order of the release's files: one kind of tensor, of all layers, in each.
NAMES = (
    names.TABLE
    | names.HEAD
    | names.FINAL_NORM
    | names.in_layers(
        {
            "layers/mlp/w_gate_DF": "mlp.gate_proj.weight",
            "layers/mlp/w_down_FD": "mlp.down_proj.weight",
            "layers/mlp/w_up_DF": "mlp.up_proj.weight",
            **names.EXPERTS,
            "layers/attention/w_key_DKH": "self_attn.k_proj.weight",
            "layers/attention/w_out_NHD": "self_attn.o_proj.weight",
            "layers/attention/w_query_DNH": "self_attn.q_proj.weight",
            "layers/attention/w_value_DKH": "self_attn.v_proj.weight",
            "layers/pre_attn_norm/scale_D": "pre_attn_norm.weight",
            "layers/post_attn_norm/scale_D": "post_attn_norm.weight",
            "layers/pre_ffn_norm/scale_D": "pre_moe_norm.weight",
            "layers/post_ffn_norm/scale_D": "post_moe_norm.weight",
            **names.ROUTER,
        }
    )
)

CONFIG = ConfigJson(
    # Conversions of Grok-1 share `architectures`; residual_moe tells Grok-2.
    head={"architectures": ["Grok1ForCausalLM"]},
    fields=(
        Field("embedding_multiplier", ("embedding_multiplier_scale",), FACTOR),
        Field("logit_multiplier", ("output_multiplier_scale",), FACTOR),
        Field("vocab_size", ("vocab_size",), SIZE),
        Field("embed_dim", ("hidden_size",), SIZE),
        Field("mlp.dim", ("intermediate_size",), SIZE),
        Field("moe.dim", ("moe_intermediate_size",), SIZE),
        Field("context_length", ("max_position_embeddings",), SIZE),
        Field("moe.num_selected", ("num_experts_per_tok",), SIZE),
        Field("moe.num_experts", ("num_local_experts",), SIZE),
        Field("attention.num_heads", ("num_attention_heads",), SIZE),
        Field("attention.num_kv_heads", ("num_key_value_heads",), SIZE),
        Field("num_layers", ("num_hidden_layers",), SIZE),
        Field("attention.head_dim", ("head_dim",), SIZE, head_dim_of_width),
        Field("norm.eps", ("rms_norm_eps",), FACTOR),
        Field("logit_softcap", ("final_logit_softcapping",), FACTOR),
        Field("attention.logit_softcap", ("attn_logit_softcapping",), FACTOR),
        Field("moe.logit_softcap", ("router_logit_softcapping",), FACTOR),
        Field("attention.rope.theta", ("rope_theta",), FACTOR),
        # -1, or no such key: none.
        Field("attention.temperature_length", ("attn_temperature_len",), SIZE, None, True, -1),
    ),
    fixed={
        "norm.sandwich": True,
        "tie_embeddings": False,
        # The error function, as in sglang, the runtime that xAI names.
        "mlp.activation": "gelu",
        "moe.activation": "gelu",
        "moe.normalize": False,
        "attention.logit_scale": default_logit_scale,
        "attention.window": None,
        "attention.rope.scaling": None,
    },
    harmless={
        "residual_moe": (True,),
        # Plain rotary embedding, in spite of the numbers behind it, which nothing reads then.
        "rope_type": ("original",),
        "original_max_position_embeddings": ANY,
        "scaling_factor": ANY,
        "extrapolation_factor": ANY,
        "attn_factor": ANY,
        "beta_fast": ANY,
        "beta_slow": ANY,
        "rope_rotate_half_dims": (False,),
        "sliding_window_size": (-1,),
        "global_attn_every_n": (1,),
        "attn_logit_softcapping_method": ("tanh",),
        "tie_word_embeddings": (False,),
        # The files tell how experts are split; nothing else may be.
        "load_presharded_moe": ANY,
        "load_presharded_attn": (False,),
        "load_presharded_mlp": (False,),
        "load_presharded_embedding": (False,),
    },
    written={
        "residual_moe": True,
        "sliding_window_size": -1,
        "global_attn_every_n": 1,
        "model_type": "git",
        "rope_type": "original",
        # sglang's table of angles has as many positions as their product.
        "original_max_position_embeddings": lambda config: -(-config.context_length // 16),
        "scaling_factor": 16.0,
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "beta_fast": 8,
        "beta_slow": 1,
    },
    # llama.cpp's and sgl-jax's.
    alternatives={"mlp.activation": "gelu_tanh", "moe.activation": "gelu_tanh"},
)


def reading_notes(config: ModelConfig) -> str:
    """Text of the model card on the programs that can read an export."""
    return (
        f"Files, names and config.json are as in [{RELEASE}](https://huggingface.co/{RELEASE}), "
        "which sglang reads with eight tensor-parallel ranks. Experts are split over the files of "
        "the ranks (TP-000 to TP-007) under the same names: a reader that goes by name alone gets "
        "an eighth of each. There is no index."
    )


GROK_2 = Adapter(
    name="grok-2",
    family="Grok-2",
    model_types=("git",),
    layouts={
        RELEASE: Layout(
            NAMES, re.compile(r"model\.layers\.\d+\.(pre_moe_norm|post_moe_norm)\.weight")
        )
    },
    export_layout=RELEASE,
    config_json=CONFIG,
    reading_notes=reading_notes,
    tokenizer_note="None is here; Grok-2's is the file `tokenizer.tok.json` of xAI's repository.",
    num_ranks=8,
)
