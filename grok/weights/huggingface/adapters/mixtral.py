"""Mixtral on Hugging Face: Llama's attention and norms, and experts for the MLP."""

import re

from grok.weights.huggingface.adapters import decoder_names as names
from grok.weights.huggingface.adapters import transformers
from grok.weights.huggingface.adapters.adapter import Adapter, Layout
from grok.weights.huggingface.adapters.config_json import SIZE, ConfigJson, Field

LAYOUT = Layout(
    names.TABLE
    | names.in_layers(names.PRE_NORMS | names.ATTENTION | names.ROUTER | names.EXPERTS)
    | names.FINAL_NORM
    | names.HEAD,
    re.compile(r"model\.layers\.\d+\.block_sparse_moe\.gate\.weight"),
)

MIXTRAL = Adapter(
    name="mixtral",
    family="Mixtral",
    model_types=("mixtral",),
    layouts={"mistralai": LAYOUT},
    export_layout="mistralai",
    config_json=ConfigJson(
        head={"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        fields=transformers.fields(
            "moe.dim",
            Field("moe.num_experts", ("num_local_experts",), SIZE, 8),
            Field("moe.num_selected", ("num_experts_per_tok",), SIZE, 2),
            transformers.WINDOW,
            eps=1e-5,
            context_length=131072,
        ),
        fixed=transformers.FIXED
        | {"moe.activation": "silu", "moe.normalize": True, "moe.logit_softcap": None, "mlp": None},
        harmless=transformers.HARMLESS | transformers.ROUTER_HARMLESS,
        written=transformers.WRITTEN
        | {"output_router_logits": False, "router_aux_loss_coef": 0.02},
        scaled_rope=1000000.0,
    ),
    reading_notes=transformers.reading_notes,
    tokenizer_note=transformers.TOKENIZER_NOTE,
    ignored=transformers.BUFFERS,
)
