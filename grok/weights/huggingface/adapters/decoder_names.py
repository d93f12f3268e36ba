"""Names of tensors that several families share: of the projections, norms and MLP of Llama's and
Mistral's layers, and of the experts of Mixtral's and Grok-2's."""

# Our names, and theirs without the layer's prefix.
ATTENTION = {
    "layers/attention/w_query_DNH": "self_attn.q_proj.weight",
    "layers/attention/w_key_DKH": "self_attn.k_proj.weight",
    "layers/attention/w_value_DKH": "self_attn.v_proj.weight",
    "layers/attention/w_out_NHD": "self_attn.o_proj.weight",
}
# The second is the norm before the feed-forward part, in spite of its name.
PRE_NORMS = {
    "layers/pre_attn_norm/scale_D": "input_layernorm.weight",
    "layers/pre_ffn_norm/scale_D": "post_attention_layernorm.weight",
}
MLP = {
    "layers/mlp/w_gate_DF": "mlp.gate_proj.weight",
    "layers/mlp/w_up_DF": "mlp.up_proj.weight",
    "layers/mlp/w_down_FD": "mlp.down_proj.weight",
}
ROUTER = {"layers/moe/router_DE": "block_sparse_moe.gate.weight"}
EXPERTS = {
    "layers/moe/w_gate_EDF": "block_sparse_moe.experts.{expert}.w1.weight",
    "layers/moe/w_down_EFD": "block_sparse_moe.experts.{expert}.w2.weight",
    "layers/moe/w_up_EDF": "block_sparse_moe.experts.{expert}.w3.weight",
}
TABLE = {"embed/table_VD": "model.embed_tokens.weight"}
FINAL_NORM = {"final_norm/scale_D": "model.norm.weight"}
HEAD = {"lm_head/table_VD": "lm_head.weight"}


def in_layers(names: dict[str, str]) -> dict[str, str]:
    """Names with the prefix of a layer."""
    return {ours: f"model.layers.{{layer}}.{theirs}" for ours, theirs in names.items()}
