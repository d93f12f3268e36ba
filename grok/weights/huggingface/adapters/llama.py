"""Llama 2, 3, 3.1 and 3.2 on Hugging Face."""

import re

from grok.weights.huggingface.adapters import decoder_names as names
from grok.weights.huggingface.adapters import transformers
from grok.weights.huggingface.adapters.adapter import Adapter, Layout
from grok.weights.huggingface.adapters.config_json import ConfigJson

# Mistral's, too: config.json tells the two apart.
DENSE = Layout(
    names.TABLE
    | names.in_layers(names.PRE_NORMS | names.ATTENTION | names.MLP)
    | names.FINAL_NORM
    | names.HEAD,
    re.compile(r"model\.layers\.\d+\.mlp\.gate_proj\.weight"),
)

LLAMA = Adapter(
    name="llama",
    family="Llama",
    model_types=("llama",),
    layouts={"meta-llama": DENSE},
    export_layout="meta-llama",
    config_json=ConfigJson(
        head={"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        fields=transformers.fields("mlp.dim", eps=1e-6, context_length=2048),
        fixed=transformers.FIXED
        | {"attention.window": None, "mlp.activation": "silu", "moe": None},
        harmless=transformers.HARMLESS,
        written=transformers.WRITTEN
        | {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        scaled_rope=10000.0,
    ),
    reading_notes=transformers.reading_notes,
    tokenizer_note=transformers.TOKENIZER_NOTE,
    ignored=transformers.BUFFERS,
)
