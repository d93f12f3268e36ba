"""Names and shapes of the parameters: what checkpoints, importers and exporters agree on.

A parameter's name is its path in the tree, as in `layers/moe/w_gate_EDF`; those of `layers/` have
the layers stacked on a leading axis L, which the letters at the end of a name leave out.

Letters: D embed, E experts, F mlp, G groups of scales, H head_dim, K kv heads, L layers,
N heads, V vocab.
"""

import dataclasses

from grok.config import GrokConfig


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How the axes of a matrix divide: leading ones, contracted rows, then columns.

    These are the parameters that may be int8. Their scales have the leading axes, one axis of G
    groups of rows, and the columns: a scale serves rows/G consecutive rows of its column.
    """

    row_dims: int
    col_dims: int


MATRICES = {
    "layers/attention/w_query_DNH": Matrix(1, 2),
    "layers/attention/w_key_DKH": Matrix(1, 2),
    "layers/attention/w_value_DKH": Matrix(1, 2),
    "layers/attention/w_out_NHD": Matrix(2, 1),
    "layers/moe/w_gate_EDF": Matrix(1, 1),
    "layers/moe/w_up_EDF": Matrix(1, 1),
    "layers/moe/w_down_EFD": Matrix(1, 1),
}


def shapes(config: GrokConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, layers stacked."""
    c = config
    L, D, F, E = c.num_layers, c.embed_dim, c.mlp_dim, c.num_experts
    N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
    norms = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")
    return {
        "embed/table_VD": (c.vocab_size, D),
        "final_norm/scale_D": (D,),
        "layers/attention/w_query_DNH": (L, D, N, H),
        "layers/attention/w_key_DKH": (L, D, K, H),
        "layers/attention/w_value_DKH": (L, D, K, H),
        "layers/attention/w_out_NHD": (L, N, H, D),
        "layers/moe/router_DE": (L, D, E),
        "layers/moe/w_gate_EDF": (L, E, D, F),
        "layers/moe/w_up_EDF": (L, E, D, F),
        "layers/moe/w_down_EFD": (L, E, F, D),
        **{f"layers/{norm}/scale_D": (L, D) for norm in norms},
    }


def rows_and_columns(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The three parts of a matrix's shape: leading axes, rows, columns."""
    matrix = MATRICES[name]
    lead = len(shape) - matrix.row_dims - matrix.col_dims
    columns = len(shape) - matrix.col_dims
    return shape[:lead], shape[lead:columns], shape[columns:]


def scales_shape(name: str, shape: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """The shape of the scales of a matrix of this name and shape, for `groups` groups of rows."""
    lead, _, columns = rows_and_columns(name, shape)
    return (*lead, groups, *columns)
