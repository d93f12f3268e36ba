"""`config.json` of a Hugging Face folder <-> GrokConfig."""

import math
from typing import Any

from grok import storage
from grok.config import GrokConfig
from grok.errors import CheckpointError, ConfigError
from grok.model.layers import RMS_EPSILON
from grok.weights.huggingface.safetensors import parse_object

FILE = "config.json"

# Our keys to theirs; the first is the one that exports write, others are other repositories'.
SIZES = {
    "vocab_size": ("vocab_size",),
    "num_layers": ("num_hidden_layers",),
    "embed_dim": ("hidden_size",),
    "mlp_dim": ("intermediate_size",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "num_experts": ("num_experts", "num_local_experts"),
    "num_selected_experts": ("num_experts_per_tok", "num_selected_experts"),
    "context_length": ("max_position_embeddings",),
}
FACTORS = {
    "embedding_multiplier": ("embedding_multiplier_scale",),
    "output_multiplier": ("output_multiplier_scale",),
    "attn_output_multiplier": ("attn_output_multiplier",),
    "attn_logit_softcap": ("max_attn_value",),
    "rope_theta": ("rope_theta",),
}
REQUIRED = ("vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads")
# No model has more of anything, and arithmetic with more could take for ever.
LARGEST_SIZE = 1 << 24


def read_config(folder: str) -> GrokConfig:
    """The model that a folder's config.json describes.

    Without head_dim it is hidden_size / num_attention_heads; other keys that are missing have
    GrokConfig's defaults. Raises CheckpointError, with the key, for what no Grok-1 can be.
    """
    path = storage.join(folder, FILE)
    data = parse_object(storage.read_bytes(path, CheckpointError), f"{path}:")
    values: dict[str, Any] = {}
    for ours, theirs in (SIZES | FACTORS).items():
        key = next((key for key in theirs if data.get(key) is not None), None)
        if key is not None:
            values[ours] = _checked(path, key, data[key], size=ours in SIZES)
        elif ours in REQUIRED:
            raise CheckpointError(f"{path}: {theirs[0]} is missing, a size of the model.")
    if "head_dim" not in values:
        if values["embed_dim"] % values["num_heads"]:
            raise CheckpointError(
                f"{path}: hidden_size={values['embed_dim']} is no multiple of "
                f"num_attention_heads={values['num_heads']}, so head_dim must be given."
            )
        values["head_dim"] = values["embed_dim"] // values["num_heads"]
    epsilon = data.get("rms_norm_eps", RMS_EPSILON)
    if epsilon != RMS_EPSILON:
        raise CheckpointError(
            f"{path}: rms_norm_eps is {epsilon!r:.40}; Grok-1's is {RMS_EPSILON}, and there is no "
            "setting for another."
        )
    try:
        return GrokConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def config_data(config: GrokConfig, dtype: str) -> dict[str, Any]:
    """What config.json holds for this model in the layout of hpcai-tech/grok-1."""
    return {
        "architectures": ["Grok1ModelForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_grok1.Grok1Config",
            "AutoModel": "modeling_grok1.Grok1Model",
            "AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM",
        },
        "model_type": "grok-1",
        **numbers(config),
        "rms_norm_eps": RMS_EPSILON,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def numbers(config: GrokConfig) -> dict[str, int | float]:
    """The model's sizes and factors under their keys."""
    sizes = {theirs[0]: getattr(config, ours) for ours, theirs in SIZES.items()}
    return sizes | {theirs[0]: float(getattr(config, ours)) for ours, theirs in FACTORS.items()}


def _checked(path: str, key: str, value: Any, size: bool) -> int | float:
    if size:
        if type(value) is int and 0 < value <= LARGEST_SIZE:
            return value
        right = f"a whole number from 1 to {LARGEST_SIZE}"
    else:
        if type(value) in (int, float) and 0 < value < math.inf:
            return float(value)
        right = "a positive number"
    raise CheckpointError(f"{path}: {key} is {value!r:.40}; it should be {right}.")
