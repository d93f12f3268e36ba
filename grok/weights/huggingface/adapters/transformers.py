"""Parts of a config.json that Llama, Mistral and Mixtral share: all are models of the transformers
library, whose own code reads the exports."""

import re

from grok.config import ModelConfig
from grok.weights.huggingface.adapters.config_json import (
    ANY,
    FACTOR,
    FLAG,
    SIZE,
    Field,
    default_logit_scale,
    head_dim_of_width,
)

# Frequencies of the rotary embedding, which early files store and no program needs.
BUFFERS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def fields(width: str, *others: Field, eps: float, context_length: int) -> tuple[Field, ...]:
    """The fields of a family, with the key of ours that intermediate_size is, and the defaults of
    its class in transformers, which hold where a file has no such key."""
    return (
        Field("vocab_size", ("vocab_size",), SIZE),
        Field("embed_dim", ("hidden_size",), SIZE),
        Field(width, ("intermediate_size",), SIZE),
        Field("num_layers", ("num_hidden_layers",), SIZE),
        Field("attention.num_heads", ("num_attention_heads",), SIZE),
        Field("attention.num_kv_heads", ("num_key_value_heads",), SIZE, one_kv_head_per_head),
        Field("attention.head_dim", ("head_dim",), SIZE, head_dim_of_width),
        Field("context_length", ("max_position_embeddings",), SIZE, context_length),
        Field("norm.eps", ("rms_norm_eps",), FACTOR, eps),
        Field("tie_embeddings", ("tie_word_embeddings",), FLAG, False),
        *others,
    )


def one_kv_head_per_head(path: str, values: dict) -> int:
    """The default number of key/value heads, that of query heads."""
    return values["attention.num_heads"]


WINDOW = Field("attention.window", ("sliding_window",), SIZE, None, nullable=True)
FIXED = {
    "norm.sandwich": False,
    "embedding_multiplier": 1.0,
    "logit_multiplier": 1.0,
    "logit_softcap": None,
    "attention.logit_scale": default_logit_scale,
    "attention.logit_softcap": None,
    "attention.temperature_length": None,
}
HARMLESS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "pretraining_tp": (1,),
    "max_sequence_length": ANY,  # beside max_position_embeddings, in early files
}
ROUTER_HARMLESS = {
    "router_aux_loss_coef": ANY,
    "output_router_logits": ANY,
    "router_jitter_noise": (0,),
}
# Without a tokenizer, no id is better than that of another vocabulary.
WRITTEN = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": True,
}


TOKENIZER_NOTE = (
    "None is here; bos_token_id and eos_token_id in config.json are null until you set yours."
)


def reading_notes(config: ModelConfig) -> str:
    """Text of the model card on the programs that can read an export."""
    return (
        "Names and config.json are those of the transformers library, whose "
        "`AutoModelForCausalLM.from_pretrained` reads this folder, as other programs do that read "
        "the family."
    )
