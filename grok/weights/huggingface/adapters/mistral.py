"""Mistral on Hugging Face: Llama's tensors, and a sliding window in config.json."""

import dataclasses

from grok.weights.huggingface.adapters import transformers
from grok.weights.huggingface.adapters.adapter import Adapter
from grok.weights.huggingface.adapters.config_json import ConfigJson
from grok.weights.huggingface.adapters.llama import DENSE

# The window of the family's class in transformers, where a file says nothing; null is none.
WINDOW = dataclasses.replace(transformers.WINDOW, default=4096)

MISTRAL = Adapter(
    name="mistral",
    family="Mistral",
    model_types=("mistral",),
    layouts={"mistralai": DENSE},
    export_layout="mistralai",
    config_json=ConfigJson(
        head={"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        fields=transformers.fields("mlp.dim", WINDOW, eps=1e-6, context_length=131072),
        fixed=transformers.FIXED | {"mlp.activation": "silu", "moe": None},
        harmless=transformers.HARMLESS,
        written=transformers.WRITTEN,
        scaled_rope=10000.0,
    ),
    reading_notes=transformers.reading_notes,
    tokenizer_note=transformers.TOKENIZER_NOTE,
    ignored=transformers.BUFFERS,
)
